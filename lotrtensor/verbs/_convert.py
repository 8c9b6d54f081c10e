"""convert: a LoRA adapter becomes a LoTR."""

from __future__ import annotations

import numpy as np

from lotrtensor.adapters.formats.native import COMMON_FIELDS
from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.sizes import check_dtype
from lotrtensor.core.ranks.goal import Rank, check_rank
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import RankError, UnsupportedAdapterError
from lotrtensor.verbs._fit_groups import Progress, fit_groups
from lotrtensor.verbs._goals import Asked, groups_goal
from lotrtensor.verbs._sources import lora_groups, source_group, split_groups

DEFAULT_BUDGET = "25%"
"""What `convert` keeps where nothing else is asked for: a quarter of the bytes."""


@on_one_thread
def convert(
    adapter: Adapter,
    *,
    rank: Rank | None = None,
    tolerance: float | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    group_by: str = "type",
    cluster: int | None = None,
    dtype: np.dtype | str | None = None,
    progress: Progress | None = None,
) -> LotrAdapter:
    """Convert a LoRA adapter into LoTR form, ΔW_k ≈ U · G_k · Vᵀ with U, V shared by a group.

    At most one of ``rank``, ``tolerance``, ``energy`` and ``budget`` says how far; with none of
    them the budget is `DEFAULT_BUDGET`, a quarter of the adapter's bytes.

    Parameters
    ----------
    adapter : LoraAdapter
        The trained adapter.
    rank : int or (int, int), optional
        Left and right rank (p, q) of every group; a group that needs less gets what it needs.
    tolerance : float, optional
        Relative Frobenius error, in (0, 1), that the whole adapter as stored does not exceed.
    energy : float, optional
        Share of Σ ‖ΔW_k‖², in (0, 1), to keep: a tolerance of √(1 − energy).
    budget : int or str, optional
        Bytes of all groups together: a number, ``"500KB"``, ``"25%"`` of the adapter's, or
        parameters, ``"20000p"``.
    group_by : str
        Which modules share factors: ``"type"``, ``"shape"`` or patterns; see `group_modules`.
    cluster : int, optional
        Split every group's slices among this many pairs of factors, each slice to the pair that
        suits it best.
    dtype : dtype, optional
        Type to store in; the adapter's own if not given.
    progress : callable, optional
        Called for every group before it is decomposed.

    Returns
    -------
    LotrAdapter
        Its ``summary`` has the relative Frobenius error and lower bound of every group, storage
        type included.

    Raises
    ------
    UnsupportedAdapterError
        If the adapter is no LoRA.
    RankError
        If a rank is below 1 or larger than every group can need, a tolerance is out of reach, or
        a budget is below the smallest decomposition.

    Notes
    -----
    The cores of a group cost K p q numbers, its factors m p + n q; LoRA's cost Σ r_k (m + n). One
    tolerance or budget is distributed over the groups so that the total size or error is least, on
    their rate–distortion curves.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> lotr = lt.convert(adapter, budget="25%")
    >>> lotr.bytes <= adapter.bytes / 4, lotr.relative_error < 0.5
    (True, True)
    """
    adapter = check_lora(adapter)
    asked = Asked(rank, tolerance, energy, budget)
    unasked = asked.nothing
    if unasked:
        asked = Asked(budget=DEFAULT_BUDGET)
    members = lora_groups(adapter, group_by)
    if cluster is not None:
        members = split_groups(members, cluster, None if rank is None else check_rank(rank))
    sources = [source_group(name, group, adapter.dtype) for name, group in members]
    store = check_dtype(dtype) if dtype is not None else adapter.dtype
    try:
        goal = groups_goal(asked, sources, store)
    except RankError as error:
        if not unasked:
            raise
        raise RankError(
            f"no rank is given, and {DEFAULT_BUDGET} of the bytes is too little: {error}"
        ) from error
    groups = fit_groups(sources, goal, store, progress)
    config = {key: adapter.config[key] for key in COMMON_FIELDS if key in adapter.config}
    return LotrAdapter(groups, config, groups[0].left.dtype, adapter.extras)


def check_lora(adapter: Adapter) -> LoraAdapter:
    """Return an adapter that can be brought into LoTR form.

    Raises
    ------
    UnsupportedAdapterError
        If it is in that form already.
    """
    check_adapter(adapter)
    if not isinstance(adapter, LoraAdapter):
        raise UnsupportedAdapterError(
            "the adapter is in LoTR form already; expected a LoRA: truncate it, or export it first"
        )
    return adapter
