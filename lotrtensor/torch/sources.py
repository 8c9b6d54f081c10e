"""Turn a LoTR, a LoRA or weight deltas into a LoTR adapter for layers to start from."""

from __future__ import annotations

import os
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.grouping import Slot, group_modules
from lotrtensor.adapters.loading import Adapter, load
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.lotr_group import store_group
from lotrtensor.core.fit.tucker2_fit import tucker2
from lotrtensor.core.stacks.dense import DenseStack
from lotrtensor.errors import DataError, ShapeError, UnsupportedAdapterError
from lotrtensor.torch.groups import Rank, check_grouping, check_rank
from lotrtensor.verbs._convert import convert

Source = str | os.PathLike[str] | Adapter | Mapping[str, Tensor]
"""A directory, an adapter in memory, or weight deltas (m × n) by the path of their layer."""


def as_lotr(source: Source, *, rank: Rank | None = None, group_by: str = "type") -> LotrAdapter:
    """Return ``source`` as a LoTR adapter.

    Parameters
    ----------
    source : path-like, adapter, or mapping of str to tensor
        A LoTR is returned as it is, a LoRA or a compressed adapter converted, deltas ΔW_k (m × n)
        decomposed.
    rank : int or (int, int), optional
        Ranks to convert or decompose to; a group that needs less gets less.
    group_by : str
        Grouping to do so with.

    Raises
    ------
    UnsupportedAdapterError
        If anything but a LoTR is given without ``rank``, or the source is of none of these kinds.
    RankError, ShapeError, DataError
        If the rank, or a delta, has no meaning; the message names the delta.
    """
    if rank is not None:
        rank = check_rank(rank)
    check_grouping(group_by)
    if isinstance(source, str | os.PathLike):
        source = load(source)
    if isinstance(source, LotrAdapter):
        return source
    if isinstance(source, CompressedAdapter) and rank is not None:
        source = source.to_lora()
    if not isinstance(source, LoraAdapter | CompressedAdapter | Mapping):
        raise UnsupportedAdapterError(
            f"the source is a {type(source).__name__}; expected a directory, a LotrAdapter, a "
            "LoraAdapter, or weight deltas by the path of their layer"
        )
    if rank is None:
        kind = _KINDS.get(type(source), "a mapping of weight deltas")
        raise UnsupportedAdapterError(
            f"the source is {kind} and has no LoTR form yet; give the rank to convert it with"
        )
    if isinstance(source, LoraAdapter):
        return convert(source, rank=rank, group_by=group_by)
    assert isinstance(source, Mapping)
    return _decompose(source, rank, group_by)


_KINDS: dict[type, str] = {LoraAdapter: "a LoRA", CompressedAdapter: "a compressed adapter"}


def _decompose(deltas: Mapping[str, Tensor], rank: tuple[int, int], group_by: str) -> LotrAdapter:
    if not deltas:
        raise DataError("there are no weight deltas; expected one (m × n) a layer, by its path")
    arrays = {name: _delta(name, delta) for name, delta in deltas.items()}
    slots = [Slot(name, (x.shape[0], x.shape[1])) for name, x in arrays.items()]
    groups = []
    for name, members in group_modules(slots, group_by).items():
        stack = DenseStack(np.stack([arrays[slot.name] for slot in members]))
        pair = tuple(min(r, most) for r, most in zip(rank, stack.max_rank, strict=True))
        found = tucker2(stack, (pair[0], pair[1])).tucker2
        groups.append(
            store_group(
                found,
                name=name,
                modules=tuple(slot.name for slot in members),
                slice_ranks=(min(pair),) * len(members),
                dtype=np.dtype("float32"),
            )
        )
    return LotrAdapter(tuple(groups), {}, np.dtype("float32"))


def _delta(name: str, delta: Tensor) -> np.ndarray:
    if not isinstance(delta, Tensor) or not delta.is_floating_point():
        kind = delta.dtype if isinstance(delta, Tensor) else type(delta).__name__
        raise DataError(f"the delta of {name} is {kind}; expected a floating-point tensor")
    if delta.ndim != 2:
        raise ShapeError(f"the delta of {name} is {tuple(delta.shape)}; expected (m, n)")
    if not torch.isfinite(delta).all():
        raise DataError(f"the delta of {name} holds NaN or infinite values; expected finite ones")
    return to_numpy(delta.float())


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor as NumPy array, brain floats as ``ml_dtypes.bfloat16``."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    found: np.ndarray = x.numpy()
    return found


def from_numpy(x: np.ndarray) -> Tensor:
    """Return a NumPy array as tensor: the inverse of `to_numpy`."""
    x = np.array(x, order="C")
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
