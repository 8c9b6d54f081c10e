"""merge: add the update of an adapter to the weights of a checkpoint."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping

import numpy as np

from lotrtensor.adapters.architecture import Architecture, read_architecture
from lotrtensor.adapters.deltas import with_tied
from lotrtensor.adapters.expert_weights import ExpertWeights, expert_weights, fused_hint
from lotrtensor.adapters.formats.checkpoint import Checkpoint, open_checkpoint
from lotrtensor.adapters.formats.checkpoint_writer import rewrite_checkpoint
from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.experts import parameter_path
from lotrtensor.adapters.formats.layout import read_kernels
from lotrtensor.adapters.layers import WEIGHT, Layers
from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.adapters.names import NameIndex, check_distinct
from lotrtensor.adapters.quantised import quantised_modules, refuse_quantised
from lotrtensor.core.linalg import norm2
from lotrtensor.core.options import check_flag
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import DataError, FormatError, LotrWarning, UnsupportedAdapterError
from lotrtensor.verbs._changes import Change, Update, carried_changes, updates_of
from lotrtensor.verbs._fitted_experts import fit_experts
from lotrtensor.verbs._tied import check_tied


@on_one_thread
def merge(
    base: str | os.PathLike[str],
    adapter: Adapter,
    output: str | os.PathLike[str],
    *,
    fan_in_fan_out: bool | str | None = None,
    force: bool = False,
) -> tuple[str, ...]:
    """Write base + ΔW as a checkpoint, shard by shard, every tensor in its own type.

    Parameters
    ----------
    base : path-like
        Checkpoint directory in safetensors form, or a single file.
    adapter : LoraAdapter or LotrAdapter
        The adapter. Tensors that it carries in full (``modules_to_save``, biases) replace the
        base's.
    output : path-like
        Directory to make. The configuration and tokenizer beside the weights are copied; a single
        file becomes ``model.safetensors``.
    fan_in_fan_out : bool or str, optional
        Modules whose weights are stored in × out, as GPT-2's Conv1D layers are: a regular
        expression that occurs in their paths, or True for all. Needed for square weights alone,
        where neither the class of the model nor its other weights tell.
    force : bool
        Replace a checkpoint directory that stands there.

    Returns
    -------
    tuple of str
        Keys of the tensors that were changed.

    Raises
    ------
    FormatError
        If a module has no weight in the checkpoint, one of another shape, or one that another
        module has too; if a weight is shared with a module that the adapter leaves as it is; if
        nothing tells how a square weight is stored; if the adapter carries tensors that the
        checkpoint has no place for; or if the output cannot be written. Nothing has changed then.
    UnsupportedAdapterError
        If the adapter was trained on replicated layers.
    DataError
        If a weight is quantised, or a sum is beyond its type.

    Warns
    -----
    LotrWarning
        If modules are found under other names, carried tensors replace weights or are dropped as
        equal to them, or a sum is rounded to eight bits.

    Notes
    -----
    The m × (c · k · k) matrix of a convolution's update is added to its weight, m × c × k × k.

    The sum is taken in float32 (float64 for weights in float64) and rounded once. Memory holds one
    weight and its update at a time.

    The class that the base's ``config.json`` names is asked how weights are stored and which of
    them are shared, where shapes and names leave that open.

    Examples
    --------
    >>> import tempfile, numpy as np, lotrtensor as lt
    >>> from safetensors.numpy import load_file, save_file
    >>> module = lt.LoraModule("layers.0.query", np.ones((4, 1)), np.ones((1, 6)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"layers.0.query.weight": np.ones((4, 6))}, f"{folder}/base.safetensors")
    ...     adapter = lt.LoraAdapter((module,), {}, np.dtype("float64"))
    ...     changed = lt.merge(f"{folder}/base.safetensors", adapter, f"{folder}/merged")
    ...     merged = load_file(f"{folder}/merged/model.safetensors")
    >>> changed, float(merged["layers.0.query.weight"][0, 0])
    (('layers.0.query.weight',), 2.0)
    """
    check_adapter(adapter)
    _check_layers(adapter)
    force = check_flag(force, "force")
    output = expand(output)
    source = open_checkpoint(expand(base))
    updates = updates_of(adapter)
    architecture = _architecture(source, updates)
    if architecture is not None:
        source = source.renamed(architecture.rename)
        source = with_tied(source, architecture.ties)
    experts = expert_weights(source, architecture)
    source = experts.checkpoint
    updates = fit_experts(updates, source)
    names = _find_names(source, updates, architecture)
    changes = _laid_on(experts, updates, names, architecture, adapter.config, fan_in_fan_out)
    rename = architecture.rename if architecture is not None else str
    carried, notes = carried_changes(source, adapter.extras, adapter.config, changes, rename)
    changes |= carried
    check_tied(source, architecture, changes)
    lost: dict[str, float] = {}

    def change(name: str) -> np.ndarray:
        found, error = _changed(source, name, changes[name])
        if error is not None:
            lost[name] = error
        return found

    # A shared weight that the checkpoint holds once is written once.
    written = {source.tensors[name]: name for name in reversed(changes)}
    rewrite_checkpoint(source, output, written.values(), change, force=force)
    for note in (*_renamings(source, names), *notes, *_roundings(source, lost)):
        warnings.warn(note, LotrWarning, stacklevel=2)
    return tuple(sorted(stored.key for stored in written))


def _check_layers(adapter: Adapter) -> None:
    replicated = adapter.config.get("layer_replication")
    if replicated:
        raise UnsupportedAdapterError(
            f"the adapter has layer_replication = {replicated}: its layers are copies of the "
            "base's, so that one weight has several updates; load the base with PEFT, which makes "
            "the copies, and use merge_and_unload"
        )


def _architecture(source: Checkpoint, updates: Mapping[str, Update]) -> Architecture | None:
    """Ask the class of the base, unless nothing is in doubt: building it takes seconds."""
    clear = all(
        name + WEIGHT in source.tensors and update.shape[0] != update.shape[1]
        for name, update in updates.items()
    )
    if clear and source.config.get("tie_word_embeddings") is False:
        return None
    return read_architecture(source.directory, source.config)


def _find_names(
    source: Checkpoint, updates: Mapping[str, Update], architecture: Architecture | None
) -> dict[str, str]:
    """Name of every module's weight in the checkpoint."""
    index = NameIndex(name for name in source.tensors if name.endswith(WEIGHT))
    packed = quantised_modules(source)
    names: dict[str, str] = {}
    for module in updates:
        wanted = module + WEIGHT
        if architecture is not None:
            wanted = architecture.rename(wanted)
        found = index.find(wanted)
        if len(found) == 1:
            names[module] = found[0]
            if found[0].removesuffix(WEIGHT) in packed:
                raise refuse_quantised(source, packed[found[0].removesuffix(WEIGHT)])
            continue
        owners = {module, (parameter_path(module) or "").rpartition(".")[0]} - {""}
        quantised = next(
            (packed[m] for m in packed if any(f".{m}".endswith(f".{own}") for own in owners)), None
        )
        if not found and quantised:
            raise refuse_quantised(source, quantised)
        raise FormatError(
            f"{source.directory} has {len(found) or 'no'} weights for {module}"
            + (f", such as {' and '.join(sorted(found)[:2])}" if found else "")
            + "; "
            + (fused_hint(module, source.tensors, WEIGHT) or "the adapter belongs to another model")
        )
    check_distinct(names, source.directory)
    return names


