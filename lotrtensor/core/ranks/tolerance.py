"""The search for the smallest ranks within a tolerance that several groups share.

The curve of a group holds the errors of truncated HOSVDs, which HOOI lowers. So the search
allocates ranks by estimates of the refined errors, solves at these ranks, corrects the estimates
by the errors found there, and ends when nothing new is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from lotrtensor.core.ranks.allocation import allocate_error
from lotrtensor.core.ranks.curve import Frontier, pair_at
from lotrtensor.core.ranks.pareto import undominated
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.errors import RankError

Fit = TypeVar("Fit")
Pair = tuple[int, int]

ROUNDS = 8
"""Rounds of the search at most; on trained adapters nothing new was allocated after 3 to 6."""


TRIES = 6
"""Smaller points tried at the end: of neighbours on a curve, one may refine far better than another
whose ranks are less even. One try left 3 of 24 fits of the bundled adapter 3 to 4% larger than six.
"""


class Solvable(Protocol):
    """A group whose ranks are open: a curve, and the refined error at any point of it."""

    @property
    def curve(self) -> Frontier:
        """Efficient rank pairs, with errors that refinement does not exceed."""

    @property
    def full(self) -> Pair:
        """The ranks of the smallest error in reach."""

    def lower_bounds2(self) -> np.ndarray:
        """Squared error that no decomposition goes below, at every point of the curve."""

    def error2(self, pair: Pair) -> float:
        """Squared error at ``pair``, refined."""


def fit_within(
    groups: Sequence[Solvable],
    tolerance: float,
    norm2: float,
    dtype: Any,
    store: Callable[[list[Pair]], tuple[Fit, float]],
) -> Fit:
    """Return the smallest fit found whose error, as stored, is within a tolerance.

    Parameters
    ----------
    groups : sequence of Solvable
        Groups that share the tolerance.
    tolerance : float
        Relative error over all of them that is not exceeded.
    norm2 : float
        Squared norm of all groups.
    dtype : dtype
        Type of what is stored, for the message.
    store : callable
        ``store(pairs)`` returns the groups at these ranks as stored, and their squared error.

    Raises
    ------
    RankError
        If even full ranks exceed the tolerance once they are stored.
    """
    searches = [_Search(group) for group in groups]
    full = [group.full for group in groups]

    def attempt(target2: float) -> tuple[Fit, float, float, bool]:
        pairs = _pairs_within(searches, target2) or full
        fitted2 = sum(g.error2(pair) for g, pair in zip(groups, pairs, strict=True))
        fit, stored2 = store(pairs)
        return fit, fitted2, stored2, pairs == full

    return settle(tolerance, norm2, dtype, attempt)


class _Search:
    """A group's curve and the refined errors found so far along it."""

    def __init__(self, group: Solvable) -> None:
        self.group, self.curve = group, group.curve
        self.bounds2 = np.minimum(group.lower_bounds2(), self.curve.error2)
        self.known2: dict[int, float] = {}

    def pair(self, point: int) -> Pair:
        return pair_at(self.curve, point)

    def solve(self, point: int) -> float:
        """Squared error at a point, refined, from now on known."""
        if point not in self.known2:
            self.known2[point] = self.group.error2(self.pair(point))
        return self.known2[point]

    def estimates2(self) -> np.ndarray:
        """Refined squared errors along the curve: known, or in proportion to the nearest known."""
        estimates = self.curve.error2.copy()
        if self.known2:
            points = np.array(sorted(self.known2))
            found = np.array([self.known2[i] for i in points.tolist()])
            priced = self.curve.error2[points]
            ratios = np.divide(found, priced, out=np.ones(len(points)), where=priced > 0)
            sizes = np.log(self.curve.parameters)
            estimates *= np.interp(sizes, sizes[points], ratios)
            estimates = np.maximum(estimates, self.bounds2)
            estimates[points] = found
        return estimates

    def estimated(self) -> tuple[Frontier, np.ndarray]:
        """The efficient points by their estimates, and where they are on the curve."""
        estimates = self.estimates2()
        kept = undominated(self.curve.parameters, estimates)
        ranks, parameters = self.curve.ranks[kept], self.curve.parameters[kept]
        return Frontier(ranks, parameters, estimates[kept], self.curve.norm2), kept


