"""truncate: lower the ranks of an adapter and keep its form."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import overload

import numpy as np

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import LazyModule, LoraModule, module_stack
from lotrtensor.adapters.rounding import narrowed
from lotrtensor.core.arrays import itemsize
from lotrtensor.core.fit.truncate import truncate_to_goal
from lotrtensor.core.options import shown
from lotrtensor.core.ranks.goal import Goal, Rank
from lotrtensor.core.slice_svd import SliceSvd, slice_svds
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.threads import on_one_thread
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import RankError
from lotrtensor.verbs._compress import compress
from lotrtensor.verbs._fit_groups import Progress, fit_groups
from lotrtensor.verbs._goals import (
    Allocation,
    Asked,
    check_allocation,
    groups_goal,
    lora_goal,
)
from lotrtensor.verbs._lower_ranks import Update, held, lower_ranks
from lotrtensor.verbs._sources import lotr_source


@overload
def truncate(
    adapter: Tucker2,
    *,
    rank: Rank | None = ...,
    tolerance: float | None = ...,
    energy: float | None = ...,
    budget: int | str | None = ...,
) -> Tucker2: ...


@overload
def truncate(
    adapter: Adapter,
    *,
    rank: Rank | None = ...,
    tolerance: float | None = ...,
    energy: float | None = ...,
    budget: int | str | None = ...,
    allocation: Allocation = ...,
    progress: Progress | None = ...,
) -> Adapter: ...


@on_one_thread
def truncate(
    adapter: Adapter | Tucker2,
    *,
    rank: Rank | None = None,
    tolerance: float | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    allocation: Allocation = "optimal",
    progress: Progress | None = None,
) -> Adapter | Tucker2:
    """Lower the ranks: a LoRA stays a LoRA, a LoTR a LoTR, a Tucker-2 decomposition one.

    Parameters
    ----------
    adapter : LoraAdapter, LotrAdapter, CompressedAdapter or Tucker2
        The adapter, or a decomposition; a compressed one is compressed further.
    rank : int or (int, int), optional
        LoRA: rank of every module at most. LoTR: left and right rank (p, q) of every group at
        most. Tucker2: left and right rank.
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
        Called for every group of a LoTR before it is decomposed.

    Returns
    -------
    LoraAdapter, LotrAdapter or Tucker2
        What was given, at lower ranks. A LoRA's modules have the leading singular values of their
        ΔW, exactly the best of their ranks; with a tolerance, energy or budget the ranks differ,
        and no others of that size have a smaller error. A LoTR has the same groups. A module or
        group that keeps its full rank is kept as it is. The factors of a LoRA above 256 MiB are
        computed whenever they are asked for. A Tucker2 keeps its dtype, and its factors are
        orthonormal.

    Raises
    ------
    RankError
        If the goal is out of range, or not exactly one is given.
    OptionError
        If ``allocation`` is unknown, or ``"uniform"`` for a LoTR.

    Notes
    -----
    For a LoRA, QRs of B and Aᵀ leave an r × r matrix, whose SVD is that of ΔW: the product is
    never built (Eckart and Young, Psychometrika 1 (1936)). For a LoTR, QRs of U and V leave an
    equal K × p × q problem, which is decomposed instead.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> small = lt.truncate(adapter, budget="25%")
    >>> small.bytes <= adapter.bytes / 4, lt.compare(adapter, small).relative_error < 0.5
    (True, True)
    """
    check_allocation(allocation, lora=isinstance(adapter, LoraAdapter))
    asked = Asked(rank, tolerance, energy, budget)
    if isinstance(adapter, Tucker2):
        return _truncate_tucker2(adapter, asked)
    check_adapter(adapter)
    if isinstance(adapter, LoraAdapter):
        goal = _lora_goal(adapter, asked)
        modules = lower_ranks(_updates(adapter), goal, adapter.dtype, allocation)
        return replace(adapter, modules=modules)
    if isinstance(adapter, CompressedAdapter):
        if rank is not None:
            raise RankError(
                f"rank is {shown(rank)}; the ranks of a compressed adapter follow from its size: "
                "give a tolerance, an energy or a budget, or export it first"
            )
        return compress(
            adapter, budget=budget, tolerance=tolerance, energy=energy, progress=progress
        )
    sources = [lotr_source(group, adapter.dtype) for group in adapter.groups]
    goal = groups_goal(asked, sources, adapter.dtype)
    groups = fit_groups(sources, goal, adapter.dtype, progress)
    return LotrAdapter(groups, adapter.config, adapter.dtype, adapter.extras)


def _truncate_tucker2(found: Tucker2, asked: Asked) -> Tucker2:
    item = itemsize(found.core)
    goal = asked.goal(item, item * found.parameters, sum(found.shape), found.max_rank)
    return truncate_to_goal(found, goal)


def padded_rank(adapter: LoraAdapter, budget: int | str) -> int:
    """Largest common rank within ``budget``, where every module is padded to it.

    Raises
    ------
    RankError
        If rank 1 needs more.
    """
    most = max(module.rank for module in adapter.modules)
    each = sum(sum(module.shape) for module in adapter.modules)
    return min(most, (_lora_goal(adapter, Asked(budget=budget)).parameters or 0) // each)


def _lora_goal(adapter: LoraAdapter, asked: Asked) -> Goal:
    shapes = [module.shape for module in adapter.modules]
    ranks = {module.name: module.rank for module in adapter.modules}
    return lora_goal(asked, shapes, ranks, adapter.dtype, adapter.bytes)


def _updates(adapter: LoraAdapter) -> list[Update]:
    """The singular value decomposition of every module; of a large adapter the values alone."""
    found = []
    for module in adapter.modules:
        again = partial(_svd, module, adapter.dtype)
        svd = again()
        sizes = module.name, module.embedding, module.shape, svd.values
        made = again if isinstance(module, LazyModule) else partial(held, svd)
        found.append(Update(*sizes, made, partial(_distance2, module), whole=module))
    return found


def _svd(module: LoraModule, dtype: np.dtype) -> SliceSvd:
    svd = slice_svds(module_stack([module]))[0]
    left, right = narrowed(svd.left, svd.right, dtype)  # all modules' are held at once
    return SliceSvd(left, svd.values, right)


def _distance2(module: LoraModule, b: np.ndarray, a: np.ndarray) -> float:
    """‖ΔW − B A‖² from thin factors, in float64."""
    pairs = (module.factors(), (b, a))
    first, second = (
        LowRankStack.of_constants([x.astype(float)], [y.astype(float)]) for x, y in pairs
    )
    return float((first - second).norms2()[0])
