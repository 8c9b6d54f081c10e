"""Truncated LoRA: each slice to a lower rank of its own, exactly, through small SVDs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from array_api_compat import device

from lotrtensor.core.balanced import balanced_factors
from lotrtensor.core.linalg import Array, as_accumulator, namespace, to_numpy
from lotrtensor.core.stacks import LowRankStack
from lotrtensor.errors import RankError


class SliceSvd(NamedTuple):
    """ΔW_k = Q · small · Pᵀ with orthonormal Q (m × a) and P (n × b), small a × b.

    ``small`` is a NumPy matrix of sides min(m, r_k) and min(n, r_k); ``values`` are its singular
    values, those of ΔW_k.
    """

    left: Array
    small: np.ndarray
    right: Array
    values: np.ndarray


def slice_svds(stack: LowRankStack) -> list[SliceSvd]:
    """Reduce every slice to its r_k × r_k problem: QRs of B_k and A_kᵀ, never the product.

    Cost Σ_k 4 (m + n) r_k² flops.
    """
    found = []
    for k in range(stack.shape[0]):
        b, a = stack.factors(k)
        xp = namespace(b)
        left, left_triangle = xp.linalg.qr(as_accumulator(b))
        right, right_triangle = xp.linalg.qr(as_accumulator(a.T))
        small = to_numpy(left_triangle @ right_triangle.T)
        values = np.linalg.svd(small, compute_uv=False)
        found.append(SliceSvd(left, small, right, values))
    return found


def uniform_ranks(spectra: Sequence[np.ndarray], rank: int) -> list[int]:
    """Give every slice the rank ``rank``, or its own where that is lower.

    Raises
    ------
    RankError
        If ``rank`` is below 1.
    """
    if rank < 1:
        raise RankError(f"rank is {rank}; expected at least 1")
    return [min(rank, len(values)) for values in spectra]


def ranks_for_budget(spectra: Sequence[np.ndarray], costs: Sequence[int], budget: int) -> list[int]:
    """Ranks of the smallest total squared error for ``budget`` parameters.

    Parameters
    ----------
    spectra : sequence of ndarray
        Singular values of every slice, falling.
    costs : sequence of int
        Parameters of a rank-1 term of the slice: m + n.
    budget : int
        Parameters at most. Every slice keeps rank 1 at the least, which a LoRA file needs.

    Raises
    ------
    RankError
        If rank 1 for every slice needs more; the message says how many.

    Notes
    -----
    Terms are taken by falling energy per parameter σ² / (m + n), optimal where costs are equal
    and at every breakpoint otherwise; the last terms fill what is left.
    """
    smallest = sum(costs)
    if budget < smallest:
        raise RankError(
            f"budget is {budget} parameters; rank 1 for all {len(costs)} slices needs {smallest}"
        )
    ranks, left = [1] * len(costs), budget - smallest
    closed: set[int] = set()
    for k, _ in rank_one_terms(spectra, costs):
        # A slice whose next term did not fit gets no later one: they come in order.
        if k in closed:
            continue
        if costs[k] > left:
            closed.add(k)
            continue
        ranks[k], left = ranks[k] + 1, left - costs[k]
    return ranks


def ranks_for_tolerance(
    spectra: Sequence[np.ndarray], costs: Sequence[int], tolerance: float
) -> list[int]:
    """Ranks of few parameters whose total relative error is at most ``tolerance``.

    Terms are taken by falling energy per parameter until the energy left is within it.

    Raises
    ------
    RankError
        If ``tolerance`` is not between 0 and 1.
    """
    if not 0.0 < tolerance < 1.0:
        raise RankError(f"tolerance is {tolerance}; expected a number between 0 and 1")
    terms = rank_one_terms(spectra, costs)
    energies = np.array([energy for _, energy in terms])
    # Energy still left out after i terms: a sum of what is lost, so that nothing cancels.
    lost2 = np.concatenate([np.cumsum(energies[::-1])[::-1], [0.0]])
    total2 = sum(float(np.sum(values**2)) for values in spectra)
    taken = int(np.argmax(lost2 <= tolerance**2 * total2))
    ranks = [1] * len(costs)
    for k, _ in terms[:taken]:
        ranks[k] += 1
    return ranks


def truncation_error(spectra: Sequence[np.ndarray], ranks: Sequence[int]) -> float:
    """Relative error √(Σ_k Σ_{i>r_k} σ_ki² / Σ_k Σ_i σ_ki²) of the truncated slices."""
    total2 = sum(float(np.sum(values**2)) for values in spectra)
    lost2 = sum(float(np.sum(v[r:] ** 2)) for v, r in zip(spectra, ranks, strict=True))
    return math.sqrt(lost2 / total2) if total2 else 0.0


def truncate_slices(svds: Sequence[SliceSvd], ranks: Sequence[int]) -> LowRankStack:
    """Return the best stack whose slices have the given ranks, balanced factors, in float64."""
    lefts, rights = [], []
    for svd, rank in zip(svds, ranks, strict=True):
        xp = namespace(svd.left)
        b, a = balanced_factors(svd.small, rank)
        place = {"dtype": svd.left.dtype, "device": device(svd.left)}
        lefts.append(svd.left @ xp.asarray(b, **place))
        rights.append(xp.asarray(a, **place) @ svd.right.T)
    return LowRankStack(lefts, rights)


def rank_one_terms(spectra: Sequence[np.ndarray], costs: Sequence[int]) -> list[tuple[int, float]]:
    """Return the terms beyond the first of every slice, (slice, σ²), best per parameter first."""
    terms = [
        (-(float(value) ** 2) / cost, k, i, float(value) ** 2)
        for k, (values, cost) in enumerate(zip(spectra, costs, strict=True))
        for i, value in enumerate(values[1:])
    ]
    return [(k, energy) for _, k, _, energy in sorted(terms)]
