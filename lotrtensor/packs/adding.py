"""More adapters for a pack that stands: each coded with its bases, or by itself."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lotrtensor.adapters.formats.compressed_record import rounded_up
from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.tensors import Tensors
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.core.bits.terms import slope
from lotrtensor.core.options import check_number
from lotrtensor.core.ranks.goal import make_goal
from lotrtensor.errors import FormatError, LotrError, OptionError, RankError
from lotrtensor.packs.coding import cells_by_module, member_to_tensors
from lotrtensor.packs.encoding import alone, norm_of, on_bases, settled
from lotrtensor.packs.executors import results
from lotrtensor.packs.files import (
    ADAPTER_SHARD,
    ADDING,
    Entry,
    Index,
    Shard,
    read_index,
    write_shard,
)
from lotrtensor.packs.members import Cell, Member, by_cluster
from lotrtensor.packs.reading import read_cells
from lotrtensor.packs.spool import Source, as_lora
from lotrtensor.packs.tasks import member_bytes
from lotrtensor.packs.trained import is_trained, mark_of, read_trained
from lotrtensor.verbs._compress import Form
from lotrtensor.verbs._fit_groups import Progress

LEAST = 0.5
"""Share of what the worst kept adapter of a pack keeps that a new one keeps at least, of ‖ΔW‖²: one
that keeps less is unlike all that the bases were made of."""


class Job(NamedTuple):
    """What holds for all adapters that are added together.

    ``folder``, in the pack, is where files are written; ``shapes`` are those of the modules that
    the pack knows; ``several`` says whether a refusal has to name the adapter.
    """

    path: str
    folder: str
    shapes: Mapping[str, tuple[int, int]]
    tolerance: float | None
    max_error: float | None
    several: bool


class NewMember(NamedTuple):
    """An adapter as it would be stored, its tensors, their bytes, and its relative error."""

    member: Member
    tensors: Tensors
    bytes: int
    error: float


class Added(NamedTuple):
    """A file that no index names yet, what the index will say, and shapes of the modules."""

    shard: Shard
    entry: Entry
    shapes: dict[str, tuple[int, int]]


def add_files(
    job: Job,
    adapters: Mapping[str, Source],
    index: Index,
    executor: Executor,
    progress: Progress | None = None,
) -> Index:
    """Write a file of each adapter, and return the index that names them, unpublished.

    No more than one adapter a worker is in memory, and no file is in the pack before all are there.

    Parameters
    ----------
    job : Job
        What holds for all; the pack is locked, and the folder is a `scratch`.
    adapters : mapping of str to path or adapter
        Adapters by name.
    index : Index
        The pack's index.
    executor : concurrent.futures.Executor
        What encodes them; it sees the directory.
    progress : callable, optional
        As for `lotrtensor.pack`.

    Raises
    ------
    FormatError, OptionError, RankError
        As for `lotrtensor.Pack.add_all`.
    """
    path, folder, names = Path(job.path), Path(job.folder), list(adapters)
    each = [(job, index.next + i, name, adapters[name]) for i, name in enumerate(names)]

    def tell(done: int) -> None:
        if progress:
            progress(names[done], done, len(names))

    found: list[Added] = results(executor, add_file, each, tell)
    known: dict[str, tuple[int, int]] = {}
    for name, added in zip(names, found, strict=True):
        with _named(name, several=job.several):
            check_shapes(name, added.shapes, known, "an adapter that is added with it")
        known |= added.shapes
    for added in found:
        (folder / added.shard.file).replace(path / added.shard.file)
    return replace(
        index,
        shards=(*index.shards, *(added.shard for added in found)),
        adapters={**index.adapters, **{n: a.entry for n, a in zip(names, found, strict=True)}},
        next=index.next + len(names),
    )


@contextlib.contextmanager
def _named(name: str, *, several: bool) -> Iterator[None]:
    """Begin a refusal with the adapter's name where there are several."""
    try:
        yield
    except LotrError as error:
        if not several:
            raise
        raise type(error)(f"{name}: {error}") from error


@contextlib.contextmanager
def scratch(path: Path, index: Index, cells: tuple[Cell, ...]) -> Iterator[str]:
    """A folder in a pack for files that are not yet part of it; its bases are known meanwhile.

    Of its own each time, and removed at the end: a worker that was given up may still write.

    Raises
    ------
    FormatError
        If the pack cannot be written.
    """
    try:
        folder = tempfile.mkdtemp(prefix=ADDING, dir=path)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error
    _KNOWN[str(path), mark_of(index)] = cells
    try:
        yield folder
    finally:
        _KNOWN.pop((str(path), mark_of(index)), None)
        shutil.rmtree(folder, ignore_errors=True)


_KNOWN: dict[tuple[str, str], tuple[Cell, ...]] = {}
"""Bases of packs by path and mark, which tells them from those before a refit."""


def _bases(path: str, index: Index) -> tuple[Cell, ...]:
    """Bases of a pack; a worker in another process reads those of a pack once, and keeps them."""
    key = path, mark_of(index)
    if key not in _KNOWN:
        _KNOWN.clear()
        _KNOWN[key] = read_cells(Path(path), index)
    return _KNOWN[key]


