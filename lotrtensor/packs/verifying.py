"""An adapter of a pack beside its original."""

from __future__ import annotations

from typing import NamedTuple

from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.packs.members import Member
from lotrtensor.verbs._compare import ModuleDifference, compare, lora_factors


class VerifiedRow(NamedTuple):
    """An adapter of a pack beside the original: measured error, that of the mean alone, bytes.

    ``mean_error`` is measured on the mean that the bases hold, U Ḡ Vᵀ; None where the adapter does
    not use it. ``modules`` has the error of every module.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> lt.VerifiedRow("a", 0.1, 0.4, 900, 8000).mean_error
    0.4
    """

    name: str
    relative_error: float
    mean_error: float | None
    bytes: int
    source_bytes: int
    modules: tuple[ModuleDifference, ...] = ()


def verified(name: str, member: Member, size: int, original: Adapter) -> VerifiedRow:
    """Measure what is stored of an adapter, in ``size`` bytes, against the original.

    Raises
    ------
    FormatError
        If the original is of another base model.
    """
    source = original if isinstance(original, LoraAdapter) else original.to_lora()
    found = compare(source, LoraAdapter(member.updates(), {}, source.dtype))
    mean = _mean_error(source, member) if member.cores and member.weight else None
    return VerifiedRow(name, found.relative_error, mean, size, source.bytes, found.modules)


def _mean_error(source: LoraAdapter, member: Member) -> float:
    """Relative error of the mean alone; modules without a basis count as lost."""
    whole = SquaredError()
    for name, stack in lora_factors(source).items():
        norm2 = float(stack.norms2()[0])
        lost2 = norm2
        if name in member.cells:
            basis = member.cells[name].basis
            b, a = basis.slice_factors(member.weight * basis.mean_core)
            lost2 = float((stack - LowRankStack.of_constants([b], [a])).norms2()[0])
        whole += SquaredError(lost2, norm2)
    return whole.relative
