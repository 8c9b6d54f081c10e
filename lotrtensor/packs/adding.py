"""One more adapter for a pack that stands: coded with its bases, or by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
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
from lotrtensor.packs.files import ADAPTER_SHARD, Entry, Index, write_shard
from lotrtensor.packs.members import Cell, Member, by_cluster
from lotrtensor.packs.spool import Source, as_lora
from lotrtensor.packs.tasks import member_bytes
from lotrtensor.packs.trained import is_trained, mark_of, read_trained
from lotrtensor.verbs._compress import Form
from lotrtensor.verbs._fit_groups import Progress

LEAST = 0.5
"""Share of what the worst kept adapter of a pack keeps that a new one keeps at least, of ‖ΔW‖²: one
that keeps less is unlike all that the bases were made of."""


class NewMember(NamedTuple):
    """An adapter as tensors of a shard: their bytes, its error, whether it uses the bases."""

    tensors: Tensors
    bytes: int
    error: float
    uses_bases: bool


def encode_new(
    source: Source,
    name: str,
    cells: Sequence[Cell],
    index: Index,
    shapes: MutableMapping[str, tuple[int, int]],
    tolerance: float | None,
) -> NewMember:
    """Encode an adapter for a pack.

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
    shapes : mapping of str to (int, int)
        Shapes of modules that are known; those of this adapter are added.
    tolerance : float or None
        Relative error that is not exceeded.

    Raises
    ------
    FormatError
        If a module has another shape in the pack.
    """
    if is_trained(source):  # its codes are what the pack holds: nothing is lost
        member = read_trained(expand(source), cells, mark_of(index))
        return _new(member, cells, uses_bases=True)
    lora = as_lora(source, name)
    for module in lora.modules:
        known = shapes.setdefault(module.name, module.shape)
        if known != module.shape:
            raise FormatError(
                f"{module.name} is {known[0]} × {known[1]} in the pack and {module.shape[0]} × "
                f"{module.shape[1]} in {name}; they belong to different base models"
            )
    if tolerance is None:
        tolerance = index.goal.get("tolerance")
    step, norm = index.goal.get("step", 0.01), settled(norm_of(lora))
    form: Form = "auto" if index.share in ("auto", "layers") else "lora"
    found = []
    for own_cells in by_cluster(cells).values():
        used = _used(lora, cells_by_module(own_cells))
        if used:
            start = own_cells[0].basis.step if tolerance is not None else step
            private = tolerance is not None or "rank" not in index.goal
            member = on_bases(lora, used, norm, tolerance=tolerance, step=start, private=private)
            found.append(_new(member, cells, uses_bases=True))
    if not found or index.share == "auto":
        own = alone(lora, form, tolerance=tolerance, step=step * norm or 1.0)
        found.append(_new(own, (), uses_bases=False))

    def cost(new: NewMember) -> float:
        return new.bytes + (0.0 if tolerance else new.error**2 / (8 * slope(step)))

    return min(found, key=cost)


def encode_all(
    adapters: Mapping[str, Source],
    cells: Sequence[Cell],
    index: Index,
    shapes: MutableMapping[str, tuple[int, int]],
    *,
    tolerance: float | None,
    max_error: float | None,
    progress: Progress | None,
) -> dict[str, NewMember]:
    """Encode adapters that are to be added together; see `encode_new` and `check_suited`.

    Raises
    ------
    FormatError, OptionError, RankError
        As for one; of several adapters, the sentence begins with the name of the one.
    """
    found = {}
    for done, (name, adapter) in enumerate(adapters.items()):
        if progress:
            progress(name, done, len(adapters))
        try:
            new = encode_new(adapter, name, cells, index, shapes, tolerance)
            if max_error is not None or (tolerance or index.goal.get("tolerance")) is None:
                check_suited(name, new, index, max_error)
        except LotrError as error:
            if len(adapters) == 1:
                raise
            raise type(error)(f"{name}: {error}") from error
        found[name] = new
    return found


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


def check_suited(name: str, new: NewMember, index: Index, max_error: float | None = None) -> None:
    """Refuse an adapter of which a pack would keep too little.

    A pack of a tolerance keeps that of every adapter. One that was made for a size or for a rank
    may lose much of an adapter that its bases were not made for.

    Parameters
    ----------
    name : str
        Its name.
    new : NewMember
        What would be stored.
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
    if new.error > most:
        reason = "max_error is" if max_error is not None else "without max_error it is at most"
        raise RankError(
            f"{name} would have a relative error of {new.error:.2g}; {reason} {most:.2g}: give a "
            "tolerance, or a larger max_error and refit the pack with its original"
        )


def with_members(path: Path, index: Index, new: Mapping[str, NewMember]) -> Index:
    """Write a shard for each new member, and return the index that names them, unpublished.

    Parameters
    ----------
    path : Path
        The directory of the pack, locked.
    index : Index
        Its index.
    new : mapping of str to NewMember
        What to add, by name.
    """
    shards, adapters, number = list(index.shards), dict(index.adapters), index.next
    for name, own in new.items():
        prefixed = {f"{number}.{key}": tensor for key, tensor in own.tensors.items()}
        shards.append(write_shard(path, ADAPTER_SHARD, number, prefixed))
        entry = Entry(shards[-1].file, number, own.error, None, own.bytes, own.uses_bases)
        adapters[name] = entry
        number += 1
    return replace(index, shards=tuple(shards), adapters=adapters, next=number)


def _used(lora: LoraAdapter, cells: Mapping[str, Cell]) -> dict[str, Cell]:
    return {m.name: cells[m.name] for m in lora.modules if m.name in cells}


def _new(member: Member, cells: Sequence[Cell], *, uses_bases: bool) -> NewMember:
    tensors = member_to_tensors(member, cells)
    error = rounded_up(member.relative_error)
    return NewMember(tensors, member_bytes(tensors), error, uses_bases)
