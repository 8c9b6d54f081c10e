"""One more adapter for a pack that stands: coded with its bases, or by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lotrtensor.adapters.formats.compressed_record import rounded_up
from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.tensors import Tensors
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.core.bits.terms import slope
from lotrtensor.core.ranks.goal import make_goal
from lotrtensor.errors import FormatError
from lotrtensor.packs.coding import cells_by_module, member_to_tensors
from lotrtensor.packs.encoding import alone, norm_of, on_bases, settled
from lotrtensor.packs.files import Index
from lotrtensor.packs.members import Cell, Member, by_cluster
from lotrtensor.packs.spool import Source, as_lora
from lotrtensor.packs.tasks import member_bytes
from lotrtensor.packs.trained import is_trained, mark_of, read_trained
from lotrtensor.verbs._compress import Form


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
    shapes: Mapping[str, tuple[int, int]],
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
        Shapes of modules that are known.
    tolerance : float or None
        Relative error that is not exceeded.

    Raises
    ------
    FormatError
        If a module has another shape in the pack.
    """
    if tolerance is not None:
        make_goal(None, tolerance, None, None)
    if is_trained(source):  # its codes are what the pack holds: nothing is lost
        member = read_trained(expand(source), cells, mark_of(index))
        return _new(member, cells, uses_bases=True)
    lora = as_lora(source, name)
    for module in lora.modules:
        known = shapes.get(module.name, module.shape)
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


def _used(lora: LoraAdapter, cells: Mapping[str, Cell]) -> dict[str, Cell]:
    return {m.name: cells[m.name] for m in lora.modules if m.name in cells}


def _new(member: Member, cells: Sequence[Cell], *, uses_bases: bool) -> NewMember:
    tensors = member_to_tensors(member, cells)
    error = rounded_up(member.relative_error)
    return NewMember(tensors, member_bytes(tensors), error, uses_bases)
