"""Forms in bits, as predicted at every size: no file is made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lotrtensor.analysis.representations import Lotr
from lotrtensor.analysis.rows import AdapterPoint, Curve, CurvePoint, GroupPoint, Kind
from lotrtensor.core.bits.stack import Parts, StackInBits
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.squared_error import SquaredError, relative_errors
from lotrtensor.verbs._alternatives import PriceInBits, error_at, size_of, step_at
from lotrtensor.verbs._compression_job import CompressionJob

FORMS: dict[Kind, tuple[Parts, str]] = {
    Kind.COMPRESSED: ("both", "compressed"),
    Kind.TERMS_IN_BITS: ("private", "terms of single modules, in bits"),
    Kind.SHARED_IN_BITS: ("shared", "shared factors, in bits"),
}
"""What each form is made of, and what people call it."""


@dataclass(frozen=True, eq=False)
class InBits:
    """A form in bits: its sizes and errors on a row of grids, and what lies between them."""

    kind: Kind
    prices: Sequence[PriceInBits]

    @property
    def name(self) -> str:
        """What people call it."""
        return FORMS[self.kind][1]

    def within(self, size: int) -> CurvePoint | None:
        """The predicted error of a file of so many bytes."""
        error = error_at(self.prices, size)
        return None if error is None else CurvePoint(size, error)

    def reaching(self, tolerance: float) -> CurvePoint | None:
        """The predicted size of a file of that error."""
        size = size_of(self.prices, tolerance)
        return None if size is None else CurvePoint(math.ceil(size), tolerance)

    def curve(self) -> Curve:
        """One point a grid."""
        points = (CurvePoint(math.ceil(row.bytes), row.relative_error) for row in self.prices)
        return Curve(self.kind, self.name, tuple(points))


def forms_in_bits(job: CompressionJob) -> list[InBits]:
    """All three, priced together, up to the size of the adapter."""
    prices = job.prices(job.lora.bytes)
    return [InBits(kind, prices[parts]) for kind, (parts, _) in FORMS.items()]


def compressed_point(
    job: CompressionJob, prices: Sequence[PriceInBits], lotr: Lotr, size: int
) -> AdapterPoint | None:
    """The adapter in bits at a size, group by group and module by module.

    Where a group shares its factors, how its error spreads over the slices is that of the
    truncation in ``lotr``, whose groups are the same.
    """
    error, step = error_at(prices, size), step_at(prices, size)
    if error is None or step is None:
        return None
    stacks = [stack for _, stack in job.groups]
    pairs = zip(stacks, lotr.groups, strict=True)
    groups = tuple(_group_point(stack, step, reduced) for stack, reduced in pairs)
    return AdapterPoint(size, error, None, groups)


def _group_point(stack: StackInBits, step: float, reduced: ReducedStack) -> GroupPoint:
    found = stack.predict(step)
    terms, slices2 = 0, np.zeros(0)
    if min(found.ranks):
        slices2 = reduced.slices_truncated2([reduced.nearest(found.ranks)])[0]
        slices2 = slices2 + 1e-9 * stack.norm2  # where truncation loses nothing: evenly
        slices2 = slices2 * (found.lost2 / slices2.sum()) if slices2.sum() else slices2
    else:
        slices2, kept = stack.private_slices(step)
        terms = int(kept.sum())
    norms2 = np.array([np.sum(values**2) for values in stack.spectra])
    error = SquaredError(max(found.lost2, 0.0), stack.norm2).relative
    each = relative_errors(np.minimum(slices2, norms2), norms2)
    return GroupPoint(*found.ranks, terms, round(found.bits / 8), error, None, each)
