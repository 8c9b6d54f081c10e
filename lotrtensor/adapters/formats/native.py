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

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lotrtensor.adapters.formats.directory import write_directory
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

# Fields of PEFT's configs that say to what an adapter applies, whatever its method.
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
        The fields of a `LotrAdapter`; the scale of a group folded into its cores.

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
    tensors = read_tensors(directory)
    try:
        groups = tuple(_read_group(record, tensors, directory) for record in records)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{directory}: a group of the config lacks or mistypes {error}; expected name, "
            "modules, shape, rank, slice_ranks, scale"
        ) from error
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
                "scale": 1.0,
                "embedding": group.embedding,
                "fit": asdict(group.fit) if group.fit else None,
            }
        )
    config = {key: source_config[key] for key in COMMON_FIELDS if key in source_config}
    config |= {"peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION, "groups": records}
    config.setdefault("target_modules", sorted(m for group in groups for m in group.modules))
    write_directory(directory, adapter_files(config, tensors), force=force)


def _read_group(record: dict[str, Any], tensors: Tensors, directory: Path) -> LotrGroup:
    """Take the tensors of one group out of ``tensors``; whatever is left belongs to no group."""
    name, modules = str(record["name"]), tuple(record["modules"])
    (m, n), (p, q) = record["shape"], record["rank"]
    scale = float(record["scale"])
    left = _take(tensors, LEFT + name, (m, p), directory)
    right = _take(tensors, RIGHT + name, (n, q), directory)
    cores = tuple(
        _read_core(module, rank, (p, q), tensors, directory)
        for module, rank in zip(modules, record["slice_ranks"], strict=True)
    )
    if scale != 1.0:
        cores = tuple(_scaled(core, scale) for core in cores)
    fit = FitRecord(**record["fit"]) if record.get("fit") else None
    ranks = tuple(int(rank) for rank in record["slice_ranks"])
    return LotrGroup(name, modules, left, right, cores, ranks, bool(record.get("embedding")), fit)


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


def _scaled(core: Core, scale: float) -> Core:
    if isinstance(core, FactoredCore):
        return FactoredCore(_scaled_array(core.left, scale), core.right)
    return _scaled_array(core, scale)


def _scaled_array(x: np.ndarray, scale: float) -> np.ndarray:
    return (x.astype(np.float64) * scale).astype(x.dtype)
