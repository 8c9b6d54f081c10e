"""extract: the difference of two checkpoints becomes an adapter."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from lotrtensor.adapters.deltas import Resized
from lotrtensor.adapters.grouping import Slot, group_modules
from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.sizes import check_dtype
from lotrtensor.core.dense_svd import dense_svd
from lotrtensor.core.linalg import largest_entry, norm2, squares_hold
from lotrtensor.core.options import check_choice
from lotrtensor.core.ranks.goal import Goal, Rank
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.stacks.dense import LazyStack
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import DataError, LotrWarning
from lotrtensor.verbs._compare import lora_factors
from lotrtensor.verbs._fit_groups import WIDEST, Progress, fit_groups, warn_unconverged
from lotrtensor.verbs._goals import (
    Allocation,
    Asked,
    check_allocation,
    groups_goal,
    lora_goal,
)
from lotrtensor.verbs._lower_ranks import Update, held, lower_ranks
from lotrtensor.verbs._sources import SourceGroup
from lotrtensor.verbs._tuned_weights import TunedWeights, tuned_weights


@on_one_thread
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    rank: Rank | None = None,
    tolerance: float | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    form: Literal["lotr", "lora"] = "lotr",
    group_by: str = "type",
    allocation: Allocation = "optimal",
    modules: str | None = None,
    fan_in_fan_out: bool | str = False,
    embeddings: str | None = None,
    resized: Resized = "refuse",
    dtype: np.dtype | str | None = None,
    progress: Progress | None = None,
) -> LoraAdapter | LotrAdapter:
    """Fit an adapter to the weight deltas of two checkpoints, ΔW_k = tuned_k − base_k.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoint directories in safetensors form, sharded or not, or single files.
    rank, tolerance, energy, budget : optional
        How far; exactly one of them, as for `convert`. Shares are of the bytes of the matrices
        that differ.
    form : str
        ``"lotr"``: factors shared by groups; ``"lora"``: a pair of factors per module.
    group_by : str
        LoTR: as for `convert`; ``"none"`` gives every module factors of its own.
    allocation : str
        LoRA: how ranks follow from a tolerance, energy or budget; see `truncate`.
    modules : str, optional
        Regular expression; only modules in whose path it occurs. All two-dimensional weights if
        not given.
    fan_in_fan_out : bool or str
        Modules whose weights are stored in × out, as GPT-2's Conv1D layers are: a regular
        expression that occurs in their paths, or True for all. Asked for where neither the class
        of the model nor shapes and biases tell.
    embeddings : str, optional
        Regular expression that occurs in the paths of embeddings; asked for where neither the
        class of the model nor names tell.
    resized : str
        A weight of which one checkpoint has more rows, a larger vocabulary: ``"refuse"``, or
        ``"common-rows"``, which takes those that both have.
    dtype : dtype, optional
        Type to store in; the tuned checkpoint's own if not given.
    progress : callable, optional
        Called for every group or module before it is decomposed.

    Returns
    -------
    LotrAdapter or LoraAdapter
        Modules that do not differ are left out.

    Raises
    ------
    FormatError
        If a checkpoint cannot be read, no weight matches or none differs.
    DataError
        If a weight that differs is quantised, or holds NaN or infinite values, or ``form`` is
        unknown.
    RankError
        If the goal is out of range, or not exactly one is given, or ``allocation`` is unknown or
        ``"uniform"`` for a LoTR.

    Warns
    -----
    LotrWarning
        If tensors differ that are no weight matrices, or are in one checkpoint only: they are not
        part of the adapter. If weights are carried in full, or rows are left out.

    Notes
    -----
    LoTR: every pass reads the two checkpoints slice by slice; one slice of each is in memory.
    LoRA: every module is read once, its leading singular vectors are found by block Lanczos, at
    most `WIDEST` of them where a budget decides, and once more to measure what a tolerance allows.

    What a weight belongs to is asked of the class that ``config.json`` of the base names, where
    transformers is installed and has it. Modules then have the paths of today's transformers; the
    update of a weight that several modules share applies to all of them; and a weight that is used
    without its module being called, or that belongs to a custom layer, is carried in full in
    ``modules_to_save``, because an adapter there would change nothing.

    Examples
    --------
    >>> import tempfile, numpy as np, lotrtensor as lt
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     base, tuned = (f"{folder}/{name}.safetensors" for name in ("base", "tuned"))
    ...     for path, entry in ((base, 0.0), (tuned, 1.0)):
    ...         save_file({"layers.0.query.weight": np.full((4, 6), entry, "float32")}, path)
    ...     adapter = lt.extract(base, tuned, rank=1)
    >>> adapter.groups[0].modules, adapter.relative_error < 1e-6
    (('layers.0.query',), True)
    """
    check_choice(form, "form", ("lotr", "lora"))
    check_allocation(allocation, lora=form == "lora")
    weights = tuned_weights(
        base,
        tuned,
        modules=modules,
        resized=resized,
        fan_in_fan_out=fan_in_fan_out,
        embeddings=embeddings,
    )
    store = check_dtype(dtype) if dtype is not None else weights.dtype()
    slots, extras, config = weights.slots(), weights.carried(store), weights.config(str(base))
    asked = Asked(rank, tolerance, energy, budget)
    if form == "lora":
        largest = {slot.name: min(slot.shape) for slot in slots}
        whole = sum(_bytes(slot, weights) for slot in slots)
        goal = lora_goal(asked, [slot.shape for slot in slots], largest, store, whole)
        updates = _updates(slots, weights, goal, progress)
        return LoraAdapter(lower_ranks(updates, goal, store, allocation), config, store, extras)
    alone = isinstance(group_by, str) and group_by == "none"
    members = {s.name: [s] for s in slots} if alone else group_modules(slots, group_by)
    sources = [_source(name, group, weights) for name, group in members.items()]
    groups = fit_groups(sources, groups_goal(asked, sources, store), store, progress)
    found = (_changed(group, weights.parameters) for group in groups)
    changed = tuple(group for group in found if group.fit and group.fit.norm)
    if not changed:
        raise DataError(f"{tuned} differs from {base} by too little to be squared; scale both up")
    return LotrAdapter(changed, config, store, extras)


@on_one_thread
def extraction_error(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    adapter: Adapter,
    *,
    modules: str | None = None,
    resized: Resized = "refuse",
    fan_in_fan_out: bool | str = False,
    embeddings: str | None = None,
) -> float:
    """Relative Frobenius error of an adapter against the weight deltas of two checkpoints.

    √(Σ_k ‖ΔW_k − Δ̃W_k‖² / Σ_k ‖ΔW_k‖²) over all two-dimensional weights that differ, or those
    that ``modules`` matches, except those that the adapter carries in full. Each checkpoint is
    read once, one slice at a time. Norms are summed in float64.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoints, as for `extract`.
    adapter : LoraAdapter or LotrAdapter
        The adapter; a module that it lacks counts as zero.
    modules : str, optional
        Regular expression, as for `extract`.
    resized : str
        As for `extract`.
    fan_in_fan_out : bool or str
        As for `extract`.
    embeddings : str, optional
        As for `extract`.

    Returns
    -------
    float
        The error.

    Examples
    --------
    >>> import tempfile, numpy as np, lotrtensor as lt
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     base, tuned = (f"{folder}/{name}.safetensors" for name in ("base", "tuned"))
    ...     for path, entries in ((base, np.zeros(2)), (tuned, np.array([4.0, 3.0]))):
    ...         save_file({"layers.0.query.weight": np.diag(entries)}, path)
    ...     adapter = lt.extract(base, tuned, rank=1)
    ...     print(round(lt.extraction_error(base, tuned, adapter), 6))
    0.6
    """
    check_adapter(adapter)
    with warnings.catch_warnings():  # extract has said it
        warnings.simplefilter("ignore", LotrWarning)
        weights = tuned_weights(
            base,
            tuned,
            modules=modules,
            resized=resized,
            fan_in_fan_out=fan_in_fan_out,
            embeddings=embeddings,
        )
    found = lora_factors(adapter)
    whole = SquaredError()
    for slot in weights.slots():
        delta = weights.read(slot.name)
        whole2 = float(norm2(delta))
        if slot.name in found:
            delta -= found[slot.name].slice(0).astype(delta.dtype)
        whole += SquaredError(float(norm2(delta)), whole2)
    return whole.relative


def _source(name: str, slots: Sequence[Slot], weights: TunedWeights) -> SourceGroup:
    m, n = slots[0].shape

    def read(k: int) -> np.ndarray:
        return weights.read(slots[k].name)

    # Deltas beyond the range of float32's squares are few, and show in the first.
    wide = any(_in_doubles(slot, weights) for slot in slots)
    like = np.empty(0, np.float64 if wide else _delta(slots[0], weights).dtype)
    return SourceGroup.of(
        LazyStack(read, (len(slots), m, n), like=like),
        name=name,
        modules=tuple(slot.name for slot in slots),
        slice_ranks=None,
        embedding=slots[0].embedding,
        parameters=len(slots) * m * n,
        bytes=sum(_bytes(slot, weights) for slot in slots),
    )


def _bytes(slot: Slot, weights: TunedWeights) -> int:
    """Bytes of the weight that was tuned."""
    base, tuned = weights.deltas.base, weights.deltas.tuned
    return sum(
        math.prod(base.tensors[key].shape) * tuned.dtype(key).itemsize
        for key in weights.keys(slot.name)
    )


def _in_doubles(slot: Slot, weights: TunedWeights) -> bool:
    """Whether one of the checkpoints stores a weight in eight bytes a number."""
    both = weights.deltas.base, weights.deltas.tuned
    return any(one.dtype(key).itemsize == 8 for key in weights.keys(slot.name) for one in both)


def _delta(slot: Slot, weights: TunedWeights) -> np.ndarray:
    """ΔW in a type that holds its squares.

    Raises
    ------
    DataError
        If none does.
    """
    delta = weights.read(slot.name)
    largest = largest_entry(delta)
    if squares_hold(largest, delta):
        return delta
    delta = delta.astype(np.float64)
    if not squares_hold(largest, delta):
        raise DataError(
            f"{slot.name} differs by up to {largest:.3g}, whose square no type holds; scale both "
            "checkpoints"
        )
    return delta


def _updates(
    slots: Sequence[Slot], weights: TunedWeights, goal: Goal, progress: Progress | None
) -> list[Update]:
    """The leading singular vectors of every module's delta, as many as the goal can need."""
    costs = [sum(slot.shape) for slot in slots]
    updates, open_ends = [], []
    for done, (slot, cost) in enumerate(zip(slots, costs, strict=True)):
        if progress:
            progress(slot.name, done, len(slots))
        rank = goal.rank and goal.rank[0]
        if goal.parameters is not None:
            # What is left for this module where every other one has rank 1.
            rank = min(WIDEST, max(1, (goal.parameters - sum(costs)) // cost + 1))
        found = dense_svd(_delta(slot, weights), rank, goal.tolerance or 0.0)
        if not found.converged:
            open_ends.append(slot.name)
        error2 = partial(_error2, slot, weights)
        sizes = slot.name, slot.embedding, slot.shape, found.svd.values
        updates.append(Update(*sizes, partial(held, found.svd), error2, found.lost2))
    if open_ends:
        warn_unconverged("modules", open_ends, len(slots))
    return updates


def _error2(slot: Slot, weights: TunedWeights, b: np.ndarray, a: np.ndarray) -> float:
    """‖ΔW − B A‖² of one module."""
    delta = _delta(slot, weights)
    delta -= b.astype(delta.dtype) @ a.astype(delta.dtype)
    return float(norm2(delta))


def _changed(group: LotrGroup, parameters: Mapping[str, str]) -> LotrGroup:
    """Leave out the modules whose update is zero; but no expert of a fused parameter."""
    cores, names = group.tucker2().core, group.modules
    kept = [k for k, name in enumerate(names) if name in parameters or cores[k].any()]
    return replace(
        group,
        modules=tuple(group.modules[k] for k in kept),
        cores=tuple(group.cores[k] for k in kept),
        slice_ranks=tuple(group.slice_ranks[k] for k in kept),
    )
