"""Ranks of single slices: which rank-1 terms of their SVDs to keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lotrtensor.core.options import shown
from lotrtensor.core.ranks.knapsack import cheapest_loss
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.errors import RankError


def uniform_ranks(spectra: Sequence[np.ndarray], rank: int) -> list[int]:
    """Give every slice the rank ``rank``, or its own where that is lower.

    Raises
    ------
    RankError
        If ``rank`` is below 1.
    """
    if rank < 1:
        raise RankError(f"rank is {shown(rank)}; expected at least 1")
    return [min(rank, len(values)) for values in spectra]


def ranks_for_parameters(
    spectra: Sequence[np.ndarray], costs: Sequence[int], parameters: int, *, uniform: bool = False
) -> list[int]:
    """Ranks of the smallest total squared error for so many parameters.

    Parameters
    ----------
    spectra : sequence of ndarray
        Singular values of every slice, falling.
    costs : sequence of int
        Parameters of a rank-1 term of the slice: m + n.
    parameters : int
        Stored numbers at most. Every slice keeps rank 1 at the least, which a LoRA file needs.
    uniform : bool
        One rank for all slices, or a slice's own where that is lower.

    Raises
    ------
    RankError
        If rank 1 for every slice needs more; the message says how many.

    Notes
    -----
    Terms of the same cost are taken by falling σ². What remains to choose is the number of terms of
    each cost: a knapsack with one group per shape, solved by `cheapest_loss`.
    """
    smallest = sum(costs)
    if parameters < smallest:
        raise RankError(
            f"parameters is {parameters}; rank 1 for all {len(costs)} slices needs {smallest}"
        )
    if uniform:
        return next(ranks for ranks in _uniform(spectra) if _size(ranks, costs) <= parameters)
    terms = _terms_by_cost(spectra, costs)
    prices = [cost * np.arange(len(own) + 1.0) for cost, own in terms.items()]
    losses = [_left_out(own) for own in terms.values()]
    return _taken(terms, cheapest_loss(prices, losses, parameters - smallest), len(costs))


def ranks_for_tolerance(
    spectra: Sequence[np.ndarray],
    costs: Sequence[int],
    tolerance: float,
    *,
    uniform: bool = False,
) -> list[int]:
    """Ranks of the fewest parameters whose total relative error is at most ``tolerance``.

    The dual of `ranks_for_parameters`.

    Raises
    ------
    RankError
        If ``tolerance`` is not between 0 and 1.
    """
    if not 0.0 < tolerance < 1.0:
        raise RankError(f"tolerance is {tolerance}; expected a number between 0 and 1")
    if uniform:
        within = (r for r in _uniform(spectra) if truncation_error(spectra, r) <= tolerance)
        return list(within)[-1]
    target = tolerance**2 * sum(float(np.sum(values**2)) for values in spectra)
    terms = _terms_by_cost(spectra, costs)
    prices = [_left_out(own)[::-1] for own in terms.values()]
    losses = [cost * np.arange(len(own), -1.0, -1.0) for cost, own in terms.items()]
    dropped = cheapest_loss(prices, losses, target)
    taken = [len(own) - i for own, i in zip(terms.values(), dropped, strict=True)]
    return _taken(terms, taken, len(costs))


def truncation_error(spectra: Sequence[np.ndarray], ranks: Sequence[int]) -> float:
    """Relative error √(Σ_k Σ_{i>r_k} σ_ki² / Σ_k Σ_i σ_ki²) of the truncated slices."""
    norm2 = sum(float(np.sum(values**2)) for values in spectra)
    lost2 = sum(float(np.sum(v[r:] ** 2)) for v, r in zip(spectra, ranks, strict=True))
    return SquaredError(lost2, norm2).relative


def rank_one_terms(spectra: Sequence[np.ndarray], costs: Sequence[int]) -> list[tuple[int, float]]:
    """Return the terms beyond the first of every slice, (slice, σ²), best per parameter first."""
    terms = [
        (-(float(value) ** 2) / cost, k, i, float(value) ** 2)
        for k, (values, cost) in enumerate(zip(spectra, costs, strict=True))
        for i, value in enumerate(values[1:])
    ]
    return [(k, value2) for _, k, _, value2 in sorted(terms)]


def _uniform(spectra: Sequence[np.ndarray]) -> list[list[int]]:
    """Ranks for every one rank of all slices, from the highest down."""
    most = max(len(values) for values in spectra)
    return [uniform_ranks(spectra, rank) for rank in range(most, 0, -1)]


def _size(ranks: Sequence[int], costs: Sequence[int]) -> int:
    return sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))


def _terms_by_cost(
    spectra: Sequence[np.ndarray], costs: Sequence[int]
) -> dict[int, list[tuple[int, float]]]:
    """The terms beyond the first of every slice with any energy, by cost, the largest first."""
    terms: dict[int, list[tuple[int, float]]] = {cost: [] for cost in costs}
    for k, value2 in rank_one_terms(spectra, [1] * len(costs)):
        if value2 > 0.0:
            terms[costs[k]].append((k, value2))
    return terms


def _left_out(terms: Sequence[tuple[int, float]]) -> np.ndarray:
    """Energy left out after each number of terms: a sum of what is lost, so that nothing cancels.

    It falls with every term, for none is below the mean of those after it.
    """
    lost2: np.ndarray = np.cumsum([0.0, *(value2 for _, value2 in reversed(terms))])[::-1]
    return lost2


def _taken(
    terms: dict[int, list[tuple[int, float]]], counts: Sequence[int], slices: int
) -> list[int]:
    ranks = [1] * slices
    for own, count in zip(terms.values(), counts, strict=True):
        for k, _ in own[:count]:
            ranks[k] += 1
    return ranks
