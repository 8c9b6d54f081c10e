"""Decompose groups of updates at one rank, or within one tolerance or size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lotrtensor.adapters.lotr_group import FitRecord, LotrGroup, store_group
from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import reduce_stack
from lotrtensor.core.fit.residual import error_norms2
from lotrtensor.core.ranks.allocation import allocate_parameters
from lotrtensor.core.ranks.curve import Frontier, pair_at
from lotrtensor.core.ranks.goal import Goal
from lotrtensor.core.ranks.tolerance import fit_within
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.threads import side_by_side
from lotrtensor.errors import LotrWarning
from lotrtensor.verbs._sources import SourceGroup

Progress = Callable[[str, int, int], None]
"""Called with a group's name, how many groups are done and how many there are."""

Pair = tuple[int, int]

WIDEST = 256
"""Directions a side that a size may choose from where slices are read on demand."""

NAMED = 3
"""Groups that a warning names; it counts the others."""


def fit_groups(
    sources: Sequence[SourceGroup],
    goal: Goal,
    dtype: np.dtype,
    progress: Progress | None = None,
) -> tuple[LotrGroup, ...]:
    """Decompose groups at one rank, or within one tolerance or size; see `convert`."""

    def reduced(number: int) -> GroupFit:
        source = sources[number]
        if progress:
            progress(source.name, number, len(sources))
        return GroupFit(source, _reduce(source, goal))

    numbers = range(len(sources))
    # What is read on demand is in memory one slice at a time.
    at_once = not any(source.lazy for source in sources)
    jobs = side_by_side(reduced, numbers) if at_once else list(map(reduced, numbers))
    return fit_reduced(jobs, goal, dtype)


def fit_reduced(jobs: Sequence[GroupFit], goal: Goal, dtype: np.dtype) -> tuple[LotrGroup, ...]:
    """Decompose groups that are reduced already.

    Raises
    ------
    RankError
        If the goal is out of reach.

    Warns
    -----
    LotrWarning
        If a fit stopped before it converged.
    """

    def store(pairs: Sequence[Pair]) -> tuple[tuple[LotrGroup, ...], float]:
        groups = tuple(job.store(pair, dtype) for job, pair in zip(jobs, pairs, strict=True))
        return groups, sum((g.fit.relative_error * g.fit.norm) ** 2 for g in groups if g.fit)

    if goal.rank is not None:
        p, q = goal.rank
        limits = [job.source.max_rank for job in jobs]
        groups, _ = store([(min(p, a), min(q, b)) for a, b in limits])
    elif goal.parameters is not None:
        chosen = allocate_parameters([job.curve for job in jobs], goal.parameters)
        groups, _ = store([pair_at(job.curve, i) for job, i in zip(jobs, chosen, strict=True)])
    else:
        norm2 = sum(job.reduced.norm2 for job in jobs)
        groups = fit_within(jobs, goal.tolerance or 0.0, norm2, dtype.name, store)
    open_ends = [
        group.name for job, group in zip(jobs, groups, strict=True) if not job.converged(group.rank)
    ]
    if open_ends:
        warn_unconverged("groups", open_ends, len(jobs))
    return groups


def warn_unconverged(kind: str, names: Sequence[str], total: int) -> None:
    """Warn once of all fits that stopped before they converged; the first are named."""
    more = ", …" if len(names) > NAMED else ""
    warnings.warn(
        f"{len(names)} of {total} {kind} did not converge ({', '.join(names[:NAMED])}{more}); "
        "errors are exact for the factors found, which more passes may improve",
        LotrWarning,
        stacklevel=4,
    )


def _reduce(source: SourceGroup, goal: Goal) -> ReducedStack:
    """Reduce a group to its small problem, as wide as the goal can need."""
    rank = goal.rank
    if goal.parameters is not None and source.lazy:
        rank = (WIDEST, WIDEST)
    stack = source.make()
    reduction = reduce_stack(stack, rank, tolerance=goal.tolerance or 0.0)
    reduced = ReducedStack(stack, reduction, slice_ranks=source.slice_ranks)
    if not source.held:
        reduced.drop_slices()
    return reduced


@dataclass(frozen=True, eq=False)
class GroupFit:
    """A group to be decomposed: its source and its reduced stack.

    A group that is in LoTR form already is kept as it is at its own ranks.
    """

    source: SourceGroup
    reduced: ReducedStack

    @cached_property
    def curve(self) -> Frontier:
        """The curve; a group that is kept is its last point, and nothing larger is on it."""
        curve, kept, size = self.reduced.curve, self.source.kept, self.source.parameters
        if kept is None:
            return curve
        smaller = curve.parameters < size
        ranks, parameters = curve.ranks[smaller], curve.parameters[smaller]
        error2 = curve.error2[smaller]
        if not error2.size or error2[-1] > 0.0:
            ranks = np.concatenate([ranks, [kept.rank]])
            parameters, error2 = np.append(parameters, size), np.append(error2, 0.0)
        return Frontier(ranks, parameters, error2, curve.norm2)

    @property
    def full(self) -> Pair:
        """The ranks of the smallest error in reach."""
        return self.source.kept.rank if self.source.kept else self.reduced.full

    def lower_bounds2(self) -> np.ndarray:
        """Squared error that no decomposition goes below, at every point of the curve."""
        bounds2 = np.zeros(len(self.curve.error2))  # the last one's, where the group is kept
        own2 = self.reduced.lower_bounds2()[: len(bounds2)]
        bounds2[: len(own2)] = own2
        return bounds2

    def error2(self, pair: Pair) -> float:
        """Squared error at ``pair``, refined."""
        return 0.0 if self.keeps(pair) else self.reduced.error2(self.reduced.nearest(pair))

    def keeps(self, pair: Pair) -> bool:
        """Whether the group is at ``pair`` as it was."""
        return self.source.kept is not None and pair == self.source.kept.rank

    def converged(self, pair: Pair) -> bool:
        """Whether the iterations that lead to ``pair`` met their stopping rules."""
        return self.keeps(pair) or self.reduced.converged(self.reduced.nearest(pair))

    def store(self, pair: Pair, dtype: np.dtype) -> LotrGroup:
        """Decompose at ``pair``, round to ``dtype``, and measure what is stored."""
        source = self.source
        norm = math.sqrt(self.reduced.norm2)
        if source.kept and self.keeps(pair):
            record = FitRecord(0.0, 0.0, norm, source.parameters, source.bytes)
            return replace(source.kept, fit=record)
        # Stored factors may have more columns than there are directions.
        pair = self.reduced.nearest(pair)
        stored = store_group(
            self.reduced.tucker2(pair, self.reduced.dtype),
            name=source.name,
            modules=source.modules,
            slice_ranks=source.slice_ranks or (min(pair),) * len(source.modules),
            dtype=dtype,
            embedding=source.embedding,
        )
        error2 = float(to_numpy(error_norms2(source.make(), stored.tucker2())).sum())
        lost = SquaredError(error2, self.reduced.norm2)
        bound = SquaredError(self.reduced.lower_bound2(pair), self.reduced.norm2)
        record = FitRecord(
            relative_error=lost.relative,
            # A bound that rounding has put above an error that was reached is that error.
            lower_bound=min(bound.relative, lost.relative),
            norm=norm,
            parameters=source.parameters,
            bytes=source.bytes,
        )
        return replace(stored, fit=record)
