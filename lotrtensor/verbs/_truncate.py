"""truncate: an adapter to lower ranks, in the form that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.adapters.sizes import budget_parameters
from lotrtensor.core.fit.goal import Rank
from lotrtensor.core.slice_svd import slice_svds
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.verbs._fit_groups import Progress, fit_groups
from lotrtensor.verbs._lower_ranks import (
    Allocation,
    Update,
    check_allocation,
    lora_goal,
    lower_ranks,
)
from lotrtensor.verbs._sources import lotr_source


def truncate(
    adapter: Adapter,
    *,
    rank: Rank | None = None,
    tolerance: float | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    allocation: Allocation = "optimal",
    progress: Progress | None = None,
) -> Adapter:
    """Lower the ranks of an adapter: a LoRA stays a LoRA, a LoTR a LoTR.

    Parameters
    ----------
    adapter : LoraAdapter or LotrAdapter
        The adapter.
    rank : int or (int, int), optional
        LoRA: rank of every module at most. LoTR: left and right rank (p, q) of every group at
        most.
    tolerance : float, optional
        Relative Frobenius error, in (0, 1), against ``adapter`` that is not exceeded.
    energy : float, optional
        Share of Σ ‖ΔW_k‖², in (0, 1), to keep.
    budget : int or str, optional
        Bytes, a share of the adapter's own bytes, or parameters; see `budget_parameters`.
    allocation : str
        How a LoRA's ranks follow from a tolerance, energy or budget: ``"optimal"``, the best ranks
        of all modules, or ``"uniform"``, one rank for all.
    progress : callable, optional
        Told of every group of a LoTR before it is decomposed.

    Returns
    -------
    LoraAdapter or LotrAdapter
        A LoRA whose modules have the leading singular values of their ΔW, exactly the best of
        their ranks; with a tolerance, energy or budget the ranks differ, and no others of that
        size have a smaller error. A LoTR with the same groups. A module or group that keeps its
        full rank is kept as it is.

    Raises
    ------
    RankError
        If the goal is out of range, or not exactly one is given, or ``allocation`` is unknown or
        ``"uniform"`` for a LoTR.

    Notes
    -----
    For a LoRA, QRs of B and Aᵀ leave an r × r matrix, whose SVD is that of ΔW: the product is
    never built (Eckart and Young, Psychometrika 1 (1936)). For a LoTR, QRs of U and V leave a
    K × p × q tensor, which is decomposed in its place.
    """
    check_allocation(allocation, lora=isinstance(adapter, LoraAdapter))
    if isinstance(adapter, LoraAdapter):
        return _truncate_lora(adapter, rank, tolerance, energy, budget, allocation)
    groups = fit_groups(
        [lotr_source(group, adapter.dtype) for group in adapter.groups],
        rank=rank,
        tolerance=tolerance,
        energy=energy,
        budget=budget,
        dtype=adapter.dtype,
        progress=progress,
    )
    return LotrAdapter(groups, adapter.config, adapter.dtype, adapter.extras)


def _truncate_lora(
    adapter: LoraAdapter,
    rank: Rank | None,
    tolerance: float | None,
    energy: float | None,
    budget: int | str | None,
    allocation: Allocation,
) -> LoraAdapter:
    parameters = None
    if budget is not None:
        parameters = _numbers(adapter, budget)
    ranks = {module.name: module.rank for module in adapter.modules}
    goal = lora_goal(rank, tolerance, energy, parameters, ranks)
    modules = lower_ranks(_updates(adapter), goal, adapter.dtype, allocation)
    return replace(adapter, modules=modules)


def padded_rank(adapter: LoraAdapter, budget: int | str) -> int:
    """Largest rank of all modules that ``budget`` pays where each is padded to it.

    Raises
    ------
    RankError
        If rank 1 needs more.
    """
    most = max(module.rank for module in adapter.modules)
    return min(most, _numbers(adapter, budget) // _smallest(adapter))


def _numbers(adapter: LoraAdapter, budget: int | str) -> int:
    """The budget in parameters."""
    return budget_parameters(budget, adapter.dtype.itemsize, adapter.bytes, _smallest(adapter))


def _smallest(adapter: LoraAdapter) -> int:
    """Parameters of the adapter at rank 1: Σ (m + n)."""
    return sum(sum(module.shape) for module in adapter.modules)


def _updates(adapter: LoraAdapter) -> list[Update]:
    """The singular value decomposition of every module, those of one shape together."""
    shapes: dict[tuple[int, int], list[LoraModule]] = {}
    for module in adapter.modules:
        shapes.setdefault(module.shape, []).append(module)
    svds = {
        module.name: svd
        for same in shapes.values()
        for module, svd in zip(same, slice_svds(_stack(same)), strict=True)
    }
    return [
        Update(m.name, m.embedding, svds[m.name], partial(_distance2, m), whole=m)
        for m in adapter.modules
    ]


def _distance2(module: LoraModule, b: np.ndarray, a: np.ndarray) -> float:
    """‖ΔW − B A‖² from thin factors, in float64."""
    pairs = ((module.B, module.A), (b, a))
    first, second = (LowRankStack([x.astype(float)], [y.astype(float)]) for x, y in pairs)
    return float((first - second).norms2()[0])


def _stack(modules: Sequence[LoraModule]) -> LowRankStack:
    return LowRankStack([module.B for module in modules], [module.A for module in modules])