def _laid_on(
    experts: ExpertWeights,
    updates: Mapping[str, Update],
    names: Mapping[str, str],
    architecture: Architecture | None,
    config: Mapping[str, object],
    fan_in_fan_out: bool | str | None,
) -> dict[str, Change]:
    """Updates as they are added to the stored weights, each turned where its weight is."""
    source = experts.checkpoint
    # PEFT writes one flag for all modules of an adapter: a hint, where nothing else is known.
    said = bool(config.get("fan_in_fan_out")) if fan_in_fan_out is None else fan_in_fan_out
    layers = Layers(source, architecture, said, seen=experts.layouts)
    seen: dict[str, bool] = dict(experts.layouts)
    kernels = read_kernels(config)
    for module, update in updates.items():
        name = names[module].removesuffix(WEIGHT)
        stored, (m, n) = source.tensors[names[module]].shape, update.shape
        kernel = tuple(kernels.get(module, ()))
        if len(stored) > 2 and _fits_kernel(stored, update, kernel):
            continue
        if len(stored) != 2 or math.prod(kernel) > 1:
            raise _unlike(source, names[module], update, update.embedding)
        if name in experts.parameters and name not in experts.layouts and m != n:
            if stored not in ((m, n), (n, m)):
                raise _unlike(source, names[module], update, False)
            seen[name] = stored == (n, m)
            continue
        experts.check_known(name, fan_in_fan_out)
        turned = update.embedding or (m != n and layers.in_by_out(name))
        if stored == (m, n) and turned and not update.embedding and layers.known(name) is None:
            turned = False  # the flag, or a pattern for all, is not meant for this one
        if stored != ((n, m) if turned else (m, n)):
            raise _unlike(source, names[module], update, turned)
        source.dtype(names[module])
        if m != n and not update.embedding:
            seen[name] = turned
    layers = Layers(source, architecture, said, seen=seen)
    changes = {}
    for module, update in updates.items():
        name = names[module].removesuffix(WEIGHT)
        turned = update.embedding
        if not turned and len(source.tensors[names[module]].shape) == 2:
            turned = seen[name] if name in seen else layers.in_by_out(name)
        changes[names[module]] = Change(update=update.turned() if turned else update)
    return changes