def add_file(job: Job, number: int, name: str, source: Source) -> Added:
    """Encode an adapter for a pack, and write it into a file; for any executor.

    Parameters
    ----------
    job : Job
        What holds for all.
    number : int
        Number of the adapter and of its file.
    name : str
        Its name.
    source : path or adapter
        The adapter.

    Raises
    ------
    FormatError, OptionError, RankError
        As for `lotrtensor.Pack.add_all`.
    """
    index = read_index(Path(job.path))
    with _named(name, several=job.several):
        new = encode_new(source, name, _bases(job.path, index), index, job)
        if job.max_error is not None or (job.tolerance or index.goal.get("tolerance")) is None:
            check_suited(name, new.error, index, job.max_error)
        prefixed = {f"{number}.{key}": tensor for key, tensor in new.tensors.items()}
        shard = write_shard(Path(job.folder), ADAPTER_SHARD, number, prefixed)
    uses_bases = bool(new.member.cores)
    entry = Entry(shard.file, number, new.error, None, new.bytes, uses_bases)
    return Added(shard, entry, _shapes(new.member))


def encode_new(
    source: Source, name: str, cells: Sequence[Cell], index: Index, job: Job
) -> NewMember:
    """Encode an adapter for a pack, in the cheaper of two ways.

    Parameters
    ----------
    source : path or adapter
        The adapter.
    name : str
        Its name.
    cells : sequence of Cell
        The pack's bases.
    index : Index
        The pack's index, whose goal holds where no tolerance is given.
    job : Job
        What holds for all.

    Raises
    ------
    FormatError
        If a module has another shape in the pack.
    """
    if is_trained(source):  # its codes are what the pack holds: nothing is lost
        return _new(read_trained(expand(source), cells, mark_of(index)), cells)
    lora = as_lora(source, name)
    check_shapes(name, {module.name: module.shape for module in lora.modules}, job.shapes)
    tolerance = index.goal.get("tolerance") if job.tolerance is None else job.tolerance
    step, norm = index.goal.get("step", 0.01), settled(norm_of(lora))
    form: Form = "auto" if index.share in ("auto", "layers") else "lora"
    found = []
    for own_cells in by_cluster(cells).values():
        used = _used(lora, cells_by_module(own_cells))
        if used:
            start = own_cells[0].basis.step if tolerance is not None else step
            private = tolerance is not None or "rank" not in index.goal
            member = on_bases(lora, used, norm, tolerance=tolerance, step=start, private=private)
            found.append(_new(member, cells))
    if not found or index.share == "auto":
        own = alone(lora, form, tolerance=tolerance, step=step * norm or 1.0)
        found.append(_new(own, ()))

    def cost(new: NewMember) -> float:
        return new.bytes + (0.0 if tolerance else new.error**2 / (8 * slope(step)))

    return min(found, key=cost)


def check_shapes(
    name: str,
    shapes: Mapping[str, tuple[int, int]],
    known: Mapping[str, tuple[int, int]],
    where: str = "the pack",
) -> None:
    """Refuse an adapter of which a module has another shape in the pack.

    Raises
    ------
    FormatError
        Naming the module.
    """
    for module, shape in shapes.items():
        there = known.get(module, shape)
        if there != shape:
            raise FormatError(
                f"{module} is {there[0]} × {there[1]} in {where} and {shape[0]} × "
                f"{shape[1]} in {name}; they belong to different base models"
            )


def check_options(adapters: object, tolerance: float | None, max_error: float | None) -> None:
    """Refuse what `lotrtensor.Pack.add_all` cannot take, before anything is read.

    Raises
    ------
    OptionError
        If the adapters are no mapping, or ``max_error`` is no finite number of at least 0.
    RankError
        If the tolerance is none.
    """
    if not isinstance(adapters, Mapping):
        raise OptionError(
            f"adapters is a {type(adapters).__name__}; expected adapters by their names"
        )
    if tolerance is not None:
        make_goal(None, tolerance, None, None)
    if max_error is not None:
        check_number(max_error, "max_error")


def check_suited(name: str, error: float, index: Index, max_error: float | None = None) -> None:
    """Refuse an adapter of which a pack would keep too little.

    A pack of a tolerance keeps that of every adapter. One that was made for a size or for a rank
    may lose much of an adapter that its bases were not made for.

    Parameters
    ----------
    name : str
        Its name.
    error : float
        Relative error of what would be stored.
    index : Index
        The pack's index.
    max_error : float or None
        Relative error that is accepted; if not given, that at which 1 - error² is half of what
        the worst kept one has of the adapters that the bases were made of.

    Raises
    ------
    RankError
        If the error is larger.
    """
    most = max_error
    if most is None:
        # Those that were added later have no mean error: what was let in by hand is no measure.
        packed = [entry for entry in index.adapters.values() if entry.mean_error is not None]
        worst = max((entry.relative_error for entry in packed), default=0.0)
        most = math.sqrt(1.0 - LEAST * max(1.0 - worst**2, 0.0))
    if error > most:
        reason = "max_error is" if max_error is not None else "without max_error it is at most"
        raise RankError(
            f"{name} would have a relative error of {error:.2g}; {reason} {most:.2g}: give a "
            "tolerance, or a larger max_error and refit the pack with its original"
        )


def _used(lora: LoraAdapter, cells: Mapping[str, Cell]) -> dict[str, Cell]:
    return {m.name: cells[m.name] for m in lora.modules if m.name in cells}


def _new(member: Member, cells: Sequence[Cell]) -> NewMember:
    tensors = member_to_tensors(member, cells)
    return NewMember(member, tensors, member_bytes(tensors), rounded_up(member.relative_error))


def _shapes(member: Member) -> dict[str, tuple[int, int]]:
    """Shapes of the modules of an adapter, all of which have private terms, of whatever number."""
    return {name: group.shape for group in member.own.groups for name in group.modules}
