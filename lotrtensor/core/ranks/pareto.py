"""Points of price and loss: those that no other beats, and those on the lower convex hull."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def undominated(price: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the points that none beats in both price and loss, by rising price.

    Of points that are equal in both, the first.
    """
    order = np.lexsort((loss, price))
    best = np.minimum.accumulate(loss[order])
    # An empty set of points has no first one.
    falls = np.concatenate([np.ones(min(1, best.size), bool), best[1:] < best[:-1]])
    found: np.ndarray = order[falls]
    return found


def hull_steps(
    prices: Sequence[np.ndarray], losses: Sequence[np.ndarray]
) -> list[tuple[float, int, int]]:
    """Steps (steepness, group, point) down the lower convex hulls of all groups, steepest first.

    Parameters
    ----------
    prices, losses : sequence of ndarray
        Price (rising) and loss (falling) of every point of a group.
    """
    steps = []
    for group, (x, y) in enumerate(zip(prices, losses, strict=True)):
        for a, b in itertools.pairwise(lower_hull(x, y)):
            steps.append((float((y[a] - y[b]) / (x[b] - x[a])), group, b))
    # The steps of one hull get ever flatter, so that their order is kept; where two are equally
    # steep, the stable sort keeps it.
    return sorted(steps, key=lambda step: -step[0])


def lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of the points (x, y), by rising ``x`` and falling ``y``."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