def _pairs_within(searches: Sequence[_Search], limit2: float) -> list[Pair] | None:
    """Rank pairs of the fewest parameters found for one squared error; None if out of reach."""
    best: tuple[int, list[int]] | None = None
    for _ in range(ROUNDS):
        curves, kept = zip(*(search.estimated() for search in searches), strict=True)
        if sum(float(curve.error2[-1]) for curve in curves) > limit2:
            break
        chosen = [int(k[i]) for k, i in zip(kept, allocate_error(curves, limit2), strict=True)]
        if best and all(i in s.known2 for s, i in zip(searches, chosen, strict=True)):
            break
        lost2 = sum(search.solve(i) for search, i in zip(searches, chosen, strict=True))
        size = sum(int(s.curve.parameters[i]) for s, i in zip(searches, chosen, strict=True))
        # The first round always counts: HOOI is never worse than the HOSVD that met the limit, but
        # an error that equals it may be summed to a last digit more. What is stored decides.
        if best is None or (lost2 <= limit2 and size < best[0]):
            best = size, chosen
    if best is None:
        return None
    points = _lowered(searches, best[1], limit2)
    return [search.pair(point) for search, point in zip(searches, points, strict=True)]


def _lowered(searches: Sequence[_Search], points: list[int], limit2: float) -> list[int]:
    """Lower one group at a time while the limit holds: estimates may be too high."""
    while True:
        found = _step_down(searches, points, limit2)
        if found is None:
            return points
        points = found


def _step_down(searches: Sequence[_Search], points: list[int], limit2: float) -> list[int] | None:
    """Lower one group, trying the `TRIES` with the lowest estimates; None if none holds."""
    lost2 = sum(search.solve(i) for search, i in zip(searches, points, strict=True))
    steps = []
    for g, (search, point) in enumerate(zip(searches, points, strict=True)):
        others2 = lost2 - search.solve(point)
        possible = np.nonzero(others2 + search.bounds2[:point] <= limit2)[0]
        estimates = others2 + search.estimates2()[possible]
        steps += [(e, g, i) for e, i in zip(estimates.tolist(), possible.tolist(), strict=True)]
    for _, g, point in sorted(steps)[:TRIES]:
        lower = [*points[:g], point, *points[g + 1 :]]
        if sum(search.solve(i) for search, i in zip(searches, lower, strict=True)) <= limit2:
            return lower
    return None


def settle(
    tolerance: float,
    norm2: float,
    dtype: Any,
    attempt: Callable[[float], tuple[Fit, float, float, bool]],
) -> Fit:
    """Return the first fit whose relative error as stored is at most ``tolerance``.

    Rounding to the stored type takes a share of the tolerance; the ranks must leave room for it.

    Parameters
    ----------
    tolerance : float
        Relative error that is not exceeded.
    norm2 : float
        Squared norm that it refers to.
    dtype : dtype
        Type of what is stored, for the message.
    attempt : callable
        ``attempt(target2)`` fits within the squared error ``target2``, at full ranks where that is
        out of reach, and returns the fit, its squared error before and after rounding, and
        whether its ranks are full.

    Raises
    ------
    RankError
        If even full ranks exceed the tolerance once they are stored.
    """
    limit2 = target2 = tolerance**2 * norm2
    while True:
        fit, fitted2, stored2, full = attempt(target2)
        if stored2 <= limit2:
            return fit
        if full:
            raise RankError(
                f"tolerance is {tolerance}; the smallest error in reach is "
                f"{SquaredError(stored2, norm2).relative:.3g} as stored in "
                f"{getattr(dtype, '__name__', dtype)}: choose a wider dtype or a larger tolerance"
            )
        # Rounding will cost about as much at the next ranks; lower the target in any case.
        target2 = max(0.0, min(limit2 - (stored2 - fitted2), 0.8 * fitted2))
