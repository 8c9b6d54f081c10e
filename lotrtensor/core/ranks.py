"""From a tolerance, an energy or a budget to ranks: one group, or several that share it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lotrtensor.core.hosvd import Hosvd
from lotrtensor.core.linalg import Array, as_accumulator, namespace, to_numpy
from lotrtensor.core.stacks import SliceStack
from lotrtensor.errors import RankError


class Frontier(NamedTuple):
    """Rank pairs that no other pair beats in both size and error, by rising parameters.

    ``ranks`` (F × 2), ``parameters`` (F, rising) and ``error2`` (F, falling): the squared error
    that truncation of the HOSVD reaches there. ``norm2`` is the squared norm of the stack.
    """

    ranks: np.ndarray
    parameters: np.ndarray
    error2: np.ndarray
    norm2: float


def tucker2_parameters(
    shape: tuple[int, int, int],
    p: np.ndarray | int,
    q: np.ndarray | int,
    slice_ranks: Sequence[int] | None = None,
) -> np.ndarray:
    """Stored numbers of a Tucker-2 of ranks (p, q): m p + n q + K p q.

    Where slices of ranks r_k are known, a core may be kept as a product, so that it costs
    min(p q, r_k (p + q)).
    """
    slices, m, n = shape
    dense = np.multiply(p, q)
    if slice_ranks is not None and len(slice_ranks) != slices:
        raise RankError(f"found {len(slice_ranks)} slice_ranks; expected {slices}, one a slice")
    if slice_ranks is None:
        cores = slices * dense
    else:
        cores = np.sum([np.minimum(dense, r * np.add(p, q)) for r in slice_ranks], axis=0)
    return np.asarray(np.multiply(m, p) + np.multiply(n, q) + cores)


def truncation_errors2(core: Array) -> np.ndarray:
    """Squared error of keeping the leading (p, q) corner of every core, for all p and q at once.

    Entry [p − 1, q − 1] is Σ_k of the entries of G_k² outside its p × q corner, as a sum of
    energies that are left out: nothing cancels. With orthonormal factors this is the error of the
    truncated decomposition.
    """
    energy = to_numpy(namespace(core).sum(core * core, axis=0))
    right_of = np.cumsum(energy[:, ::-1], axis=1)[:, ::-1]
    right_of = np.concatenate([right_of[:, 1:], np.zeros((energy.shape[0], 1))], axis=1)
    rows = energy.sum(axis=1)
    below = np.concatenate([np.cumsum(rows[::-1])[::-1][1:], [0.0]])
    lost: np.ndarray = np.cumsum(right_of, axis=0) + below[:, None]
    return lost


def frontier(
    stack: SliceStack,
    full: Hosvd,
    shape: tuple[int, int, int],
    *,
    lost2: float = 0.0,
    slice_ranks: Sequence[int] | None = None,
) -> Frontier:
    """Efficient rank pairs of ``stack``, from one HOSVD.

    Parameters
    ----------
    stack : SliceStack
        The small stack that ``full`` belongs to.
    full : Hosvd
        All its mode singular vectors.
    shape : (int, int, int)
        (K, m, n) of the stack that parameters are counted for.
    lost2 : float
        Squared error already made by going over to the small stack.
    slice_ranks : sequence of int, optional
        Ranks r_k; see `tucker2_parameters`.
    """
    core = as_accumulator(stack.core(full.left, full.right))
    error2 = truncation_errors2(core) + lost2
    norm2 = float(namespace(core).sum(core * core)) + lost2
    p, q = np.meshgrid(*(np.arange(1, s + 1) for s in error2.shape), indexing="ij")
    parameters = tucker2_parameters(shape, p, q, slice_ranks)
    return _efficient(
        np.stack([p.ravel(), q.ravel()], 1), parameters.ravel(), error2.ravel(), norm2
    )


def _efficient(
    ranks: np.ndarray, parameters: np.ndarray, error2: np.ndarray, norm2: float
) -> Frontier:
    order = np.lexsort((error2, parameters))
    best = np.minimum.accumulate(error2[order])
    keep = order[np.concatenate([[True], best[1:] < best[:-1]])]
    return Frontier(ranks[keep], parameters[keep], error2[keep], norm2)


def pair_at(curve: Frontier, index: int) -> tuple[int, int]:
    """Return the ranks (p, q) at ``index`` of ``curve``."""
    p, q = curve.ranks[index]
    return int(p), int(q)


def cheapest_within(curve: Frontier, tolerance: float) -> int:
    """Index of the smallest pair whose relative error is at most ``tolerance``.

    Raises
    ------
    RankError
        If even full ranks have a larger error.
    """
    within = np.nonzero(curve.error2 <= tolerance**2 * curve.norm2)[0]
    if not within.size:
        reached = float(np.sqrt(curve.error2[-1] / curve.norm2))
        raise RankError(f"tolerance is {tolerance}; the smallest error in reach is {reached:.3g}")
    return int(within[0])


def best_within(curve: Frontier, budget: int) -> int:
    """Index of the pair with the smallest error among those of at most ``budget`` parameters.

    Raises
    ------
    RankError
        If even ranks (1, 1) need more; the message says how many.
    """
    if budget < curve.parameters[0]:
        raise RankError(
            f"budget is {budget} parameters; the smallest decomposition needs "
            f"{int(curve.parameters[0])}"
        )
    return int(np.searchsorted(curve.parameters, budget, side="right")) - 1


class _Step(NamedTuple):
    """A move of one group to a later point of its curve, by falling gain per parameter."""

    slope: float
    group: int
    point: int


def allocate_budget(curves: Sequence[Frontier], budget: int) -> list[int]:
    """Indices into the curves with the smallest total squared error for ``budget`` parameters.

    Every group starts at its smallest pair and walks down the lower convex hull of its curve; the
    steepest step over all groups goes first, which is optimal at every hull point (Everett,
    Operations Research 11 (1963)). What is left over goes to the steps that still fit.

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
    chosen = [0] * len(curves)
    left = budget - smallest
    for step in _hull_steps(curves):
        cost = _cost(curves, chosen, step)
        if cost > left:
            break
        chosen[step.group], left = step.point, left - cost
    return _spend(curves, chosen, left)


