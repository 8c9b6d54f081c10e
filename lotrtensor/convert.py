"""The verbs: a LoRA becomes a LoTR; two adapters are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lotrtensor.adapters.formats.native import COMMON_FIELDS
from lotrtensor.adapters.formats.tensors import FLOATS
from lotrtensor.adapters.grouping import Slot, group_modules, layer_order
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import FitRecord, LoraModule, LotrGroup, store_group
from lotrtensor.core.fit import Rank, check_rank, tucker2
from lotrtensor.core.residual import relative_errors
from lotrtensor.core.stacks import LowRankStack
from lotrtensor.errors import DataError, FormatError, UnsupportedAdapterError

Progress = Callable[[str, int, int], None]
"""Called with a group's name, how many groups are done and how many there are."""


def convert(
    adapter: Adapter,
    *,
    rank: Rank,
    group_by: str = "type",
    dtype: np.dtype | str | None = None,
    progress: Progress | None = None,
) -> LotrAdapter:
    """Convert a LoRA adapter into LoTR form, ΔW_k ≈ U · G_k · Vᵀ with U, V shared by a group.

    Parameters
    ----------
    adapter : LoraAdapter
        The trained adapter.
    rank : int or (int, int)
        Left and right rank (p, q) of every group; a group that needs less gets what it needs.
    group_by : str
        Which modules share factors: ``"type"``, ``"shape"`` or patterns; see `group_modules`.
    dtype : dtype, optional
        Type to store in; the adapter's own if not given.
    progress : callable, optional
        Told of every group before its fit.

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
        If a rank is below 1 or larger than every group can need.

    Notes
    -----
    The cores of a group cost K p q numbers, its factors m p + n q; LoRA's cost Σ r_k (m + n).
    """
    if not isinstance(adapter, LoraAdapter):
        raise UnsupportedAdapterError(
            "the adapter is in LoTR form already; expected a LoRA: export it first to convert anew"
        )
    store = check_dtype(dtype) if dtype is not None else adapter.dtype
    modules = {module.name: module for module in adapter.modules}
    slots = [Slot(m.name, m.shape, m.embedding) for m in adapter.modules]
    members = {
        name: [modules[slot.name] for slot in group]
        for name, group in group_modules(slots, group_by).items()
    }
    ranks = _clamp(rank, members)
    groups = []
    for done, (name, group) in enumerate(members.items()):
        if progress:
            progress(name, done, len(members))
        groups.append(_fit_group(name, group, ranks[name], store, adapter.dtype))
    config = {key: adapter.config[key] for key in COMMON_FIELDS if key in adapter.config}
    return LotrAdapter(tuple(groups), config, store, adapter.extras)


class ModuleDifference(NamedTuple):
    """Relative Frobenius difference ‖ΔW_A − ΔW_B‖ / ‖ΔW_A‖ of one module."""

    name: str
    relative_error: float


class Difference(NamedTuple):
    """How far two adapters are apart, A being the reference.

    ``relative_error`` is √(Σ ‖ΔW_A − ΔW_B‖² / Σ ‖ΔW_A‖²) over all modules; ``max_slice_error`` the
    largest of the modules' own.
    """

    relative_error: float
    max_slice_error: float
    modules: tuple[ModuleDifference, ...]


def compare(a: Adapter, b: Adapter) -> Difference:
    """Compare the updates of two adapters module by module, each a LoRA or a LoTR.

    A module that only one of them has counts as zero in the other. The dense ΔW is never built.

    Raises
    ------
    FormatError
        If a module has unlike shapes in the two: they belong to different base models.
    """
    first, second = lora_factors(a), lora_factors(b)
    rows, lost2, norm2 = [], 0.0, 0.0
    for name in sorted(first.keys() | second.keys(), key=layer_order):
        difference2, reference2 = _difference2(name, first.get(name), second.get(name))
        lost2, norm2 = lost2 + difference2, norm2 + reference2
        rows.append(ModuleDifference(name, _ratio(difference2, reference2)))
    worst = max(row.relative_error for row in rows)
    return Difference(_ratio(lost2, norm2), worst, tuple(rows))


def lora_factors(adapter: Adapter) -> dict[str, LowRankStack]:
    """Every module's ΔW as a stack of one slice of thin factors, by module name."""
    if isinstance(adapter, LoraAdapter):
        return {m.name: LowRankStack([m.B], [m.A]) for m in adapter.modules}
    factors = {}
    for group in adapter.groups:
        stack = group.tucker2().to_low_rank()
        for k, name in enumerate(group.modules):
            left, right = stack.factors(k)
            factors[name] = LowRankStack([left], [right])
    return factors


def check_dtype(dtype: np.dtype | str) -> np.dtype:
    """Return a storage type by name.

    Raises
    ------
    DataError
        If it is not one of float32, float16, bfloat16 and float64.
    """
    found = next((known for known in FLOATS if str(dtype) == known.name), None)
    if found is None:
        names = ", ".join(known.name for known in FLOATS)
        raise DataError(f"dtype is {str(dtype)!r}; expected one of {names}")
    return found


def _clamp(rank: Rank, members: dict[str, list[LoraModule]]) -> dict[str, tuple[int, int]]:
    """Ranks of every group: ``rank``, or what the group can need where that is less."""
    largest = {}
    for name, group in members.items():
        total = sum(module.rank for module in group)
        largest[name] = tuple(min(side, total) for side in group[0].shape)
    whole = tuple(max(pair[i] for pair in largest.values()) for i in (0, 1))
    p, q = check_rank(rank, (whole[0], whole[1]))
    return {name: (min(p, pair[0]), min(q, pair[1])) for name, pair in largest.items()}


def _fit_group(
    name: str,
    group: list[LoraModule],
    rank: tuple[int, int],
    dtype: np.dtype,
    source_dtype: np.dtype,
) -> LotrGroup:
    stack = LowRankStack([module.B for module in group], [module.A for module in group])
    fit = tucker2(stack, rank)
    stored = store_group(
        fit.tucker2,
        name=name,
        modules=tuple(module.name for module in group),
        slice_ranks=stack.ranks,
        dtype=dtype,
        embedding=group[0].embedding,
    )
    relative_error, _ = relative_errors(stack, stored.tucker2())
    parameters = sum(module.parameters for module in group)
    return replace(
        stored,
        fit=FitRecord(
            relative_error=relative_error,
            lower_bound=fit.lower_bound,
            norm=math.sqrt(float(stack.norms2().sum())),
            parameters=parameters,
            bytes=parameters * source_dtype.itemsize,
        ),
    )


def _difference2(name: str, a: LowRankStack | None, b: LowRankStack | None) -> tuple[float, float]:
    """Squared norms of ΔW_A − ΔW_B and of ΔW_A."""
    if a is None or b is None:
        present = a or b
        norm2 = float(present.norms2()[0]) if present else 0.0
        return norm2, norm2 if b is None else 0.0
    if a.shape != b.shape:
        raise FormatError(
            f"{name} is {a.shape[1]} × {a.shape[2]} in the first adapter and {b.shape[1]} × "
            f"{b.shape[2]} in the second; they belong to different base models"
        )
    return float((a - b).norms2()[0]), float(a.norms2()[0])


def _ratio(part2: float, whole2: float) -> float:
    if part2 == 0.0:
        return 0.0
    return math.sqrt(part2 / whole2) if whole2 else math.inf
