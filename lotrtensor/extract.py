"""extract: the difference of two checkpoints becomes an adapter; merge: an adapter's goes back."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lotrtensor.adapters.formats.checkpoint import (
    Checkpoint,
    open_checkpoint,
    rewrite_checkpoint,
)
from lotrtensor.adapters.formats.tensors import BFLOAT16
from lotrtensor.adapters.grouping import Slot, group_modules
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import LotrGroup
from lotrtensor.compare import lora_factors
from lotrtensor.convert import Progress, fit_groups
from lotrtensor.core.dense import LazyStack
from lotrtensor.core.goals import Rank
from lotrtensor.errors import FormatError, LotrWarning
from lotrtensor.groups import SourceGroup
from lotrtensor.sizes import check_dtype

_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared)$")
_WEIGHT = ".weight"


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    rank: Rank | None = None,
    tolerance: float | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    group_by: str = "type",
    modules: str | None = None,
    fan_in_fan_out: bool = False,
    dtype: np.dtype | str | None = None,
    progress: Progress | None = None,
) -> LotrAdapter:
    """Fit a LoTR to the weight deltas of two checkpoints, ΔW_k = tuned_k − base_k.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoint directories in safetensors form, sharded or not, or single files.
    rank, tolerance, energy, budget
        How far; exactly one of them, as for `convert`. Shares are of the bytes of the deltas.
    group_by : str
        As for `convert`; ``"none"`` gives every module factors of its own, for a LoRA.
    modules : str, optional
        Regular expression; only modules in whose path it occurs. All two-dimensional weights if
        not given.
    fan_in_fan_out : bool
        Whether weights are stored in × out, as GPT-2's are.
    dtype : dtype, optional
        Type to store in; the tuned checkpoint's own if not given.
    progress : callable, optional
        Told of every group before it is decomposed.

    Returns
    -------
    LotrAdapter
        Modules that do not differ are left out.

    Raises
    ------
    FormatError
        If a checkpoint cannot be read, no weight matches or none differs.
    RankError
        If the goal is out of range, or not exactly one is given.

    Warns
    -----
    LotrWarning
        If tensors differ that are no matrices, or are in one checkpoint only: they are not part
        of the adapter.

    Notes
    -----
    Every pass reads the two checkpoints slice by slice; one slice of each is in memory.
    """
    first, second = open_checkpoint(Path(base)), open_checkpoint(Path(tuned))
    names = _common_weights(first, second, modules)
    _warn_of_others(first, second, names)
    store = check_dtype(dtype) if dtype is not None else second.read(names[0] + _WEIGHT).dtype
    slots = []
    for name in names:
        embedding = bool(_EMBEDDING.search(name))
        m, n = first.shapes[name + _WEIGHT]
        slots.append(Slot(name, (n, m) if embedding or fan_in_fan_out else (m, n), embedding))
    if group_by == "none":
        members = {slot.name: [slot] for slot in slots}
    else:
        members = group_modules(slots, group_by)
    sources = [
        _source(name, group, first, second, fan_in_fan_out) for name, group in members.items()
    ]
    groups = fit_groups(
        sources,
        rank=rank,
        tolerance=tolerance,
        energy=energy,
        budget=budget,
        dtype=store,
        progress=progress,
    )
    changed = tuple(_changed(group) for group in groups if group.fit and group.fit.norm)
    if not changed:
        raise FormatError(f"{tuned} has the same weights as {base}; there is nothing to extract")
    config = {
        "base_model_name_or_path": str(base),
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": sorted(name for group in changed for name in group.modules),
    }
    return LotrAdapter(changed, config, store)


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
        Checkpoint directory in safetensors form.
    adapter : LoraAdapter or LotrAdapter
        The adapter; its carried tensors do not apply to a plain checkpoint and are refused.
    output : path-like
        Directory to make; files beside the weights are copied.
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

    Notes
    -----
    The sum is taken in float32 and rounded once.
    """
    source = open_checkpoint(Path(base))
    if adapter.extras:
        raise FormatError(
            f"the adapter carries {next(iter(adapter.extras))}, which merge does not write; use "
            "PEFT's merge_and_unload"
        )
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    embeddings = {m.name for m in getattr(adapter, "modules", ()) if m.embedding}
    embeddings |= {n for g in getattr(adapter, "groups", ()) if g.embedding for n in g.modules}
    updates = {}
    for name, stack in lora_factors(adapter).items():
        key = _find_key(source, name)
        b, a = stack.factors(0)
        updates[key] = (a.T, b.T) if transposed or name in embeddings else (b, a)
        shape = (updates[key][0].shape[0], updates[key][1].shape[1])
        if source.shapes[key] != shape:
            raise FormatError(
                f"{base}: {key} is {source.shapes[key]}, the adapter's update is {shape}; they "
                "belong to different models"
            )

    def change(key: str, tensor: np.ndarray) -> np.ndarray:
        if key not in updates:
            return tensor
        b, a = updates[key]
        wide = np.float64 if tensor.dtype == np.float64 else np.float32
        summed: np.ndarray = tensor.astype(wide) + b.astype(wide) @ a.astype(wide)
        return summed.astype(tensor.dtype)

    rewrite_checkpoint(source, Path(output), change, force=force)
    return tuple(sorted(updates))


