"""Groups of updates at one rank, or within one tolerance or budget: the engine of the verbs."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lotrtensor.adapters.modules import FitRecord, LotrGroup, store_group
from lotrtensor.adapters.sizes import budget_parameters
from lotrtensor.core.fit.frontier import frontier
from lotrtensor.core.fit.goal import Goal, Rank, check_goal
from lotrtensor.core.fit.problem import Problem
from lotrtensor.core.fit.reduction import reduce_stack
from lotrtensor.core.fit.solve import Solution
from lotrtensor.core.ranks.allocation import allocate_budget, allocate_tolerance
from lotrtensor.core.ranks.curve import Frontier, pair_at
from lotrtensor.core.ranks.tolerance import settle
from lotrtensor.errors import LotrWarning, RankError
from lotrtensor.verbs._sources import SourceGroup

Progress = Callable[[str, int, int], None]
"""Called with a group's name, how many groups are done and how many there are."""


WIDEST = 256
"""Directions a side that a budget may choose from where slices are read on demand."""


NAMED = 3
"""Groups that a warning names; it counts the others."""


CALIBRATIONS = 4
"""Rounds in which the curves learn how far HOOI is below the HOSVD that priced them."""


def fit_groups(
    sources: Sequence[SourceGroup],
    *,
    rank: Rank | None,
    tolerance: float | None,
    energy: float | None,
    budget: int | str | None,
    dtype: np.dtype,
    progress: Progress | None = None,
) -> tuple[LotrGroup, ...]:
    """Decompose groups at one rank, or within one tolerance or budget; see `convert`."""
    parameters = None
    if budget is not None:
        whole = sum(source.bytes for source in sources)
        smallest = sum(source.smallest for source in sources)
        parameters = budget_parameters(budget, dtype.itemsize, whole, smallest)
    limits = [source.max_rank for source in sources]
    largest = max(p for p, _ in limits), max(q for _, q in limits)
    goal = check_goal(rank, tolerance, energy, parameters, (sys.maxsize, sys.maxsize))
    # One number stands for both sides, of which a group may need less on one.
    limit = largest if isinstance(rank, Sequence) else (max(largest), max(largest))
    if goal.rank and (goal.rank[0] > limit[0] or goal.rank[1] > limit[1]):
        raise RankError(
            f"rank is {rank}; no group needs more than (p, q) = {largest}: choose no more than that"
        )
    jobs = []
    for done, source in enumerate(sources):
        if progress:
            progress(source.name, done, len(sources))
        jobs.append(_start(source, goal))
    if goal.tolerance is not None:
        groups = _within(jobs, goal.tolerance, dtype)
    else:
        if goal.budget is not None:
            chosen = allocate_budget([job.curve for job in jobs], goal.budget)
            pairs = [pair_at(job.curve, i) for job, i in zip(jobs, chosen, strict=True)]
        else:
            p, q = goal.rank or largest
            pairs = [(min(p, a), min(q, b)) for a, b in limits]
        groups = tuple(job.store(pair, dtype) for job, pair in zip(jobs, pairs, strict=True))
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


@dataclass(frozen=True, eq=False)
class _Job:
    """A group on its way: its small problem and its rate–distortion curve.

    At the ranks of a group that is in LoTR form already it is kept as it is.
    """

    source: SourceGroup
    problem: Problem
    curve: Frontier
    solutions: dict[tuple[int, int], Solution] = field(default_factory=dict)

    @property
    def full(self) -> tuple[int, int]:
        """The ranks of the smallest error in reach."""
        return self.source.kept.rank if self.source.kept else pair_at(self.curve, -1)

    def keeps(self, pair: tuple[int, int]) -> bool:
        """Whether the group is at ``pair`` as it was."""
        return self.source.kept is not None and pair == self.source.kept.rank

    def solve(self, pair: tuple[int, int]) -> Solution:
        """Decompose at ``pair``, once."""
        p, q = self.source.stack.max_rank
        pair = min(pair[0], p), min(pair[1], q)
        if pair not in self.solutions:
            self.solutions[pair] = self.problem.solve(pair)
        return self.solutions[pair]

    def error2(self, pair: tuple[int, int]) -> float:
        """Squared error at ``pair``, refined."""
        return 0.0 if self.keeps(pair) else self.problem.error2(self.solve(pair))

    def converged(self, pair: tuple[int, int]) -> bool:
        """Whether the iterations that lead to ``pair`` met their stopping rules."""
        return self.keeps(pair) or (self.problem.reduction.converged and self.solve(pair).converged)

    def store(self, pair: tuple[int, int], dtype: np.dtype) -> LotrGroup:
        """Decompose at ``pair``, round to ``dtype``, and measure what is stored."""
        source = self.source
        norm = math.sqrt(self.problem.reduction.norm2)
        if source.kept and self.keeps(pair):
            record = FitRecord(0.0, 0.0, norm, source.parameters, source.bytes)
            return replace(source.kept, fit=record)
        fit = self.problem.finish(self.solve(pair))
        stored = store_group(
            source.expand(fit.tucker2),
            name=source.name,
            modules=source.modules,
            slice_ranks=source.slice_ranks or (min(pair),) * len(source.modules),
            dtype=dtype,
            embedding=source.embedding,
        )
        relative_error = fit.relative_error
        if source.slice_ranks is not None or dtype != self.problem.dtype:
            relative_error = source.relative_error(stored.tucker2())
        record = FitRecord(
            relative_error=relative_error,
            lower_bound=min(fit.lower_bound, relative_error),
            norm=norm,
            parameters=source.parameters,
            bytes=source.bytes,
        )
        return replace(stored, fit=record)


