"""merge: an adapter's update goes into the weights of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from lotrtensor.adapters.deltas import WEIGHT
from lotrtensor.adapters.formats.checkpoint import (
    Checkpoint,
    open_checkpoint,
    rewrite_checkpoint,
)
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import DataError, FormatError

Factors = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Makes the factors B (m × r) and A (r × n) of one module's ΔW when they are asked for."""


def merge(
    base: str | os.PathLike[str],
    adapter: Adapter,
    output: str | os.PathLike[str],
    *,
    force: bool = False,
) -> tuple[str, ...]:
    """Write base + ΔW as a checkpoint, shard by shard, every tensor in its own type.

    Parameters
    ----------
    base : path-like
        Checkpoint directory in safetensors form, or a single file.
    adapter : LoraAdapter or LotrAdapter
        The adapter; its carried tensors do not apply to a plain checkpoint and are refused.
    output : path-like
        Directory to make. The configuration and tokenizer beside the weights are copied; a single
        file becomes ``model.safetensors``.
    force : bool
        Replace a checkpoint directory that stands there.

    Returns
    -------
    tuple of str
        Keys of the tensors that were changed.

    Raises
    ------
    FormatError
        If a module has no weight in the checkpoint or one of another shape, the adapter carries
        tensors, or the output cannot be written; nothing has changed then.
    DataError
        If a weight is quantised, or a sum is beyond its type.

    Notes
    -----
    The sum is taken in float32 (float64 for weights in float64) and rounded once. Memory holds one
    weight and its update at a time.
    """
    source = open_checkpoint(Path(base))
    if adapter.extras:
        raise FormatError(
            f"the adapter carries {next(iter(adapter.extras))}, which merge does not write; use "
            "PEFT's merge_and_unload"
        )
    packed = source.packed()
    updates: dict[str, Factors] = {}
    for name, (shape, embedding, factors) in _updates(adapter).items():
        key = _find_key(source, name, packed)
        turned = embedding or bool(adapter.config.get("fan_in_fan_out"))
        expected = shape[::-1] if turned else shape
        if source.tensors[key].shape != expected:
            raise FormatError(
                f"{base}: {key} is {source.tensors[key].shape}, the adapter's update is "
                f"{expected}; they belong to different models"
            )
        source.dtype(key)
        updates[key] = partial(_transposed, factors) if turned else factors

    def change(key: str) -> np.ndarray:
        return _summed(source, key, *updates[key]())

    rewrite_checkpoint(source, Path(output), updates, change, force=force)
    return tuple(sorted(updates))


def _updates(adapter: Adapter) -> dict[str, tuple[tuple[int, int], bool, Factors]]:
    """Shape of ΔW, whether it is an embedding's, and its factors, by module."""
    if isinstance(adapter, LoraAdapter):
        return {m.name: (m.shape, m.embedding, partial(_factors, m)) for m in adapter.modules}
    return {
        name: (group.shape, group.embedding, partial(_slice_factors, tucker2, k))
        for group in adapter.groups
        for tucker2 in (group.tucker2(),)
        for k, name in enumerate(group.modules)
    }


def _factors(module: LoraModule) -> tuple[np.ndarray, np.ndarray]:
    return module.B, module.A


def _slice_factors(tucker2: Tucker2, k: int) -> tuple[np.ndarray, np.ndarray]:
    return tucker2.left, tucker2.core[k] @ tucker2.right.T


def _transposed(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    b, a = factors()
    return a.T, b.T


def _summed(source: Checkpoint, key: str, b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """W + B A, rounded once to the type of W."""
    weight = source.read(key)
    wide = np.float64 if weight.dtype == np.float64 else np.float32
    summed = b.astype(wide) @ a.astype(wide)
    summed += weight
    with np.errstate(over="ignore"):
        found: np.ndarray = summed.astype(weight.dtype)
    if not np.isfinite(found).all():
        cause = (
            f"the sum does not fit into {weight.dtype.name}: convert the checkpoint to float32"
            if np.isfinite(weight).all()
            else "the weight holds NaN or infinite values; expected finite numbers"
        )
        raise DataError(f"{source.directory / source.tensors[key].file}: {key}: {cause}")
    return found


def _find_key(source: Checkpoint, name: str, packed: dict[str, str]) -> str:
    """Key of a module's weight; a model saved with a head has its base model's name in front."""
    key = name + WEIGHT
    if key in source.tensors:
        return key
    found = [k for k in source.tensors if k.endswith("." + key) or key.endswith("." + k)]
    if len(found) == 1:
        return found[0]
    quantised = next((packed[m] for m in packed if m == name or m.endswith("." + name)), None)
    if not found and quantised:
        raise DataError(
            f"{source.directory}: {quantised} is quantised and there is no {key}; dequantise the "
            "checkpoint first"
        )
    raise FormatError(
        f"{source.directory} has {len(found) or 'no'} weights for {name}; the adapter belongs "
        "to another model"
    )
