"""The native LoTR directory: shared factors once a group, a core a module.

``adapter_config.json`` lists the groups; ``adapter_model.safetensors`` holds

    base_model.lotr_left.<group>                 U, m × p
    base_model.lotr_right.<group>                V, n × q
    base_model.model.<module>.lotr_core          G_k, p × q            either this
    base_model.model.<module>.lotr_core_left     P_k, p × r_k          or G_k = P_k Q_k
    base_model.model.<module>.lotr_core_right    Q_k, r_k × q

and ΔW of a module is scale · U G_k Vᵀ with the scale of its group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from lotrtensor.adapters.formats.directory import write_directory
from lotrtensor.adapters.formats.layout import read_layout
from lotrtensor.adapters.formats.peft import PREFIX, split_extras
from lotrtensor.adapters.formats.tensors import (
    Tensors,
    adapter_files,
    check_floating,
    read_config,
    read_tensors,
)
from lotrtensor.adapters.modules import Core, FactoredCore, FitRecord, LotrGroup
from lotrtensor.errors import FormatError, UnsupportedAdapterError

FORMAT_VERSION = 1
PEFT_TYPE = "LOTR"
LEFT, RIGHT = "base_model.lotr_left.", "base_model.lotr_right."
CORE, CORE_LEFT, CORE_RIGHT = ".lotr_core", ".lotr_core_left", ".lotr_core_right"

# Fields of PEFT's configs that say to what an adapter applies, whatever its method; and, of an
# adapter that was a single file, how that file named and shaped its tensors.
COMMON_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "revision",
    "single_file",
    "target_modules",
    "task_type",
    "trainable_token_indices",
)

LotrContent = tuple[tuple[LotrGroup, ...], Mapping[str, Any], np.dtype, Mapping[str, np.ndarray]]
"""Groups, config, storage type and carried tensors: the fields of a `LotrAdapter`."""


def read_lotr(directory: Path) -> LotrContent:
    """Read a native LoTR directory.

    Returns
    -------
    groups, config, dtype, extras
        The fields of a `LotrAdapter`.

    Raises
    ------
    FormatError
        If the files are damaged, incomplete, contradict each other, or have another version.
    UnsupportedAdapterError
        If the directory holds another method's adapter.
    DataError
        If a tensor is not finite floating point.
    """
    config = read_config(directory)
    if config.get("peft_type") != PEFT_TYPE:
        raise UnsupportedAdapterError(
            f"{directory} has peft_type {config.get('peft_type')!r}; expected {PEFT_TYPE}"
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{directory} has format_version {version!r}; this release reads {FORMAT_VERSION}: "
            "update lotrtensor or convert the source again"
        )
    records = config.get("groups")
    if not isinstance(records, list) or not records:
        raise FormatError(f"{directory}: the config has no groups; expected a list of them")
    read_layout(config, directory)
    tensors = read_tensors(directory)
    groups = tuple(
        _read_group(_checked(record, directory), tensors, directory) for record in records
    )
    dtype = groups[0].left.dtype
    extras = split_extras(tensors, config, directory)
    common = {key: config[key] for key in COMMON_FIELDS if key in config}
    return groups, common, dtype, extras


def write_lotr(directory: Path, content: LotrContent, *, force: bool = False) -> None:
    """Write a native LoTR directory, atomically.

    Raises
    ------
    FormatError
        If the output exists and ``force`` is not given, or cannot be written.
    """
    groups, source_config, _, extras = content
    tensors: Tensors = dict(extras)
    records = []
    for group in groups:
        tensors[LEFT + group.name] = group.left
        tensors[RIGHT + group.name] = group.right
        for module, core in zip(group.modules, group.cores, strict=True):
            if isinstance(core, FactoredCore):
                tensors[PREFIX + module + CORE_LEFT] = core.left
                tensors[PREFIX + module + CORE_RIGHT] = core.right
            else:
                tensors[PREFIX + module + CORE] = core
        records.append(
            {
                "name": group.name,
                "modules": list(group.modules),
                "shape": list(group.shape),
                "rank": list(group.rank),
                "slice_ranks": list(group.slice_ranks),
                "scale": group.scale,
                "embedding": group.embedding,
                "fit": asdict(group.fit) if group.fit else None,
            }
        )
    config = {key: source_config[key] for key in COMMON_FIELDS if key in source_config}
    config |= {"peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION, "groups": records}
    config.setdefault("target_modules", sorted(m for group in groups for m in group.modules))
    write_directory(directory, adapter_files(config, tensors), force=force)


def _checked(record: Any, directory: Path) -> dict[str, Any]:
    """Return a group of the config, every field of the type and length that the format says."""

    def integers(value: Any, length: int) -> bool:
        return (
            isinstance(value, list)
            and len(value) == length
            and all(type(item) is int and item > 0 for item in value)
        )

    def refuse(field: str, expected: str) -> FormatError:
        found = record.get(field) if isinstance(record, dict) else record
        return FormatError(
            f"{directory}: {field} of a group is {str(found)[:80]}; expected {expected}"
        )

    if not isinstance(record, dict):
        raise refuse("an entry", "an object")
    name, modules, scale = record.get("name"), record.get("modules"), record.get("scale")
    if not isinstance(name, str) or not name:
        raise refuse("name", "a string")
    strings = isinstance(modules, list) and all(isinstance(module, str) for module in modules)
    if not strings or not modules or len(set(modules)) != len(modules):
        raise refuse("modules", "a list of different module paths")
    for field in ("shape", "rank"):
        if not integers(record.get(field), 2):
            raise refuse(field, "two positive integers")
    ranks = record.get("slice_ranks")
    if not integers(ranks, len(modules)):
        raise refuse("slice_ranks", f"{len(modules)} positive integers, one a module")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) < 1e30:
        raise refuse("scale", "a finite number")
    fit = record.get("fit")
    if fit is not None and not _is_fit(fit):
        raise refuse("fit", f"null, or the numbers {', '.join(_FIT_FIELDS)}")
    return record


_FIT_FIELDS = tuple(field.name for field in fields(FitRecord))


def _is_fit(fit: Any) -> bool:
    return (
        isinstance(fit, dict)
        and set(fit) == set(_FIT_FIELDS)
        and all(type(value) in (int, float) and 0 <= value < 1e30 for value in fit.values())
    )


def _read_group(record: dict[str, Any], tensors: Tensors, directory: Path) -> LotrGroup:
    """Take the tensors of one group out of ``tensors``; whatever is left belongs to no group."""
    name, modules = record["name"], tuple(record["modules"])
    (m, n), (p, q) = record["shape"], record["rank"]
    left = _take(tensors, LEFT + name, (m, p), directory)
    right = _take(tensors, RIGHT + name, (n, q), directory)
    cores = []
    for module, rank in zip(modules, record["slice_ranks"], strict=True):
        core = _read_core(module, rank, (p, q), tensors, directory)
        _check_core_rank(core, rank, module, directory)
        cores.append(core)
    return LotrGroup(
        name=name,
        modules=modules,
        left=left,
        right=right,
        cores=tuple(cores),
        slice_ranks=tuple(record["slice_ranks"]),
        embedding=bool(record.get("embedding")),
        fit=FitRecord(**record["fit"]) if record.get("fit") else None,
        scale=float(record["scale"]),
    )


def _check_core_rank(core: Core, rank: int, module: str, directory: Path) -> None:
    """Refuse a dense core of a higher rank than the config says: an export would lose the rest."""
    if isinstance(core, FactoredCore) or rank >= min(core.shape):
        return
    values = np.linalg.svd(core.astype(np.float64), compute_uv=False)
    # Rounding of the entries to the storage type leaves this much beyond the rank.
    noise = math.sqrt(core.size) * _ROUNDOFF[core.dtype.name] * float(values[0])
    if float(values[rank]) > 4 * noise:
        raise FormatError(
            f"{directory}: slice_ranks gives {module} the rank {rank}, but its core has a higher "
            "one; the config belongs to another adapter"
        )


# A float64 core may have been fitted to factors in float32.
_ROUNDOFF = {"float64": 2.0**-22, "float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-9}


def _read_core(
    module: str, rank: int, pair: tuple[int, int], tensors: Tensors, directory: Path
) -> Core:
    key = PREFIX + module
    if key + CORE_LEFT not in tensors:
        return _take(tensors, key + CORE, pair, directory)
    return FactoredCore(
        _take(tensors, key + CORE_LEFT, (pair[0], rank), directory),
        _take(tensors, key + CORE_RIGHT, (rank, pair[1]), directory),
    )


def _take(tensors: Tensors, key: str, shape: tuple[int, int], directory: Path) -> np.ndarray:
    if key not in tensors:
        raise FormatError(f"{directory}: {key} is missing; the config expects it as {shape}")
    tensor = tensors.pop(key)
    if tensor.shape != tuple(shape):
        raise FormatError(
            f"{directory}: {key} has shape {tensor.shape}; the config expects {tuple(shape)}"
        )
    check_floating(key, tensor, directory)
    return tensor