def _common_weights(base: Checkpoint, tuned: Checkpoint, pattern: str | None) -> list[str]:
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise FormatError(f"modules {pattern!r} is no regular expression: {error}") from error
    names = []
    for key, shape in base.shapes.items():
        if not key.endswith(_WEIGHT) or len(shape) != 2 or not wanted.search(key):
            continue
        if key not in tuned.shapes:
            continue
        if tuned.shapes[key] != shape:
            raise FormatError(
                f"{tuned.directory}: {key} is {tuned.shapes[key]}, in {base.directory} it is "
                f"{shape}; the checkpoints belong to different models"
            )
        names.append(key.removesuffix(_WEIGHT))
    if not names:
        raise FormatError(
            f"{base.directory} and {tuned.directory} have no two-dimensional weight in common"
            + (f" that matches {pattern!r}" if pattern else "")
        )
    return names


def _warn_of_others(base: Checkpoint, tuned: Checkpoint, names: Sequence[str]) -> None:
    """Tell of what an adapter cannot hold: other tensors that differ, or that one side lacks."""
    covered = {name + _WEIGHT for name in names}
    lost = sorted(base.shapes.keys() ^ tuned.shapes.keys())
    for key, shape in base.shapes.items():
        if key in covered or key not in tuned.shapes or len(shape) == 2:
            continue
        if tuned.shapes[key] != shape or _differs(base, tuned, key):
            lost.append(key)
    if lost:
        warnings.warn(
            f"{len(lost)} tensors that are no matrices differ and are not part of the adapter, "
            f"such as {lost[0]}",
            LotrWarning,
            stacklevel=3,
        )


def _differs(base: Checkpoint, tuned: Checkpoint, key: str) -> bool:
    try:
        return not np.array_equal(base.read(key), tuned.read(key))
    except ValueError:  # a type that is not read, an integer buffer say, is no update either
        return False


def _source(
    name: str, slots: Sequence[Slot], base: Checkpoint, tuned: Checkpoint, fan_in_fan_out: bool
) -> SourceGroup:
    transposed = fan_in_fan_out or slots[0].embedding

    def read(k: int) -> np.ndarray:
        key = slots[k].name + _WEIGHT
        delta: np.ndarray = _widen(tuned.read(key)) - _widen(base.read(key))
        return delta.T if transposed else delta

    m, n = slots[0].shape
    like = np.empty(0, _widen(base.read(slots[0].name + _WEIGHT)[:0]).dtype)
    stack = LazyStack(read, (len(slots), m, n), like=like)
    parameters = len(slots) * m * n
    itemsize = tuned.read(slots[0].name + _WEIGHT).dtype.itemsize
    return SourceGroup(
        name=name,
        modules=tuple(slot.name for slot in slots),
        stack=stack,
        slice_ranks=None,
        embedding=slots[0].embedding,
        parameters=parameters,
        bytes=parameters * itemsize,
    )


def _widen(tensor: np.ndarray) -> np.ndarray:
    if tensor.dtype == BFLOAT16 or tensor.dtype == np.float16:
        return tensor.astype(np.float32)
    return tensor


def _changed(group: LotrGroup) -> LotrGroup:
    """Leave out the modules whose update is zero."""
    cores = group.tucker2().core
    kept = [k for k in range(len(group.modules)) if cores[k].any()]
    return replace(
        group,
        modules=tuple(group.modules[k] for k in kept),
        cores=tuple(group.cores[k] for k in kept),
        slice_ranks=tuple(group.slice_ranks[k] for k in kept),
    )


def _find_key(source: Checkpoint, name: str) -> str:
    """Key of a module's weight; a model saved with a head has its base model's name in front."""
    key = name + _WEIGHT
    if key in source.shapes:
        return key
    found = [k for k in source.shapes if k.endswith("." + key) or key.endswith("." + k)]
    if len(found) != 1:
        raise FormatError(
            f"{source.directory} has {len(found) or 'no'} weights for {name}; the adapter belongs "
            "to another model"
        )
    return found[0]
