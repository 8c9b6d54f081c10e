"""The directory of a pack: an index that is replaced in one step, and shards that never change.

    lotr_pack.json                   the index: what the pack holds, and where
    cells-00001.safetensors, …       bases that adapters share
    adapters-00001.safetensors, …    what is each adapter's own

A writer holds a lock, writes new shards beside the old ones and then replaces the index; files that
no index names are remains of a writer that was stopped, and the next one clears them away. So a
reader finds the old pack or the new one, whatever happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lotrtensor.adapters.formats import tensors
from lotrtensor.adapters.formats.directory import write_file
from lotrtensor.adapters.formats.json_text import read_json_object
from lotrtensor.adapters.formats.paths import is_dir, is_file
from lotrtensor.adapters.formats.tensors import Tensors, check_exists, file_bytes
from lotrtensor.errors import FormatError
from lotrtensor.packs.coding import is_number

INDEX, LOCK, BUILD, ADDING = "lotr_pack.json", ".lotr_pack.lock", "building", ".adding-"
FORMAT, VERSION = "lotr-pack", 1
CELL_SHARD, ADAPTER_SHARD = "cells", "adapters"

Json = dict[str, Any]


class Shard(NamedTuple):
    """A file of a pack: its name, its size and its SHA-256 digest."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """What the index says of an adapter.

    Attributes
    ----------
    shard : str
        File that holds what is its own.
    number : int
        Number that its tensors' keys begin with.
    relative_error : float
        Of what is stored.
    mean_error : float or None
        Relative error of the mean of the adapters that were packed together, taken for it; None
        for one that was added later.
    bytes : int
        Bytes of its tensors, those that are carried along not counted.
    uses_bases : bool
        Whether it is stored on the bases of the cells, not by itself.
    """

    shard: str
    number: int
    relative_error: float
    mean_error: float | None
    bytes: int
    uses_bases: bool


@dataclass(frozen=True)
class Index:
    """The index of a pack.

    Attributes
    ----------
    cells, shards : tuple of Shard
        Files of bases, and of adapters.
    adapters : mapping of str to Entry
        By name, in the order in which they came.
    next : int
        Number of the next adapter or shard; none is used twice.
    goal : mapping
        ``tolerance`` or ``step``, and ``rank``: what is asked of an adapter that is added.
    share : str
        What was asked to be shared.
    bounds : tuple of (float or None)
        Relative error that no basis of a cell's ranks falls below, cell by cell, from the build
        that made them; not in the file.
    """

    cells: tuple[Shard, ...] = ()
    shards: tuple[Shard, ...] = ()
    adapters: Mapping[str, Entry] = field(default_factory=dict)
    next: int = 1
    goal: Mapping[str, float] = field(default_factory=dict)
    share: str = "auto"
    bounds: tuple[float | None, ...] = ()

    @property
    def files(self) -> dict[str, Shard]:
        """All files, by name."""
        return {shard.file: shard for shard in (*self.cells, *self.shards)}

    def without_unused(self) -> Index:
        """Leave out shards in which no adapter is left."""
        used = {entry.shard for entry in self.adapters.values()}
        return replace(self, shards=tuple(s for s in self.shards if s.file in used))

    def to_json(self) -> bytes:
        """Return the file."""
        places = {shard.file: i for i, shard in enumerate(self.shards)}
        content = {
            "format": FORMAT,
            "format_version": VERSION,
            "cells": [shard._asdict() for shard in self.cells],
            "shards": [shard._asdict() for shard in self.shards],
            "adapters": {
                name: [places[entry.shard], *list(vars(entry).values())[1:]]
                for name, entry in self.adapters.items()
            },
            "next": self.next,
            "goal": dict(self.goal),
            "share": self.share,
        }
        return (json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def is_pack(path: Path) -> bool:
    """Whether a directory holds the index of a pack."""
    return is_file(path / INDEX)


def read_index(path: Path) -> Index:
    """Return the index of a pack.

    Raises
    ------
    FormatError
        If there is none, it is damaged, or of a version that is not read here.
    """
    check_exists(path)
    if not is_pack(path):
        if is_dir(path / BUILD):
            raise FormatError(
                f"{path} is a pack that was not finished; run the command that makes it again, "
                "which goes on where it stopped"
            )
        raise FormatError(f"{path} has no {INDEX}; expected a pack, which lotr pack makes")
    content = read_json_object(path / INDEX)
    if content.get("format") != FORMAT or content.get("format_version") != VERSION:
        raise FormatError(
            f"{path / INDEX} is of {content.get('format')!r}, version "
            f"{content.get('format_version')!r}; this release reads {FORMAT!r}, version {VERSION}: "
            "update lotrtensor"
        )
    try:
        return _index(content)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise FormatError(f"{path / INDEX} is damaged ({error}); fetch the pack again") from error


def _index(content: Json) -> Index:
    cells, shards = (tuple(map(_shard, content[key])) for key in ("cells", "shards"))
    entries = {
        name: Entry(shards[_natural(place)].file, *values)
        for name, (place, *values) in content["adapters"].items()
    }
    found = Index(
        cells=cells,
        shards=shards,
        adapters=entries,
        next=content["next"],
        goal=content["goal"],
        share=content["share"],
    )
    names = [shard.file for shard in (*found.cells, *found.shards)]
    if len(set(names)) != len(names) or type(found.next) is not int:
        raise ValueError("a file is named twice, or next is no number")
    if not isinstance(found.share, str) or not all(map(is_number, dict(found.goal).values())):
        raise ValueError(f"the goal {found.goal!r}")
    for name, entry in entries.items():
        numbers = type(entry.number) is int and type(entry.bytes) is int
        known = entry.shard in found.files and type(entry.uses_bases) is bool
        errors = is_number(entry.relative_error)
        errors &= entry.mean_error is None or is_number(entry.mean_error)
        if not (numbers and known and errors):
            raise ValueError(f"the entry of {name!r}")
    return found


def _natural(value: Any) -> int:
    if type(value) is int and value >= 0:
        return value
    raise ValueError(f"the number {value!r} of a file")


def _shard(item: Json) -> Shard:
    found = Shard(item["file"], item["bytes"], item["sha256"])
    if Path(str(found.file)).name != found.file or type(found.bytes) is not int:
        raise ValueError(f"the file {found.file!r}")
    return found


def read_some(path: Path, shard: Shard, prefix: str = "") -> Tensors:
    """Return the tensors of a shard whose keys begin with ``prefix``, without it.

    The header and these tensors' bytes are read, and nothing else.

    Raises
    ------
    FormatError
        If the file is missing, of another size than the index says, or damaged.
    """
    check_size(path / shard.file, shard)
    return tensors.read_some(path / shard.file, prefix)


def check_size(file: Path, shard: Shard) -> None:
    """Refuse a file that is missing, or of another size than the index says.

    Raises
    ------
    FormatError
        Naming the file.
    """
    if not is_file(file):
        raise FormatError(f"{file} is missing, which the index names; fetch the pack again")
    found = file.stat().st_size
    if found != shard.bytes:
        raise FormatError(
            f"{file} has {found} bytes, and the index says {shard.bytes}; fetch the pack again"
        )


def check_digest(path: Path, shard: Shard) -> None:
    """Refuse a file whose content is not what was written.

    Raises
    ------
    FormatError
        Naming the file.
    """
    check_size(path / shard.file, shard)
    if digest(path / shard.file) != shard.sha256:
        raise FormatError(
            f"{path / shard.file} is damaged: its SHA-256 digest is not the index's; fetch the "
            "pack again"
        )


def digest(file: Path) -> str:
    """Return the SHA-256 digest of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_shard(path: Path, kind: str, number: int, content: Tensors) -> Shard:
    """Write a new shard; no index names it yet."""
    written = file_bytes(content, {})
    name = f"{kind}-{number:05}.safetensors"
    write_file(path / name, written, force=True)
    return Shard(name, len(written), hashlib.sha256(written).hexdigest())


