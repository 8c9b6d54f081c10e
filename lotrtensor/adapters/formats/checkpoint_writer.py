"""Write a copy of a checkpoint with some tensors changed and every other byte kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lotrtensor.adapters.formats.checkpoint import SINGLE_NAME, WEIGHT_NAMES, Checkpoint
from lotrtensor.adapters.formats.directory import check_inputs_outside, expand
from lotrtensor.adapters.formats.header import damaged
from lotrtensor.adapters.formats.json_text import read_json
from lotrtensor.adapters.formats.paths import (
    children,
    exists,
    is_dir,
    is_file,
    open_regular,
    unreadable,
)
from lotrtensor.adapters.formats.publish import absolute, publish, scratch, sync, unwritable
from lotrtensor.errors import FormatError

_OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"}


def rewrite_checkpoint(
    source: Checkpoint,
    output: Path,
    keys: Iterable[str],
    change: Callable[[str], np.ndarray],
    *,
    force: bool,
) -> None:
    """Copy a checkpoint with some tensors changed, shard by shard, atomically.

    A changed tensor has the type and shape that it had, so that every header stays as it is and
    all other tensors, of whatever type, are copied byte by byte.

    Parameters
    ----------
    source : Checkpoint
        The checkpoint. The files beside its weights are copied as they are: configuration,
        tokenizer, the further modules of a sentence encoder; weights in other forms are not, for
        they would be those of the base.
    output : Path
        Directory to make.
    keys : iterable of str
        Names of the tensors that change.
    change : callable
        ``change(key)`` returns what is written for a tensor, in its type and shape.
    force : bool
        Replace a checkpoint directory that stands there.

    Raises
    ------
    FormatError
        If the output may not be replaced, or cannot be written; nothing has changed then.
    """
    check_checkpoint_output(output, force=force)
    check_inputs_outside(output, source.directory)
    output = absolute(expand(output))
    changed: dict[str, list[str]] = {stored.file: [] for stored in source.tensors.values()}
    for name in keys:
        changed[source.tensors[name].file].append(name)
    # A single file gets the name that is looked for in a directory.
    kept = WEIGHT_NAMES if source.single else changed
    shards = {shard: shard if shard in kept else SINGLE_NAME for shard in sorted(changed)}
    beside = _files_beside(source)
    check = partial(_check_own, names={*shards.values(), *beside})
    if force and exists(output):
        check(output)
    with scratch(output) as folder:
        fresh = folder / output.name
        try:
            fresh.mkdir()
            for name, path in beside.items():
                (fresh / name).parent.mkdir(exist_ok=True)
                _copy(path, fresh / name)
            for shard, name in shards.items():
                _rewrite_shard(source, shard, fresh / name, changed[shard], change)
            sync(fresh)
        except OSError as error:
            raise unwritable(output, error) from error
        publish(fresh, output, check, force=force)


def check_checkpoint_output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists and is not a checkpoint that ``force`` may replace.

    Raises
    ------
    FormatError
        Before any work is done.
    """
    path = expand(path)
    if not os.path.lexists(path) and not exists(path):
        return
    if not force:
        raise FormatError(f"{path} exists; choose another output or add --force to replace it")
    holds_weights = any(is_file(path / name) for name in WEIGHT_NAMES)
    if path.is_symlink() or not holds_weights:
        raise FormatError(f"{path} exists and is no checkpoint directory; it is not replaced")


def _check_own(path: Path, names: set[str]) -> None:
    """Refuse to replace a checkpoint that holds more than what is written, and weights."""
    check_checkpoint_output(path, force=True)
    for place in _below(path):
        name = str(place.relative_to(path))
        if name not in names and not _WEIGHTS.fullmatch(name):
            raise FormatError(
                f"{path} holds {name}, which would be deleted; move it away or choose another "
                "output"
            )


_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)[^/]*\.safetensors(\.index\.json)?")


def _below(directory: Path) -> Iterator[Path]:
    """All that a directory holds, links not followed."""
    for path in children(directory):
        if path.is_symlink() or not is_dir(path):
            yield path
        else:
            yield from _below(path)


def _files_beside(source: Checkpoint) -> dict[str, Path]:
    """Files that belong to the model and hold no weights, by their names in the output.

    None beside a file that was named alone. An index is copied where it is the one that was read:
    another would speak of weights that are not written. Of the subdirectories those are copied that
    hold further modules of a sentence encoder: a pooling, a dense layer.

    Raises
    ------
    FormatError
        If one is a link to somewhere else: that file would be given away with the model.
    """
    if source.single:
        return {}
    found = {
        path.name: path
        for path in children(source.directory)
        if path.suffix not in {".safetensors", *_OTHER_WEIGHTS}
        and (path.name == source.index or not path.name.endswith(".index.json"))
        and is_file(path)
    }
    for directory in _module_directories(source):
        _check_inside(directory, source.directory)
        inner = (path for path in _below(directory) if is_file(path) or path.is_symlink())
        found |= {str(path.relative_to(source.directory)): path for path in inner}
    for path in found.values():
        _check_inside(path, source.directory)
    return found


def _check_inside(path: Path, directory: Path) -> None:
    """Refuse what a link leads out of the checkpoint; into the blobs of its own cache it may.

    A hub's cache has them beside ``snapshots``, a cache of one model beside the model.
    """
    try:
        target, home = path.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
    caches = [home.parent]
    if home.parent.name == "snapshots":
        caches.append(home.parent.parent)
    cached = any(target.parent == (cache / "blobs").resolve() for cache in caches)
    if not (target.is_relative_to(home) or cached):
        raise FormatError(
            f"{path} is a link out of {directory}, whose content would go into the output; remove "
            "it, or put a copy in its place"
        )


def _module_directories(source: Checkpoint) -> list[Path]:
    """Subdirectories that hold further modules of a sentence encoder."""
    listing = source.directory / "modules.json"
    if not is_file(listing):
        return []
    modules = read_json(listing)
    try:
        names = [str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise FormatError(f"{listing} does not list modules and their paths: {error}") from error
    return [
        source.directory / name
        for name in names
        if name and Path(name).name == name and is_dir(source.directory / name)
    ]


def _copy(source: Path, target: Path) -> None:
    """Copy a regular file, its times and permissions."""
    with open_regular(source) as file, target.open("wb") as copied:
        shutil.copyfileobj(file, copied)
    shutil.copystat(source, target)


def _rewrite_shard(
    source: Checkpoint,
    shard: str,
    path: Path,
    keys: Iterable[str],
    change: Callable[[str], np.ndarray],
) -> None:
    with open_regular(source.directory / shard) as file, path.open("wb") as copied:
        shutil.copyfileobj(file, copied, 2**18)
    stops = [stored.stop for stored in source.tensors.values() if stored.file == shard]
    if path.stat().st_size < max(stops):
        raise damaged(source.directory / shard, "it has become shorter")
    with path.open("r+b") as file:
        for key in keys:
            file.seek(source.tensors[key].start)
            file.write(np.ascontiguousarray(change(key)).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
