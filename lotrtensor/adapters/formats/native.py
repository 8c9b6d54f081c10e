"""The native LoTR directory: shared factors once per group, a core per module.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lotrtensor.adapters.formats.carried import PREFIX, split_extras
from lotrtensor.adapters.formats.directory import write_directory
from lotrtensor.adapters.formats.experts import TARGETS, fused_parameters
from lotrtensor.adapters.formats.group_record import GroupRecord
from lotrtensor.adapters.formats.layout import KERNELS, LAYOUT, read_layout
from lotrtensor.adapters.formats.lora_config import CARRIED_FIELDS, check_types
from lotrtensor.adapters.formats.tensors import (
    Tensors,
    adapter_files,
    check_floating,
    read_config,
    read_tensors,
)
from lotrtensor.adapters.formats.wrappers import unwrapped_names
from lotrtensor.adapters.lotr_group import Core, FactoredCore, LotrGroup
from lotrtensor.errors import FormatError, UnsupportedAdapterError

FORMAT_VERSION = 1
COMPRESSED_VERSION = 2
CORES_VERSION = 3
PEFT_TYPE = "LOTR"
LEFT, RIGHT = "base_model.lotr_left.", "base_model.lotr_right."
CORE, CORE_LEFT, CORE_RIGHT = ".lotr_core", ".lotr_core_left", ".lotr_core_right"
PRIVATE_LEFT, PRIVATE_RIGHT = ".lotr_private_left", ".lotr_private_right"

# To what an adapter applies, whatever its method; of one that was a single file, how that named and
# shaped its tensors; and the kernels of convolutions.
COMMON_FIELDS = (*CARRIED_FIELDS, LAYOUT, KERNELS)

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
    check_version(config, FORMAT_VERSION, directory)
    entries = config.get("groups")
    if not isinstance(entries, list) or not entries:
        raise FormatError(f"{directory}: the config has no groups; expected a list of them")
    read_layout(config, directory)
    check_types(config, CARRIED_FIELDS, directory)
    records = [GroupRecord.from_json(entry, directory) for entry in entries]
    tensors, records = take_wrappers_off(read_tensors(directory), records, directory)
    groups = tuple(_read_group(record, tensors, directory) for record in records)
    dtype = groups[0].left.dtype
    adapted = {name: group.embedding for group in groups for name in group.modules}
    extras = split_extras(tensors, config, adapted, directory)
    common = {key: config[key] for key in (*CARRIED_FIELDS, LAYOUT) if key in config}
    return groups, common, dtype, extras


def check_version(config: Mapping[str, Any], expected: int, directory: object) -> None:
    """Refuse a directory of another format version.

    Raises
    ------
    FormatError
        Naming the version; another tells who reads it, or that this release does not.
    """
    version = config.get("format_version")
    check_known(version, directory)
    if version != expected:
        raise FormatError(
            f"{directory} has format_version {version}, expected {expected} here; lotrtensor.load "
            f"reads both {FORMAT_VERSION}, a LoTR, and {COMPRESSED_VERSION}, a compressed adapter"
        )


def check_known(version: object, where: object) -> None:
    """Refuse a format version that no reader here takes; ``where`` names the adapter.

    Raises
    ------
    FormatError
        Naming the version.
    """
    if type(version) is int and version == CORES_VERSION:
        raise FormatError(
            f"{where} has format_version {version}: cores trained on the bases of a pack, which "
            "lotr add puts there, and lotr unpack takes out as a whole adapter"
        )
    if type(version) is not int or version not in (FORMAT_VERSION, COMPRESSED_VERSION):
        raise FormatError(
            f"{where} has format_version {version!r}; this release reads {FORMAT_VERSION} and "
            f"{COMPRESSED_VERSION}: update lotrtensor or convert the source again"
        )


def write_lotr(directory: Path, content: LotrContent, *, force: bool = False) -> None:
    """Write a native LoTR directory, atomically.

    Raises
    ------
    FormatError
        If the output exists and ``force`` is not given, or cannot be written.
    UnsupportedAdapterError
        If the adapter has what such a directory has no place for; see `check_native`.
    """
    groups, source_config, _, extras = content
    check_native(source_config, extras, directory)
    if not groups:
        raise FormatError(f"{directory}: the adapter has no groups; expected at least one")
    tensors: Tensors = dict(extras)
    entries = []
    for group in groups:
        tensors[LEFT + group.name] = group.left
        tensors[RIGHT + group.name] = group.right
        for module, core in zip(group.modules, group.cores, strict=True):
            if isinstance(core, FactoredCore):
                tensors[PREFIX + module + CORE_LEFT] = core.left
                tensors[PREFIX + module + CORE_RIGHT] = core.right
            else:
                tensors[PREFIX + module + CORE] = core
        entries.append(_record(group).to_json())
    config = {key: source_config[key] for key in COMMON_FIELDS if key in source_config}
    config |= {"peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION, "groups": entries}
    names = [module for group in groups for module in group.modules]
    fused = fused_parameters(names, config.get(TARGETS))
    config.setdefault("target_modules", sorted(name for name in names if name not in fused))
    write_directory(directory, adapter_files(config, tensors), force=force)


def check_native(
    config: Mapping[str, Any], extras: Mapping[str, np.ndarray], where: object
) -> None:
    """Refuse an adapter of which those who load a LoTR directory would leave a part out.

    Parameters
    ----------
    config, extras : mapping
        Of the adapter.
    where : object
        The file, named in messages.

    Raises
    ------
    UnsupportedAdapterError
        If it has convolutions of a PEFT model, or differences of whole weights and biases that a
        single file carries.
    """
    if config.get(KERNELS):
        name = next(iter(config[KERNELS]))
        raise UnsupportedAdapterError(
            f"{where}: {name} is a convolution, to which the PEFT method of a LoTR directory does "
            "not apply; lower its rank as a LoRA (lotr truncate)"
        )
    if extras and config.get(LAYOUT):
        raise UnsupportedAdapterError(
            f"{where}: {next(iter(extras))} is no LoRA factor, and what loads a LoTR directory "
            "would leave it out; lower the ranks of the file itself, which carries it (lotr "
            "truncate)"
        )


def take_wrappers_off(
    tensors: Tensors, records: list[GroupRecord], directory: Path
) -> tuple[Tensors, list[GroupRecord]]:
    """Take the names of wrappers off, where the adapter was trained in a wrapped model.

    Parameters
    ----------
    tensors, records
        Of the directory.
    directory : Path
        Named in messages.
    """
    names = [name for record in records for name in record.modules]
    own = [key for key in tensors if not key.startswith((LEFT, RIGHT))]  # these name groups
    plain = unwrapped_names([*own, *names], directory)
    return (
        {plain.get(key, key): tensor for key, tensor in tensors.items()},
        [replace(r, modules=tuple(plain[name] for name in r.modules)) for r in records],
    )


def _record(group: LotrGroup) -> GroupRecord:
    return GroupRecord(
        name=group.name,
        modules=group.modules,
        shape=group.shape,
        rank=group.rank,
        slice_ranks=group.slice_ranks,
        scale=group.scale,
        embedding=group.embedding,
        fit=group.fit,
    )


def _read_group(record: GroupRecord, tensors: Tensors, directory: Path) -> LotrGroup:
    """Take the tensors of one group out of ``tensors``; whatever is left belongs to no group."""
    (m, n), (p, q) = record.shape, record.rank
    left = take_tensor(tensors, LEFT + record.name, (m, p), directory)
    right = take_tensor(tensors, RIGHT + record.name, (n, q), directory)
    cores = []
    for module, rank in zip(record.modules, record.slice_ranks, strict=True):
        core = _read_core(module, rank, (p, q), tensors, directory)
        _check_core_rank(core, rank, module, directory)
        cores.append(core)
    return LotrGroup(
        name=record.name,
        modules=record.modules,
        left=left,
        right=right,
        cores=tuple(cores),
        slice_ranks=record.slice_ranks,
        embedding=record.embedding,
        fit=record.fit,
        scale=record.scale,
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
_ROUNDOFF = {
    **{"float64": 2.0**-22, "float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-9},
    **{"float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3},
}


def _read_core(
    module: str, rank: int, pair: tuple[int, int], tensors: Tensors, directory: Path
) -> Core:
    key = PREFIX + module
    if key + CORE_LEFT not in tensors:
        return take_tensor(tensors, key + CORE, pair, directory)
    return FactoredCore(
        take_tensor(tensors, key + CORE_LEFT, (pair[0], rank), directory),
        take_tensor(tensors, key + CORE_RIGHT, (rank, pair[1]), directory),
    )


def take_tensor(tensors: Tensors, key: str, shape: tuple[int, int], directory: Path) -> np.ndarray:
    """Take a tensor of this shape out of ``tensors``.

    Raises
    ------
    FormatError, DataError
        If it is missing, of another shape, or not finite floating point.
    """
    if key not in tensors:
        raise FormatError(f"{directory}: {key} is missing; the config expects it as {shape}")
    tensor = tensors.pop(key)
    if tensor.shape != tuple(shape):
        raise FormatError(
            f"{directory}: {key} has shape {tensor.shape}; the config expects {tuple(shape)}"
        )
    check_floating(key, tensor, directory)
    return tensor