def allocate_tolerance(curves: Sequence[Frontier], tolerance: float) -> list[int]:
    """Indices into the curves with the fewest parameters for one relative error over all groups.

    The same walk as `allocate_budget`, until Σ error² ≤ tolerance² Σ norm²; then every group is
    taken back as far as that still holds.

    Raises
    ------
    RankError
        If even full ranks have a larger error.
    """
    target = tolerance**2 * sum(curve.norm2 for curve in curves)
    chosen = [0] * len(curves)
    total = sum(float(curve.error2[0]) for curve in curves)
    steps = _hull_steps(curves)
    while total > target:
        if not steps:
            reached = float(np.sqrt(total / sum(curve.norm2 for curve in curves)))
            raise RankError(
                f"tolerance is {tolerance}; the smallest error in reach is {reached:.3g}"
            )
        step = steps.pop(0)
        chosen[step.group] = step.point
        total = sum(float(c.error2[i]) for c, i in zip(curves, chosen, strict=True))
    return _take_back(curves, chosen, target - total)


def _hull_steps(curves: Sequence[Frontier]) -> list[_Step]:
    """All steps along the lower convex hulls, steepest first and each group's in order."""
    queues = []
    for group, curve in enumerate(curves):
        hull = _lower_hull(curve)
        queues.append(
            [
                _Step(
                    float(curve.error2[b] - curve.error2[a])
                    / float(curve.parameters[b] - curve.parameters[a]),
                    group,
                    b,
                )
                for a, b in itertools.pairwise(hull)
            ]
        )
    return list(heapq.merge(*queues))


def _lower_hull(curve: Frontier) -> list[int]:
    """Indices of the lower convex hull of (parameters, error2), by rising parameters."""
    hull: list[int] = []
    x, y = curve.parameters.astype(float), curve.error2
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _cost(curves: Sequence[Frontier], chosen: list[int], step: _Step) -> int:
    parameters = curves[step.group].parameters
    return int(parameters[step.point] - parameters[chosen[step.group]])


def _spend(curves: Sequence[Frontier], chosen: list[int], left: int) -> list[int]:
    """Spend what the hull walk left over, on the largest gain that fits, until none does."""
    while True:
        best = (0.0, 0, 0)
        for group, (curve, at) in enumerate(zip(curves, chosen, strict=True)):
            index = int(np.searchsorted(curve.parameters, curve.parameters[at] + left, "right")) - 1
            gain = float(curve.error2[at] - curve.error2[index])
            if gain > best[0]:
                best = (gain, group, index)
        if best[0] == 0.0:
            return chosen
        _, group, index = best
        left -= int(curves[group].parameters[index] - curves[group].parameters[chosen[group]])
        chosen[group] = index


def _take_back(curves: Sequence[Frontier], chosen: list[int], slack: float) -> list[int]:
    """Give back the parameters that the tolerance does not need, largest saving first."""
    while True:
        best = (0, 0, 0)
        for group, (curve, at) in enumerate(zip(curves, chosen, strict=True)):
            within = np.nonzero(curve.error2 <= curve.error2[at] + slack)[0]
            saving = int(curve.parameters[at] - curve.parameters[within[0]])
            if saving > best[0]:
                best = (saving, group, int(within[0]))
        if best[0] == 0:
            return chosen
        _, group, index = best
        slack -= float(curves[group].error2[index] - curves[group].error2[chosen[group]])
        chosen[group] = index
