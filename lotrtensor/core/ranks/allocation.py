"""One budget or tolerance shared out among the curves of several groups."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from lotrtensor.core.ranks.curve import Frontier
from lotrtensor.core.ranks.knapsack import cheapest_loss, lower_hull
from lotrtensor.errors import RankError


def allocate_budget(curves: Sequence[Frontier], budget: int) -> list[int]:
    """Indices into the curves with the smallest total squared error for ``budget`` parameters.

    More budget is never more error; see `cheapest_loss`.

    Raises
    ------
    RankError
        If the smallest pairs together need more than ``budget``; the message says how many.
    """
    smallest = sum(int(curve.parameters[0]) for curve in curves)
    if budget < smallest:
        raise RankError(
            f"budget is {budget} parameters; the smallest decomposition of all "
            f"{len(curves)} groups needs {smallest}"
        )
    prices = [curve.parameters.astype(np.float64) for curve in curves]
    return cheapest_loss(prices, [curve.error2 for curve in curves], budget)


def allocation_walk(curves: Sequence[Frontier]) -> list[list[int]]:
    """Indices into the curves at every breakpoint of `allocate_budget`, by rising parameters.

    From the smallest pairs to the largest, one step of one group at a time: each has the smallest
    total squared error of its size.
    """
    steps = []
    for group, curve in enumerate(curves):
        x, y = curve.parameters.astype(np.float64), curve.error2
        for a, b in itertools.pairwise(lower_hull(x, y)):
            steps.append((float((y[b] - y[a]) / (x[b] - x[a])), group, b))
    # Steps of one hull get ever flatter: the stable sort keeps their order.
    steps.sort(key=lambda step: step[0])
    walk = [[0] * len(curves)]
    for _, group, point in steps:
        following = list(walk[-1])
        following[group] = point
        walk.append(following)
    return walk


def allocate_tolerance(curves: Sequence[Frontier], tolerance: float) -> list[int]:
    """Indices into the curves with the fewest parameters for one relative error over all groups.

    Σ error² ≤ tolerance² Σ norm²; see `cheapest_loss`, with squared errors for prices.

    Raises
    ------
    RankError
        If even full ranks have a larger error.
    """
    norm2 = sum(curve.norm2 for curve in curves)
    smallest = sum(float(curve.error2[-1]) for curve in curves)
    if smallest > tolerance**2 * norm2:
        reached = float(np.sqrt(smallest / norm2))
        raise RankError(f"tolerance is {tolerance}; the smallest error in reach is {reached:.3g}")
    errors2 = [curve.error2[::-1] for curve in curves]
    parameters = [curve.parameters[::-1].astype(np.float64) for curve in curves]
    chosen = cheapest_loss(errors2, parameters, tolerance**2 * norm2)
    return [len(curve.error2) - 1 - i for curve, i in zip(curves, chosen, strict=True)]