def publish(path: Path, index: Index) -> None:
    """Replace the index, in one step, and clear away what no index names any more."""
    write_file(path / INDEX, index.to_json(), force=True)
    sweep(path, index)


def sweep(path: Path, index: Index | None) -> None:
    """Remove shards that the index does not name, and what was being added; the lock is held.

    A build that was stopped is kept.
    """
    for folder in path.glob(f"{ADDING}*"):
        shutil.rmtree(folder, ignore_errors=True)
    named = index.files if index else {}
    for file in path.glob("*.safetensors"):
        if file.name not in named and file.name.startswith((CELL_SHARD, ADAPTER_SHARD)):
            with contextlib.suppress(OSError):  # what is left takes room and does no harm
                file.unlink()


def clear_build(path: Path) -> None:
    """Remove the build directory."""
    shutil.rmtree(path / BUILD, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a pack; the system lets go of it when the process ends, however it does.

    Raises
    ------
    FormatError
        If another process holds it, or the directory cannot be written.
    """
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        if not _lock(descriptor):
            raise FormatError(
                f"{path} is being written by another process; wait for it to end and try again"
            )
        yield
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def pack_bytes(index: Index) -> int:
    """Bytes of the files of a pack, the index included."""
    return len(index.to_json()) + sum(shard.bytes for shard in index.files.values())


def plain_names(names: Sequence[str]) -> None:
    """Refuse names of adapters that a pack does not take.

    Raises
    ------
    FormatError
        If a name is empty, holds what cannot be printed, or occurs twice.
    """
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name or not name.isprintable():
            raise FormatError(f"an adapter has the name {name!r}; expected printable characters")
        if name in names[:i]:
            raise FormatError(
                f"two adapters have the name {name!r}; rename one of their directories, or name "
                "them: NAME=ADAPTER"
            )
