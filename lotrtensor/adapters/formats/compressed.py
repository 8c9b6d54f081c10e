"""Format version 2: an adapter in bits.

``adapter_config.json`` says what the adapter is for; ``adapter_model.safetensors`` holds, beside
tensors that are carried along, one row of bytes, ``lotr_coded`` (see `coded_row`): the records of
the groups, and their codes in that order. A group's columns are those of U, then of V, then, slice
by slice, the left and the right ones of its terms. The codes of all cores come after those of all
columns; their kinds follow from U and V (see `lotrtensor.core.bits.shared.core_kinds`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lotrtensor.adapters.compressed_group import CompressedGroup, SourceRecord
from lotrtensor.adapters.formats.carried import split_extras
from lotrtensor.adapters.formats.coded_row import Coded, from_row, to_row
from lotrtensor.adapters.formats.compressed_record import (
    GroupIndex,
    read_record,
    read_source,
    write_record,
)
from lotrtensor.adapters.formats.directory import CONFIG_NAME, write_directory
from lotrtensor.adapters.formats.lora_config import CARRIED_FIELDS, check_types
from lotrtensor.adapters.formats.native import (
    COMMON_FIELDS,
    COMPRESSED_VERSION,
    PEFT_TYPE,
    check_native,
    check_version,
)
from lotrtensor.adapters.formats.tensors import (
    WEIGHTS_NAME,
    Tensors,
    file_bytes,
    read_config,
    read_tensors,
)
from lotrtensor.core.bits import stream
from lotrtensor.core.bits.shared import QuantisedTucker2, core_kinds
from lotrtensor.core.bits.stack import QuantisedStack
from lotrtensor.core.bits.terms import QuantisedTerms
from lotrtensor.errors import FormatError

CODED = "lotr_coded"

DEFAULTS = {"bias": "none", "inference_mode": True}
"""Values of common fields that need not be written, beside those that are empty or false."""

CompressedContent = tuple[
    tuple[CompressedGroup, ...], Mapping[str, Any], SourceRecord, Mapping[str, np.ndarray]
]
"""Groups, config, source and carried tensors: the fields of a `CompressedAdapter`."""


def write_compressed(directory: Path, content: CompressedContent, *, force: bool = False) -> None:
    """Write a compressed adapter, atomically.

    Raises
    ------
    FormatError
        If the output exists and ``force`` is not given, or cannot be written.
    UnsupportedAdapterError
        If the adapter has what such a directory has no place for; see `check_native`.
    """
    check_native(content[1], content[3], directory)
    write_directory(directory, compressed_files(content), force=force)


def compressed_files(content: CompressedContent) -> dict[str, bytes]:
    """Return the two files of a compressed adapter; equal adapters are equal files."""
    groups, source_config, source, extras = content
    tensors = dict(extras) | {CODED: to_row(code_groups(groups, source))}
    # Which modules are adapted, the groups say.
    config = {
        key: source_config[key]
        for key in COMMON_FIELDS
        if source_config.get(key) not in (None, False, [], {}, DEFAULTS.get(key))
        and key != "target_modules"
    }
    config |= {"peft_type": PEFT_TYPE, "format_version": COMPRESSED_VERSION}
    return {
        CONFIG_NAME: json.dumps(config, separators=(",", ":"), sort_keys=True).encode(),
        WEIGHTS_NAME: file_bytes(tensors, {}, checksums=True),
    }


def code_groups(groups: Sequence[CompressedGroup], source: SourceRecord) -> Coded:
    """Return what `decode_groups` reads."""
    columns = [column for group in groups for column in _columns(group.stack)]
    kinds = stream.kinds_of(columns)
    places = [place for group in groups for place in _places(group.stack)]
    told = np.concatenate([_told_kinds(group.stack) for group in groups])
    values = [terms.values for group in groups for terms in group.stack.private]
    index = {
        "source": [source.dtype.name, source.parameters, source.bytes],
        "groups": [write_record(group) for group in groups],
    }
    codes = stream.pack(columns, kinds) + stream.pack(places, told)
    return Coded(index, kinds, np.concatenate(values).astype(groups[0].stack.value_dtype), codes)


def read_compressed(directory: Path) -> CompressedContent:
    """Read a compressed adapter.

    Returns
    -------
    groups, config, source, extras
        The fields of a `CompressedAdapter`.

    Raises
    ------
    FormatError
        If the files are damaged, incomplete, or contradict each other.
    """
    config = read_config(directory)
    check_version(config, COMPRESSED_VERSION, directory)
    check_types(config, CARRIED_FIELDS, directory)
    tensors = read_tensors(directory)
    groups, source = take_groups(tensors, directory)
    adapted = {name: group.embedding for group in groups for name in group.modules}
    extras = split_extras(tensors, config, adapted, directory)
    common = {key: config[key] for key in COMMON_FIELDS if key in config}
    return groups, common, source, extras


def take_groups(
    tensors: Tensors, directory: object
) -> tuple[tuple[CompressedGroup, ...], SourceRecord]:
    """Take the row of a compressed adapter out of ``tensors``, and decode it.

    Raises
    ------
    FormatError
        If it is missing, damaged, or contradicts itself; ``directory`` names the file.
    """
    row = tensors.pop(CODED, None)
    if row is None:
        raise FormatError(f"{directory}: {CODED} is missing; fetch the adapter again")
    if row.ndim != 1 or row.dtype != np.uint8:
        raise FormatError(
            f"{directory}: {CODED} is {row.dtype.name} of shape {row.shape}; expected one row of "
            "uint8"
        )
    coded, rest = from_row(row, f"{directory}: {CODED}")
    if rest:
        raise FormatError(f"{directory}: {len(rest)} bytes follow {CODED}; expected none")
    return decode_groups(coded, directory)


def decode_groups(
    coded: Coded, directory: object
) -> tuple[tuple[CompressedGroup, ...], SourceRecord]:
    """Return groups from what `code_groups` made, and what they were made of.

    Raises
    ------
    FormatError
        If its parts are damaged, or contradict each other; ``directory`` names the file.
    """
    index, kinds, values, codes = coded
    listed = index.get("groups")
    records = [
        read_record(r, directory) for r in (listed if isinstance(listed, list) else None) or [None]
    ]
    _check_apart(records, directory)
    source = read_source(index.get("source"), directory)
    if not np.isfinite(values).all():
        raise FormatError(f"{directory}: values of terms are NaN or infinite; expected numbers")
    wanted = sum(record.columns for record in records), sum(sum(r.private) for r in records)
    for name, found, expected in (("kinds", kinds, wanted[0]), ("values", values, wanted[1])):
        if len(found) != expected:
            raise FormatError(f"{directory} has {len(found)} {name}; its index expects {expected}")
    try:
        groups = _unpack(records, codes, kinds, values)
    except FormatError as error:
        raise FormatError(f"{directory}: {error}") from error
    return groups, source


def _check_apart(records: Sequence[GroupIndex], directory: object) -> None:
    """Refuse two groups of one name, and a module in two of them."""
    for what, found in (
        ("group", [record.name for record in records]),
        ("module", [name for record in records for name in record.modules]),
    ):
        if len(set(found)) < len(found):
            twice = next(name for name, count in Counter(found).items() if count > 1)
            raise FormatError(f"{directory}: the {what} {twice!r} is there twice; expected once")


def _columns(stack: QuantisedStack) -> Iterator[np.ndarray]:
    if stack.shared is not None:
        yield from stack.shared.left.T
        yield from stack.shared.right.T
    for terms in stack.private:
        yield from terms.left.T
        yield from terms.right.T


def _places(stack: QuantisedStack) -> Iterator[np.ndarray]:
    """The K codes of every place (i, j) of the cores, row by row."""
    if stack.shared is not None:
        yield from stack.shared.core.reshape(stack.shared.core.shape[0], -1).T


def _told_kinds(stack: QuantisedStack) -> np.ndarray:
    """Kinds of `_places`, which the factors tell."""
    if stack.shared is None:
        return np.zeros(0, np.int8)
    return core_kinds(stack.shared.left, stack.shared.right, stack.shared.core.shape[0]).ravel()


def _unpack(
    records: Sequence[GroupIndex], codes: bytes, kinds: np.ndarray, values: np.ndarray
) -> tuple[CompressedGroup, ...]:
    lengths = [length for record in records for length in record.lengths]
    columns, size = stream.unpack_nonzero(codes, kinds, lengths)
    stacks = []
    for record in records:
        own, columns = columns[: record.columns], columns[record.columns :]
        count = sum(record.private)
        stacks.append(_stack(record, own, values[:count]))
        values = values[count:]
    told = np.concatenate([_told_kinds(stack) for stack in stacks])
    each = [len(r.modules) for r in records for _ in range(r.shared[0] * r.shared[1])]
    places, last = stream.unpack(codes[size:], told, each)
    if size + last != len(codes):
        raise FormatError(f"{len(codes) - size - last} bytes follow the codes; expected none")
    groups = []
    for record, stack in zip(records, stacks, strict=True):
        count = record.shared[0] * record.shared[1]
        own, places = places[:count], places[count:]
        groups.append(_group(record, _with_core(stack, own)))
    return tuple(groups)


def _stack(record: GroupIndex, columns: list[np.ndarray], values: np.ndarray) -> QuantisedStack:
    """The stack of a group, its cores still zero."""
    (m, n), (p, q), slices = record.shape, record.shared, len(record.modules)
    shared = None
    if p:
        left, right = _side(columns[:p], m), _side(columns[p : p + q], n)
        core = np.zeros((slices, p, q), np.int16)
        shared, columns = QuantisedTucker2(left, core, right, record.step), columns[p + q :]
    private = []
    for rank in record.private:
        left, right = _side(columns[:rank], m), _side(columns[rank : 2 * rank], n)
        private.append(QuantisedTerms(left, values[:rank].astype(np.float64), right))
        columns, values = columns[2 * rank :], values[rank:]
    return QuantisedStack(shared, tuple(private), values.dtype)


def _with_core(stack: QuantisedStack, places: Sequence[np.ndarray]) -> QuantisedStack:
    if stack.shared is None:
        return stack
    core = np.stack(places, axis=1).reshape(stack.shared.core.shape)
    return replace(stack, shared=replace(stack.shared, core=core))


def _group(record: GroupIndex, stack: QuantisedStack) -> CompressedGroup:
    return CompressedGroup(
        name=record.name,
        modules=record.modules,
        shape=record.shape,
        slice_ranks=record.slice_ranks,
        stack=stack,
        relative_error=record.fit[0],
        norm=record.fit[1],
        embedding=record.embedding,
    )


def _side(columns: Sequence[np.ndarray], rows: int) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0), np.int16)