def _fits_kernel(stored: tuple[int, ...], update: Update, kernel: tuple[int, ...]) -> bool:
    """Whether an update is the m × (c · k · k) matrix of a convolution's weight, m × c × k × k."""
    return stored[2:] == kernel and update.shape == (stored[0], math.prod(stored[1:]))


def _unlike(source: Checkpoint, name: str, update: Update, turned: bool) -> FormatError:
    shape, expected = source.tensors[name].shape, update.shape[::-1] if turned else update.shape
    hint = (
        "; if it is stored in × out, say so with --fan-in-fan-out PATTERN"
        if shape == update.shape[::-1] and not turned
        else ""
    )
    return FormatError(
        f"{source.place(name)}: {source.tensors[name].key} is {shape}, the adapter's update is "
        f"{expected}; they belong to different models{hint}"
    )


def _changed(source: Checkpoint, name: str, change: Change) -> tuple[np.ndarray, float | None]:
    """Return what is written for a tensor, rounded once, and the error of eight bits."""
    weight = source.read(name)
    wide = np.float64 if weight.dtype == np.float64 else np.float32
    if change.full is not None:
        summed = change.full.astype(wide)
        update2 = float(norm2(summed[None] if summed.ndim == 1 else summed.reshape(1, -1)))
    else:
        assert change.update is not None
        b, a = change.update.factors()
        summed = b.astype(wide) @ a.astype(wide)
        update2 = float(norm2(summed)) if weight.dtype.itemsize == 1 else 0.0
        summed = summed.reshape(weight.shape)
        summed += weight.astype(wide, copy=False) if weight.dtype.itemsize == 1 else weight
    with np.errstate(over="ignore"):
        found: np.ndarray = summed.astype(weight.dtype)
    if not np.isfinite(found.astype(wide) if weight.dtype.itemsize == 1 else found).all():
        cause = (
            f"the sum does not fit into {weight.dtype.name}: convert the checkpoint to float32"
            if np.isfinite(weight.astype(wide)).all()
            else "the weight holds NaN or infinite values; expected finite numbers"
        )
        raise DataError(f"{source.place(name)}: {name}: {cause}")
    if weight.dtype.itemsize > 1 or not update2:
        return found, None
    lost = summed - found.astype(wide)
    return found, float(np.sqrt(float(norm2(lost.reshape(1, -1))) / update2))


def _renamings(source: Checkpoint, names: Mapping[str, str]) -> Iterator[str]:
    """Say which modules were found under a name that is not theirs with a prefix in front."""
    other = [m for m, name in names.items() if not f".{name}".endswith(f".{m}{WEIGHT}")]
    if other:
        yield (
            f"{len(other)} modules have other names in {source.directory}: {other[0]} of the "
            f"adapter is taken for {names[other[0]].removesuffix(WEIGHT)}"
        )


def _roundings(source: Checkpoint, lost: Mapping[str, float]) -> Iterator[str]:
    """Say what rounding to eight bits cost."""
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        yield (
            f"{len(lost)} sums were rounded to {source.dtype(worst).name}; the largest relative "
            f"error of an update is {lost[worst]:.3g}, that of {worst}"
        )
