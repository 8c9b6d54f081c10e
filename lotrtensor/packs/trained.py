"""Adapters trained on the bases of a pack, in a directory of their own: cores, and nothing else.

``adapter_config.json`` has ``format_version`` 3; ``adapter_model.safetensors`` has the row of bytes
that the adapter will be in the pack (see `lotrtensor.adapters.formats.coded_row`), in whose index
``"bases"`` is the mark of the pack's bases, and what is carried. It says nothing without the pack.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from lotrtensor.adapters.compressed_group import SourceRecord
from lotrtensor.adapters.formats.carried import split_extras
from lotrtensor.adapters.formats.coded_row import from_row, to_row
from lotrtensor.adapters.formats.compressed import CODED
from lotrtensor.adapters.formats.directory import CONFIG_NAME, expand, write_directory
from lotrtensor.adapters.formats.native import CORES_VERSION, PEFT_TYPE, check_native
from lotrtensor.adapters.formats.paths import is_file
from lotrtensor.adapters.formats.tensors import (
    WEIGHTS_NAME,
    file_bytes,
    read_config,
    read_tensors,
)
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.core.bits.basis import CodedSlice
from lotrtensor.core.bits.stream import LARGEST_CODE
from lotrtensor.core.bits.terms import QuantisedTerms
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import FormatError
from lotrtensor.packs.coding import CODED as MEMBER
from lotrtensor.packs.coding import cells_by_module, member_from_tensors, member_to_tensors
from lotrtensor.packs.encoding import member_of, settled
from lotrtensor.packs.files import Index
from lotrtensor.packs.members import Cell, Member, first_cluster

BASES = "bases"
MARK_DIGITS = 32
"""Hexadecimal digits of a mark."""


def mark_of(index: Index) -> str:
    """Return what tells the bases of a pack from all others; nothing if it has none."""
    joined = "".join(shard.sha256 for shard in index.cells)
    return hashlib.sha256(joined.encode()).hexdigest()[:MARK_DIGITS] if joined else ""


def is_trained(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a source is the directory of an adapter that is cores on the bases of a pack."""
    if not isinstance(source, str | os.PathLike):
        return False
    path = expand(source)
    if not is_file(path / CONFIG_NAME):
        return False
    config = read_config(path)
    version = config.get("format_version")
    return config.get("peft_type") == PEFT_TYPE and version == CORES_VERSION


class TrainedCore(NamedTuple):
    """What a model holds of a module: U (m × p) and V (n × q), rounded as it may be, and a core."""

    left: np.ndarray
    core: np.ndarray
    right: np.ndarray
    embedding: bool


def code_cores(
    trained: Mapping[str, TrainedCore],
    cells: Sequence[Cell],
    config: Mapping[str, Any],
    extras: Mapping[str, np.ndarray],
) -> Member:
    """Return an adapter of cores in codes of 16 bits, as a pack holds it.

    The step is the largest entry over the largest code: an entry is off by half of it at most. The
    stated error counts what a model's type has rounded off the bases, too.
    """
    by_module = cells_by_module(first_cluster(cells))
    modules, cores = [], {}
    for name, own in trained.items():
        b, a = own.left, own.core @ own.right.T
        modules.append(LoraModule(name, b, a, own.embedding))
        cores[name] = by_module[name].basis.solve(b, a)
    largest = max(float(np.max(np.abs(core), initial=0.0)) for core in cores.values())
    step = settled(1.001 * largest / LARGEST_CODE) or 1.0
    codes = {name: np.round(core / step).astype(np.int16) for name, core in cores.items()}
    dtype = np.dtype(np.float32)
    lora = LoraAdapter(tuple(modules), config, dtype, extras)

    def coded(module: LoraModule) -> CodedSlice:
        basis, own = by_module[module.name].basis, codes[module.name]
        left, right = basis.slice_factors(step * own)
        rest = LowRankStack([np.hstack([module.B, left])], [np.vstack([module.A, -right])])
        return CodedSlice(own, QuantisedTerms.empty(*module.shape), float(rest.norms2()[0]))

    count = sum(core.size for core in cores.values())
    source = SourceRecord(dtype, count, count * dtype.itemsize)
    return member_of(lora, coded, by_module, source, weight=0.0, step=step)


def write_trained(
    directory: Path, member: Member, cells: Sequence[Cell], mark: str, *, force: bool = False
) -> None:
    """Write the directory of an adapter that `code_cores` made, atomically.

    Raises
    ------
    FormatError
        If the output exists and ``force`` is not given, or cannot be written.
    """
    check_native(member.config, member.extras, directory)
    coded, rest = from_row(member_to_tensors(member, cells)[MEMBER], str(directory))
    row = to_row(coded._replace(records=coded.records | {BASES: mark}), rest)
    config = dict(member.config) | {"peft_type": PEFT_TYPE, "format_version": CORES_VERSION}
    files = {
        CONFIG_NAME: json.dumps(config, separators=(",", ":"), sort_keys=True).encode(),
        WEIGHTS_NAME: file_bytes({CODED: row} | dict(member.extras), {}, checksums=True),
    }
    write_directory(directory, files, force=force)


def read_trained(directory: Path, cells: Sequence[Cell], mark: str) -> Member:
    """Read an adapter that was trained on these bases.

    Raises
    ------
    FormatError
        If it was trained on others, or its files are damaged.
    """
    config = read_config(directory)
    tensors = read_tensors(directory)
    row = tensors.pop(CODED, None)
    if row is None or row.ndim != 1 or row.dtype != np.uint8:
        raise FormatError(f"{directory}: {CODED} is missing or no row of bytes; fetch it again")
    coded, _ = from_row(row, f"{directory}: {CODED}")
    if not mark or coded.records.get(BASES) != mark:
        raise FormatError(
            f"{directory} was trained on the bases of another pack, or on those that this one had "
            "before lotr refit"
        )
    member = member_from_tensors({MEMBER: row}, cells, str(directory))
    groups = member.own.groups
    lacking = next((n for g in groups for n in g.modules if n not in member.cores), None)
    if lacking is not None:
        raise FormatError(f"{directory}: {lacking} has no core; fetch the adapter again")
    adapted = {name: group.embedding for group in groups for name in group.modules}
    extras = split_extras(tensors, config, adapted, directory)
    return replace(member, own=replace(member.own, extras=extras))
