"""Numbers on their way from an adapter into layers: types that hold them, scales taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lotrtensor.adapters.parts import GroupParts
from lotrtensor.errors import DataError, OptionError
from lotrtensor.torch.groups import GroupPlan
from lotrtensor.torch.sources import from_numpy

COMPUTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that layers compute in."""

LOST = 0.1
"""Relative error from which on a type is said not to hold numbers: above that of four bits."""


class GroupNumbers(NamedTuple):
    """Numbers of a group: U, V, and a core and private factors for each of its layers.

    ``left``, ``cores`` and ``right`` are of rank 0 where nothing is shared; ``private`` is empty
    where no layer has a private part.
    """

    plan: GroupPlan
    left: Tensor
    cores: Sequence[Tensor]
    right: Tensor
    private: Sequence[tuple[Tensor, Tensor]] = ()


def group_numbers(plan: GroupPlan, parts: GroupParts, dtype: torch.dtype) -> GroupNumbers:
    """Return the numbers of a group in the order of ``plan``, its scale taken out of the cores.

    Raises
    ------
    DataError
        If ``dtype`` does not hold them: they would become zero or infinite.
    """
    order = [parts.modules.index(name) for name in plan.modules]
    name = f"group {plan.name!r}"
    left, right = (cast([side], dtype, name)[0] for side in (parts.left, parts.right))
    cores = cast([parts.core[k] / plan.scale for k in order], dtype, name)
    pairs = [parts.private[k] for k in order] if parts.private else []
    sides = [cast([pair[side] for pair in pairs], dtype, name) for side in (0, 1)]
    return GroupNumbers(plan, left, cores, right, list(zip(*sides, strict=True)))


def cast(arrays: Sequence[np.ndarray], dtype: torch.dtype, name: str) -> list[Tensor]:
    """Return arrays as tensors of a type.

    Raises
    ------
    DataError
        If the type does not hold them, seen together: what is small beside the others may be lost.
    """
    found = [from_numpy(x).to(dtype) for x in arrays]
    wide = [x.astype(np.float64) for x in arrays]
    lost2 = sum(
        float(((x.double().numpy() - y) ** 2).sum()) for x, y in zip(found, wide, strict=True)
    )
    norm2 = sum(float((y**2).sum()) for y in wide)
    if not lost2 <= LOST**2 * norm2:
        largest = max(float(np.max(np.abs(y), initial=0.0)) for y in wide)
        raise DataError(
            f"{name} has entries up to {largest:.3g}, which {str(dtype).removeprefix('torch.')} "
            "does not hold; load it as float32"
        )
    return found


def check_dtype(dtype: object) -> torch.dtype | None:
    """Return a type for factors, or None.

    Raises
    ------
    OptionError
        If it is none that layers compute in.
    """
    if dtype is None:
        return None
    known = next((t for t in COMPUTED if dtype is t), None)
    if known is None:
        raise OptionError(
            f"dtype is {str(dtype)[:40]!r}; expected torch.float32, torch.float16, "
            "torch.bfloat16 or torch.float64"
        )
    return known
