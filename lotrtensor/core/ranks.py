"""From a tolerance, an energy or a budget to ranks: one group, or several that share it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lotrtensor.core.allocation import cheapest_loss, lower_hull
from lotrtensor.core.hosvd import Hosvd
from lotrtensor.core.linalg import as_accumulator, namespace, to_numpy
from lotrtensor.core.stacks import LowRankStack, SliceStack
from lotrtensor.errors import RankError

Fit = TypeVar("Fit")


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
        cores = np.zeros_like(dense)
        for r, count in Counter(slice_ranks).items():
            cores = cores + count * np.minimum(dense, r * np.add(p, q))
    return np.asarray(np.multiply(m, p) + np.multiply(n, q) + cores)


def energies_outside(energy: np.ndarray) -> np.ndarray:
    """Squared error of keeping the leading (p, q) corner of every core, for all p and q at once.

    ``energy`` (a × b) is Σ_k of the squared entries of the cores. Entry [p − 1, q − 1] of the
    result is its sum outside the p × q corner, a sum of what is left out: nothing cancels. With
    orthonormal factors this is the error of the truncated decomposition.
    """
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
    energy = core_energy(stack, full)
    error2 = energies_outside(energy) + lost2
    return efficient_pairs(error2, float(energy.sum()) + lost2, shape, slice_ranks)


def core_energy(stack: SliceStack, full: Hosvd) -> np.ndarray:
    """Σ_k of the squared entries of the cores UᵀΔW_kV (a × b), U and V those of ``full``.

    Thin factors give one core at a time: all K of them can be larger than the factors by far.
    """
    parts = [stack]
    if isinstance(stack, LowRankStack):
        parts = [stack.take([k]) for k in range(stack.shape[0])]
    energy = np.zeros((full.left.shape[1], full.right.shape[1]))
    for part in parts:
        core = as_accumulator(part.core(full.left, full.right))
        energy += to_numpy(namespace(core).sum(core * core, axis=0))
    return energy


def efficient_pairs(
    error2: np.ndarray,
    norm2: float,
    shape: tuple[int, int, int],
    slice_ranks: Sequence[int] | None,
) -> Frontier:
    """Return the pairs (p, q) that none beats, from the squared errors of all of them (a × b)."""
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


def cheapest_within(curve: Frontier, error2: float) -> int:
    """Index of the smallest pair whose squared error is at most ``error2``; else the last."""
    within = np.nonzero(curve.error2 <= error2)[0]
    return int(within[0]) if within.size else len(curve.error2) - 1


def best_within(curve: Frontier, budget: int) -> int:
    """Index of the pair with the smallest error among those of at most ``budget`` parameters.

    More budget is never more error of the HOSVD; refined at its pair by HOOI, which is no worse
    there, two budgets may differ either way by what HOOI gains.

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


def settle(
    tolerance: float,
    norm2: float,
    dtype: Any,
    attempt: Callable[[float], tuple[Fit, float, float, bool]],
) -> Fit:
    """Return the first fit whose relative error as stored is at most ``tolerance``.

    What is stored is rounded, which takes its share of the error; ranks have to make room for it.

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
                f"{float(np.sqrt(stored2 / norm2)):.3g} as stored in "
                f"{getattr(dtype, '__name__', dtype)}: choose a wider dtype or a larger tolerance"
            )
        # Rounding costs about as much again next time; where it does not, go on down all the same.
        target2 = max(0.0, min(limit2 - (stored2 - fitted2), 0.8 * fitted2))