def _start(source: SourceGroup, goal: Goal) -> _Job:
    """Reduce a group to its small problem, as wide as the goal can need."""
    stack, rank = source.stack, goal.rank
    if rank is None and goal.budget is not None and stack.lazy:
        rank = (WIDEST, WIDEST)
    if rank is not None:
        p, q = stack.max_rank
        rank = (min(rank[0], p), min(rank[1], q))
    reduction = reduce_stack(stack, rank, method="auto", tolerance=goal.tolerance or 0.0)
    problem = Problem(stack, None, reduction, stack.dtype)
    curve = frontier(
        reduction.small,
        problem.full,
        source.shape,
        lost2=reduction.lost2,
        slice_ranks=source.slice_ranks,
    )
    return _Job(source, problem, _with_kept(curve, source))


def _with_kept(curve: Frontier, source: SourceGroup) -> Frontier:
    """The curve with the group as it is for its last point, and without any larger one."""
    if source.kept is None:
        return curve
    smaller = curve.parameters < source.parameters
    ranks, parameters, error2 = (
        curve.ranks[smaller],
        curve.parameters[smaller],
        curve.error2[smaller],
    )
    if not error2.size or error2[-1] > 0.0:
        ranks = np.concatenate([ranks, [source.kept.rank]])
        parameters = np.append(parameters, source.parameters)
        error2 = np.append(error2, 0.0)
    return Frontier(ranks, parameters, error2, curve.norm2)


def _within(jobs: list[_Job], tolerance: float, dtype: np.dtype) -> tuple[LotrGroup, ...]:
    """Groups of few parameters whose error as stored is at most ``tolerance`` over all of them."""
    norm2 = sum(job.problem.reduction.norm2 for job in jobs)
    reachable2 = sum(float(job.curve.error2[-1]) for job in jobs)
    full = [job.full for job in jobs]

    def attempt(target2: float) -> tuple[tuple[LotrGroup, ...], float, float, bool]:
        pairs = full
        if target2 > reachable2:
            pairs = _share_out(jobs, math.sqrt(target2 / norm2))
        groups = tuple(job.store(pair, dtype) for job, pair in zip(jobs, pairs, strict=True))
        fitted2 = sum(job.error2(pair) for job, pair in zip(jobs, pairs, strict=True))
        stored2 = sum((g.fit.relative_error * g.fit.norm) ** 2 for g in groups if g.fit)
        return groups, fitted2, stored2, pairs == full

    return settle(tolerance, norm2, dtype.name, attempt)


def _share_out(jobs: list[_Job], tolerance: float) -> list[tuple[int, int]]:
    """Rank pairs of the fewest parameters found for one tolerance over all groups.

    The curves price truncated HOSVDs; HOOI is better. Each round scales a group's curve by how
    much better it was where it was tried, and shares the tolerance out anew.
    """
    limit2 = tolerance**2 * sum(job.problem.reduction.norm2 for job in jobs)
    curves = [job.curve for job in jobs]
    held: dict[int, list[tuple[int, int]]] = {}
    for _ in range(CALIBRATIONS):
        chosen = allocate_tolerance(curves, tolerance)
        pairs = [pair_at(curve, i) for curve, i in zip(curves, chosen, strict=True)]
        errors2 = [job.error2(pair) for job, pair in zip(jobs, pairs, strict=True)]
        price = sum(int(curve.parameters[i]) for curve, i in zip(curves, chosen, strict=True))
        # The first round always counts: HOOI is never worse than the HOSVD that met the tolerance,
        # but an error that equals it may be summed to a last digit more. What is stored decides.
        if not held or sum(errors2) <= limit2:
            held[price] = pairs
        curves = [
            _calibrated(job.curve, i, e) for job, i, e in zip(jobs, chosen, errors2, strict=True)
        ]
    return held[min(held)]


def _calibrated(curve: Frontier, index: int, error2: float) -> Frontier:
    """Return the curve scaled so that it passes through ``error2`` at ``index``."""
    priced = float(curve.error2[index])
    return curve._replace(error2=curve.error2 * (error2 / priced if priced else 1.0))
