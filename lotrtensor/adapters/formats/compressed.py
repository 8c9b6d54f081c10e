"""Format version 2: an adapter in bits.

``adapter_config.json`` says what the adapter is for; ``adapter_model.safetensors`` holds, beside
tensors that are carried along,

    lotr_groups    bytes     the groups as JSON, deflated
    lotr_codes     bytes     the codes of all columns and cores, entropy-coded
    lotr_kinds     int8      kind of every column that is coded
    lotr_values    float16   or float32: the value of every private term

in the order of the groups. A group's columns are those of U, then of V, then, slice by slice, the
left and the right ones of its terms. The codes of all cores come after those of all columns; their
kinds follow from U and V (see `lotrtensor.core.bits.shared.core_kinds`).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.compressed_group import CompressedGroup, SourceRecord
from lotrtensor.adapters.formats.carried import split_extras
from lotrtensor.adapters.formats.directory import CONFIG_NAME, write_directory
from lotrtensor.adapters.formats.group_record import LARGEST_NUMBER
from lotrtensor.adapters.formats.json_text import parse_json
from lotrtensor.adapters.formats.lora_config import CARRIED_FIELDS, check_types
from lotrtensor.adapters.formats.names import fold, unfold
from lotrtensor.adapters.formats.native import (
    COMMON_FIELDS,
    COMPRESSED_VERSION,
    PEFT_TYPE,
    check_native,
    check_version,
)
from lotrtensor.adapters.formats.tensors import (
    FLOATS,
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

GROUPS, CODES, KINDS, VALUES = "lotr_groups", "lotr_codes", "lotr_kinds", "lotr_values"
CODED = (GROUPS, CODES, KINDS, VALUES)

DEFAULTS = {"bias": "none", "inference_mode": True}
"""Values of common fields that need not be written, beside those that are empty or false."""

LONGEST = 2**26
"""Bytes of the groups as JSON, at most: a small file cannot ask for more memory."""

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
    tensors = dict(extras) | coded_tensors(groups, source)
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


def coded_tensors(
    groups: Sequence[CompressedGroup],
    source: SourceRecord,
    beside: Mapping[str, Any] | None = None,
) -> Tensors:
    """Return groups as the four tensors that `take_groups` reads; ``beside`` goes to the index."""
    tensors: Tensors = {}
    columns = [column for group in groups for column in _columns(group.stack)]
    kinds = stream.kinds_of(columns)
    places = [place for group in groups for place in _places(group.stack)]
    told = np.concatenate([_told_kinds(group.stack) for group in groups])
    codes = stream.pack(columns, kinds) + stream.pack(places, told)
    values = [terms.values for group in groups for terms in group.stack.private]
    tensors[CODES] = np.frombuffer(codes, np.uint8)
    tensors[KINDS] = kinds
    tensors[VALUES] = np.concatenate(values).astype(groups[0].stack.value_dtype)
    index = dict(beside or {}) | {
        "source": [source.dtype.name, source.parameters, source.bytes],
        "groups": [_record(group) for group in groups],
    }
    text = json.dumps(index, separators=(",", ":"), sort_keys=True).encode()
    tensors[GROUPS] = np.frombuffer(zlib.compress(text, 9), np.uint8)
    return tensors


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
    """Take the four tensors of a compressed adapter out of ``tensors``, and decode them.

    Raises
    ------
    FormatError
        If they are damaged, incomplete, or contradict each other; ``directory`` names the file.
    """
    index = _read_index(bytes(_take(tensors, GROUPS, ("uint8",), directory)), directory)
    records = [_read_record(record, directory) for record in index.get("groups") or [None]]
    source = _read_source(index.get("source"), directory)
    codes = bytes(_take(tensors, CODES, ("uint8",), directory))
    kinds = _take(tensors, KINDS, ("int8",), directory)
    values = _take(tensors, VALUES, ("float16", "float32"), directory)
    if not np.isfinite(values).all():
        raise FormatError(f"{directory}: {VALUES} holds NaN or infinite values; expected numbers")
    wanted = sum(record.columns for record in records), sum(sum(r.private) for r in records)
    for name, found, expected in ((KINDS, kinds, wanted[0]), (VALUES, values, wanted[1])):
        if len(found) != expected:
            raise FormatError(
                f"{directory}: {name} has {len(found)} entries; the config expects {expected}"
            )
    try:
        groups = _unpack(records, codes, kinds, values)
    except FormatError as error:
        raise FormatError(f"{directory}: {error}") from error
    return groups, source


def _read_index(content: bytes, directory: object) -> dict[str, Any]:
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(content, LONGEST)
    except zlib.error as error:
        raise FormatError(f"{directory}: {GROUPS} is damaged ({error}); fetch it again") from error
    index = parse_json(text, f"{directory}: {GROUPS}")
    if not isinstance(index, dict) or decoder.unconsumed_tail:
        raise FormatError(f"{directory}: {GROUPS} holds no list of groups; fetch it again")
    return index


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


class _Record(NamedTuple):
    """A group of the config, checked."""

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    slice_ranks: tuple[int, ...]
    shared: tuple[int, int]
    private: tuple[int, ...]
    step: float
    fit: tuple[float, float]
    embedding: bool

    @property
    def columns(self) -> int:
        """Columns of codes."""
        return sum(self.shared) + 2 * sum(self.private)

    @property
    def lengths(self) -> list[int]:
        """Entries of every column."""
        (m, n), (p, q) = self.shape, self.shared
        terms = [side for rank in self.private for side in [m] * rank + [n] * rank]
        return [m] * p + [n] * q + terms


def _record(group: CompressedGroup) -> dict[str, Any]:
    stack, ranks = group.stack, set(group.slice_ranks)
    record: dict[str, Any] = {
        "name": group.name,
        "modules": fold(group.modules),
        "shape": list(group.shape),
        "slice_ranks": list(group.slice_ranks) if len(ranks) > 1 else ranks.pop(),
        "private_ranks": list(group.private_ranks),
        # Rounded up: what is told is never below what is stored.
        "relative_error": rounded_up(group.relative_error),
        "norm": float(f"{group.norm:.9g}"),
    }
    if stack.shared is not None:
        record |= {"shared_ranks": list(stack.shared.rank), "step": stack.shared.step}
    if group.embedding:
        record["embedding"] = True
    return record


def rounded_up(x: float) -> float:
    """Return a number with six digits that is not below ``x``."""
    found = float(f"{x:.6g}")
    return found if found >= x else float(f"{x * (1 + 1e-5):.6g}")


def _read_record(record: Any, directory: object) -> _Record:
    def refuse(field: str, expected: str) -> FormatError:
        found = record.get(field) if isinstance(record, dict) else record
        return FormatError(
            f"{directory}: {field} of a group is {str(found)[:80]}; expected {expected}"
        )

    if not isinstance(record, dict):
        raise refuse("groups", "a list of objects")
    name, modules = record.get("name"), unfold(record.get("modules"))
    if not isinstance(name, str) or not name:
        raise refuse("name", "a string")
    if not modules or len(set(modules)) != len(modules):
        raise refuse("modules", "different module paths, or a pattern and its numbers")
    count = len(modules)
    shape = _integers(record.get("shape"), 2, 1)
    private = _integers(record.get("private_ranks"), count, 0)
    slice_ranks = record.get("slice_ranks")
    slice_ranks = [slice_ranks] * count if isinstance(slice_ranks, int) else slice_ranks
    ranks = _integers(slice_ranks, count, 1)
    shared = _integers(record.get("shared_ranks", [0, 0]), 2, 0)
    if shape is None:
        raise refuse("shape", "two positive integers")
    if ranks is None or max(ranks) > min(shape):
        raise refuse(
            "slice_ranks", f"{count} positive integers no larger than {min(shape)}, or one"
        )
    if private is None or max(private) > min(shape):
        raise refuse("private_ranks", f"{count} integers between 0 and {min(shape)}")
    fits = shared is not None and shared[0] <= shape[0] and shared[1] <= shape[1]
    if shared is None or not fits or (0 in shared and shared != (0, 0)):
        raise refuse("shared_ranks", "two positive integers no larger than the shape")
    step = record.get("step", 1.0)
    fit = record.get("relative_error"), record.get("norm")
    if not all(_number(x) for x in (step, *fit)) or not step:
        raise refuse("step, relative_error and norm", "positive numbers")
    return _Record(
        name,
        modules,
        (shape[0], shape[1]),
        ranks,
        (shared[0], shared[1]),
        private,
        float(step),
        (float(fit[0] or 0), float(fit[1] or 0)),
        bool(record.get("embedding")),
    )


def _integers(value: Any, length: int, least: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) != length:
        return None
    return tuple(value) if all(type(x) is int and least <= x < 2**31 for x in value) else None


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < LARGEST_NUMBER


def _read_source(record: Any, directory: object) -> SourceRecord:
    if isinstance(record, list) and len(record) == 3:
        dtype = next((known for known in FLOATS if known.name == record[0]), None)
        if dtype is not None and all(type(x) is int and 0 < x < 2**63 for x in record[1:]):
            return SourceRecord(dtype, record[1], record[2])
    raise FormatError(
        f"{directory}: source is {str(record)[:80]}; expected a type, its numbers and its bytes"
    )


def _take(tensors: Tensors, key: str, dtypes: Sequence[str], directory: object) -> np.ndarray:
    if key not in tensors:
        raise FormatError(f"{directory}: {key} is missing; fetch the adapter again")
    found = tensors.pop(key)
    if found.ndim != 1 or found.dtype.name not in dtypes:
        raise FormatError(
            f"{directory}: {key} is {found.dtype.name} of shape {found.shape}; expected one row of "
            f"{' or '.join(dtypes)}"
        )
    return found


def _unpack(
    records: Sequence[_Record], codes: bytes, kinds: np.ndarray, values: np.ndarray
) -> tuple[CompressedGroup, ...]:
    lengths = [length for record in records for length in record.lengths]
    if (kinds == stream.ZERO).any():
        raise FormatError("a column of codes is zero; expected none")
    columns, size = stream.unpack(codes, kinds, lengths)
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


def _stack(record: _Record, columns: list[np.ndarray], values: np.ndarray) -> QuantisedStack:
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


def _group(record: _Record, stack: QuantisedStack) -> CompressedGroup:
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
