"""Distribute one size or one error over the curves of several groups.

The errors of the curves are taken as exact. A single group is a list of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lotrtensor.core.options import shown
from lotrtensor.core.ranks.curve import Frontier
from lotrtensor.core.ranks.knapsack import cheapest_loss
from lotrtensor.core.ranks.pareto import hull_steps
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.errors import RankError


def allocate_parameters(curves: Sequence[Frontier], parameters: int) -> list[int]:
    """Indices into the curves with the smallest total squared error for so many parameters.

    The error never rises with the number of parameters; see `cheapest_loss`.

    Raises
    ------
    RankError
        If the smallest pairs together need more than ``parameters``; the message says how many.
    """
    smallest = sum(int(curve.parameters[0]) for curve in curves)
    if parameters < smallest:
        whose = f" of all {len(curves)} groups" if len(curves) > 1 else ""
        raise RankError(
            f"parameters is {shown(parameters)}; the smallest decomposition{whose} needs {smallest}"
        )
    prices = [curve.parameters.astype(np.float64) for curve in curves]
    return cheapest_loss(prices, [curve.error2 for curve in curves], parameters)


def allocation_walk(curves: Sequence[Frontier]) -> list[list[int]]:
    """Indices into the curves at every breakpoint of `allocate_parameters`, by rising size.

    From the smallest pairs to the largest, one step of one group at a time: each has the smallest
    total squared error of its size.
    """
    prices = [curve.parameters.astype(np.float64) for curve in curves]
    walk = [[0] * len(curves)]
    for _, group, point in hull_steps(prices, [curve.error2 for curve in curves]):
        following = list(walk[-1])
        following[group] = point
        walk.append(following)
    return walk


def allocate_error(curves: Sequence[Frontier], limit2: float) -> list[int]:
    """Indices into the curves with the fewest parameters for a total squared error of ``limit2``.

    The dual of `allocate_parameters`: `cheapest_loss` with squared errors as prices.

    Raises
    ------
    RankError
        If even full ranks have a larger error.
    """
    norm2 = sum(curve.norm2 for curve in curves)
    smallest2 = sum(float(curve.error2[-1]) for curve in curves)
    if smallest2 > limit2:
        asked, reached = (SquaredError(x, norm2).relative for x in (limit2, smallest2))
        raise RankError(f"tolerance is {asked:.3g}; the smallest error in reach is {reached:.3g}")
    errors2 = [curve.error2[::-1] for curve in curves]
    parameters = [curve.parameters[::-1].astype(np.float64) for curve in curves]
    chosen = cheapest_loss(errors2, parameters, limit2)
    return [len(curve.error2) - 1 - i for curve, i in zip(curves, chosen, strict=True)]
