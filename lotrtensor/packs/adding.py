"""More adapters for a pack that stands: each coded with its bases, or by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import lru_cache
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
    Entry,
    Index,
    Shard,
    read_index,
    sweep,
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

    ``shapes`` are those of the modules that the pack knows, ``several`` says whether a refusal has
    to name the adapter.
    """

    path: str
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

    No more than one adapter a worker is in memory. Where one is refused, no file is left.

    Parameters
    ----------
    job : Job
        What holds for all; the pack is locked.
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
    names = list(adapters)
    each = [(job, index.next + i, name, adapters[name]) for i, name in enumerate(names)]

    def tell(done: int) -> None:
        if progress:
            progress(names[done], done, len(names))

    path = Path(job.path)
    try:
        _bases(job.path, mark_of(index))  # once, before threads ask for them side by side
        found: list[Added] = results(executor, add_file, each, tell)
        known = dict(job.shapes)
        for name, added in zip(names, found, strict=True):
            check_shapes(name, added.shapes, known)
            known |= added.shapes
    except BaseException:
        sweep(path, index)
        raise
    finally:
        _bases.cache_clear()
    return replace(
        index,
        shards=(*index.shards, *(added.shard for added in found)),
        adapters={**index.adapters, **{n: a.entry for n, a in zip(names, found, strict=True)}},
        next=index.next + len(names),
    )


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
    path = Path(job.path)
    try:
        index = read_index(path)
        new = encode_new(source, name, _bases(job.path, mark_of(index)), index, job)
        if job.max_error is not None or (job.tolerance or index.goal.get("tolerance")) is None:
            check_suited(name, new.error, index, job.max_error)
        prefixed = {f"{number}.{key}": tensor for key, tensor in new.tensors.items()}
        shard = write_shard(path, ADAPTER_SHARD, number, prefixed)
    except LotrError as error:
        if not job.several:
            raise
        raise type(error)(f"{name}: {error}") from error
    uses_bases = bool(new.member.cores)
    entry = Entry(shard.file, number, new.error, None, new.bytes, uses_bases)
    return Added(shard, entry, _shapes(new.member))


@lru_cache(maxsize=1)
def _bases(path: str, mark: str) -> tuple[Cell, ...]:
    """Bases of a pack, read once by a worker; ``mark`` tells them from those before a refit."""
    return read_cells(Path(path), read_index(Path(path)))


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
    name: str, shapes: Mapping[str, tuple[int, int]], known: Mapping[str, tuple[int, int]]
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
                f"{module} is {there[0]} × {there[1]} in the pack and {shape[0]} × "
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
