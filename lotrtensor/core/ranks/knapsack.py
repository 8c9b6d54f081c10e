"""One limit shared by several groups: the multiple-choice knapsack problem, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lotrtensor.core.ranks.pareto import hull_steps, undominated

STATES = 2**12
"""Most partial choices kept; if there are more, those nearest to the relaxed optimum."""


class _Partial(NamedTuple):
    """Choices for the groups so far that no other one beats in both price and loss.

    ``excess`` is what a choice loses against the relaxed optimum; ``parent`` and ``point`` lead
    back to the choices they continue.
    """

    price: np.ndarray
    loss: np.ndarray
    excess: np.ndarray
    parent: np.ndarray
    point: np.ndarray


def cheapest_loss(
    prices: Sequence[np.ndarray], losses: Sequence[np.ndarray], limit: float
) -> list[int]:
    """One point of every group: the smallest total loss whose total price is at most ``limit``.

    Parameters
    ----------
    prices, losses : sequence of ndarray
        Price (rising) and loss (falling) of every point of a group.
    limit : float
        Price at most, no less than that of all first points together.

    Returns
    -------
    list of int
        Index of the chosen point of every group; of choices that lose the same, the cheapest.

    Notes
    -----
    A walk down the lower convex hulls, steepest step first, is optimal at each of its points
    (Everett, Operations Research 11 (1963)); where it stops, its slope λ and what fits after it
    bound the optimum from below and from above. A point whose loss + λ · price exceeds its
    group's least by more than the gap between the two is in no optimal choice. What is left is
    merged group by group, without the partial choices that are beaten by another (Kellerer,
    Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11). The result is optimal, and so
    never loses more where the limit is higher, unless more than `STATES` partial choices are left;
    then it is no worse than the walk, whose gap is at most the gain of one step.
    """
    chosen, slope = _walk(prices, losses, limit)
    if slope == 0.0:
        return chosen
    relaxed = [y + slope * x for x, y in zip(prices, losses, strict=True)]
    excesses = [price - price.min() for price in relaxed]
    found_loss = sum(float(y[i]) for y, i in zip(losses, chosen, strict=True))
    gap = found_loss + slope * limit - sum(float(price.min()) for price in relaxed)
    gap += 1e-12 * (found_loss + slope * limit)  # so that rounding discards nothing
    kept = [np.nonzero(e <= gap)[0] for e in excesses]
    order = sorted(range(len(kept)), key=lambda g: len(kept[g]))
    # What the groups that are still to come cost at the least.
    least = np.cumsum([float(prices[g][kept[g]].min()) for g in order][::-1])[::-1]
    least = np.append(least[1:], 0.0)
    zero = np.zeros(1)
    stages = [_Partial(zero, zero, zero, np.zeros(1, int), np.zeros(1, int))]
    for g, rest in zip(order, least, strict=True):
        points = _Partial(
            prices[g][kept[g]], losses[g][kept[g]], excesses[g][kept[g]], kept[g], kept[g]
        )
        stages.append(_merged(stages[-1], points, gap, limit - rest))
    last = stages[-1]
    # By rising price and falling loss: the last one that fits is the best.
    if not last.price.size or last.loss[-1] >= found_loss:
        return chosen
    state = last.price.size - 1
    for g, stage in zip(order[::-1], stages[:0:-1], strict=True):
        chosen[g], state = int(stage.point[state]), int(stage.parent[state])
    return chosen


def _merged(partial: _Partial, points: _Partial, gap: float, limit: float) -> _Partial:
    """Continue every partial choice by every point, as far as it can still be the best."""
    parents, picks = [], []
    for i, (price, excess) in enumerate(zip(points.price, points.excess, strict=True)):
        fits = (partial.excess + excess <= gap) & (partial.price + price <= limit)
        parents.append(np.nonzero(fits)[0])
        picks.append(np.full(parents[-1].size, i))
    parent, pick = np.concatenate(parents), np.concatenate(picks)
    price = partial.price[parent] + points.price[pick]
    loss = partial.loss[parent] + points.loss[pick]
    excess = partial.excess[parent] + points.excess[pick]
    keep = undominated(price, loss)
    if keep.size > STATES:
        nearest = np.sort(np.argpartition(excess[keep], STATES)[:STATES])
        keep = keep[nearest]
    return _Partial(price[keep], loss[keep], excess[keep], parent[keep], points.point[pick[keep]])


def _walk(
    prices: Sequence[np.ndarray], losses: Sequence[np.ndarray], limit: float
) -> tuple[list[int], float]:
    """The walk down the hulls, what then still fits, and the slope where the walk stopped.

    The slope is 0 where the walk came to the end of every hull.
    """
    chosen, unspent = [0] * len(prices), limit - sum(float(x[0]) for x in prices)
    slope = 0.0
    for steepness, g, point in hull_steps(prices, losses):
        price = float(prices[g][point] - prices[g][chosen[g]])
        if price > unspent:
            slope = steepness
            break
        chosen[g], unspent = point, unspent - price
    while slope:
        best = (0.0, 0, 0)
        for g, (x, y) in enumerate(zip(prices, losses, strict=True)):
            point = int(np.searchsorted(x, x[chosen[g]] + unspent, "right")) - 1
            best = max(best, (float(y[chosen[g]] - y[point]), g, point))
        gain, g, point = best
        if gain <= 0.0:
            break
        unspent -= float(prices[g][point] - prices[g][chosen[g]])
        chosen[g] = point
    return chosen, slope
