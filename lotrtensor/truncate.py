"""truncate: an adapter to lower ranks, in the form that it has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lotrtensor.adapters.formats.tensors import BFLOAT16
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.convert import Progress, fit_groups
from lotrtensor.core.goals import check_goal
from lotrtensor.core.stacks import LowRankStack
from lotrtensor.core.truncate import (
    SliceSvd,
    ranks_for_budget,
    ranks_for_tolerance,
    slice_svds,
    truncate_slices,
    uniform_ranks,
)
from lotrtensor.errors import RankError
from lotrtensor.groups import source_group
from lotrtensor.sizes import budget_parameters


def truncate(
    adapter: Adapter,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Lower the ranks of an adapter: a LoRA stays a LoRA, a LoTR a LoTR.

    Parameters
    ----------
    adapter : LoraAdapter or LotrAdapter
        The adapter.
    rank : int, optional
        LoRA: rank of every module at most. LoTR: left and right rank of every group at most.
    tolerance : float, optional
        Relative Frobenius error, in (0, 1), against ``adapter`` that is not exceeded.
    energy : float, optional
        Share of Σ ‖ΔW_k‖², in (0, 1), to keep.
    budget : int or str, optional
        Bytes, a share of the adapter's own bytes, or parameters; see `budget_parameters`.
    progress : callable, optional
        Told of every group of a LoTR before it is decomposed.

    Returns
    -------
    LoraAdapter or LotrAdapter
        A LoRA whose modules have the leading singular values of their ΔW, exactly the best of
        their ranks; with a tolerance, energy or budget the ranks differ, by energy per parameter
        over all modules. A LoTR with the same groups.

    Raises
    ------
    RankError
        If the goal is out of range, or not exactly one is given.

    Notes
    -----
    For a LoRA, QRs of B and Aᵀ leave an r × r matrix, whose SVD is that of ΔW: the product is
    never built (Eckart and Young, Psychometrika 1 (1936)).
    """
    if isinstance(adapter, LoraAdapter):
        return _truncate_lora(adapter, rank, tolerance, energy, budget)
    source = {module.name: module for module in adapter.to_lora().modules}
    groups = fit_groups(
        [
            source_group(group.name, [source[name] for name in group.modules], adapter.dtype)
            for group in adapter.groups
        ],
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
    rank: int | None,
    tolerance: float | None,
    energy: float | None,
    budget: int | str | None,
) -> LoraAdapter:
    parameters = None
    if budget is not None:
        parameters = budget_parameters(budget, adapter.dtype.itemsize, adapter.bytes)
    most = max(module.rank for module in adapter.modules)
    goal = check_goal(rank, tolerance, energy, parameters, (most, most))
    svds = [svd for module in adapter.modules for svd in slice_svds(_stack(module))]
    spectra = [svd.values for svd in svds]
    costs = [sum(module.shape) for module in adapter.modules]
    if goal.rank is not None:
        ranks = uniform_ranks(spectra, goal.rank[0])
    elif goal.budget is not None:
        ranks = ranks_for_budget(spectra, costs, goal.budget)
    else:
        return _within(adapter, svds, costs, goal.tolerance or 0.0)
    return _at_ranks(adapter, svds, ranks)


def _within(
    adapter: LoraAdapter, svds: list[SliceSvd], costs: list[int], tolerance: float
) -> LoraAdapter:
    """The LoRA of few parameters whose error as stored is at most ``tolerance``."""
    # Each of two factors is rounded by at most half a unit in the last place.
    rounding = 2.0 * _EPSILON[adapter.dtype.itemsize if adapter.dtype != BFLOAT16 else 0]
    if tolerance <= rounding:
        raise RankError(
            f"tolerance is {tolerance}; rounding to {adapter.dtype.name} may exceed it: choose "
            f"more than {rounding:.2g}"
        )
    target = float(np.sqrt(tolerance**2 - rounding**2))
    spectra = [svd.values for svd in svds]
    return _at_ranks(adapter, svds, ranks_for_tolerance(spectra, costs, target))


_EPSILON = {0: 2.0**-9, 2: 2.0**-11, 4: 2.0**-24, 8: 2.0**-53}
"""Unit roundoff by itemsize; 0 stands for bfloat16, which has float16's size."""


def _at_ranks(adapter: LoraAdapter, svds: list[SliceSvd], ranks: list[int]) -> LoraAdapter:
    modules = []
    for module, svd, rank in zip(adapter.modules, svds, ranks, strict=True):
        b, a = truncate_slices([svd], [rank]).factors(0)
        modules.append(replace(module, B=b, A=a, stored=None))
    return replace(adapter, modules=tuple(modules))


def _stack(module: LoraModule) -> LowRankStack:
    return LowRankStack([module.B], [module.A])
