"""Named tensors and configuration of an adapter directory, from safetensors and JSON alone."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from lotrtensor.adapters.formats.checksums import CHECKSUMS, by_key, checksum, warn_of
from lotrtensor.adapters.formats.directory import CONFIG_NAME
from lotrtensor.adapters.formats.header import OpenFile, open_file, safe_open, with_sorted_metadata
from lotrtensor.adapters.formats.json_text import read_json_object
from lotrtensor.adapters.formats.paths import children, exists, file_size, is_dir, is_file
from lotrtensor.adapters.formats.publish import Content
from lotrtensor.adapters.formats.streamed import Planned, write_streamed
from lotrtensor.errors import DataError, FormatError, UnsupportedAdapterError

WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT8 = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPES: dict[str, np.dtype] = {
    **{"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16},
    **{
        "I64": np.dtype("<i8"),
        "I32": np.dtype("<i4"),
        "I16": np.dtype("<i2"),
        "I8": np.dtype("i1"),
    },
    **{
        "U64": np.dtype("<u8"),
        "U32": np.dtype("<u4"),
        "U16": np.dtype("<u2"),
        "U8": np.dtype("u1"),
    },
    **{"BOOL": np.dtype("bool"), "C64": np.dtype("<c8")},
    **_FLOAT8,
}
"""Types by their names in a header."""

FLOATS: tuple[np.dtype[Any], ...] = (
    *(np.dtype("float64"), np.dtype("float32"), np.dtype("float16"), BFLOAT16),
    *_FLOAT8.values(),
)
"""Types that factors are stored in."""

Tensors = dict[str, np.ndarray]


def read_config(directory: Path) -> dict[str, Any]:
    """Return ``adapter_config.json`` of ``directory``.

    Raises
    ------
    FormatError
        If there is no such directory or file, or it holds no JSON object.
    """
    check_exists(directory)
    if not is_dir(directory):
        raise FormatError(
            f"{directory} is a file; expected the adapter directory that holds {CONFIG_NAME} "
            f"and {WEIGHTS_NAME}"
        )
    path = directory / CONFIG_NAME
    if not is_file(path):
        raise FormatError(f"{directory} has no {CONFIG_NAME}; expected an adapter directory")
    return read_json_object(path)


def check_exists(path: Path) -> None:
    """Refuse a path at which nothing is.

    Raises
    ------
    FormatError
        If there is nothing, or the file system does not take the name.
    """
    if not exists(path):
        raise FormatError(f"{path} does not exist; expected an adapter directory")


class StoredTensor(NamedTuple):
    """A tensor of a file that is open: type and shape are known, its entries are not read yet.

    ``checksum`` is what the file says of its bytes; None where it says nothing.
    """

    file: OpenFile
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    checksum: str | None

    @property
    def ndim(self) -> int:
        """Number of sides."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Return the entries.

        Raises
        ------
        FormatError
            If the file has been written to since it was opened, or cannot be read.

        Warns
        -----
        LotrWarning
            If they are not as they were written, by the checksum.
        """
        stored, content = self.file.tensors[self.key], self.file.read(self.key)
        if self.checksum is not None and checksum(stored, content.data) != self.checksum:
            warn_of(self.file, self.key)
        found: np.ndarray = content.view(_DTYPES[stored.dtype]).reshape(self.shape)
        return found.astype(self.dtype, copy=False)

    def unchanged(self, expected: int) -> np.ndarray:
        """Return the entries, which were read before and had the CRC-32 ``expected``.

        Raises
        ------
        FormatError
            If they are others now, or cannot be read.
        """
        found = self._replace(checksum=None).read()
        if crc32_of(found) != expected:
            raise FormatError(
                f"{self.file.path}: {self.key} has been written to since the adapter was loaded; "
                "load it again"
            )
        return found


def crc32_of(tensor: np.ndarray) -> int:
    """CRC-32 of the bytes of a tensor."""
    return zlib.crc32(np.asarray(tensor, order="C").reshape(-1).view(np.uint8).data)


def entries_of(tensor: np.ndarray | StoredTensor) -> np.ndarray:
    """Return a tensor in memory."""
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def open_tensors(directory: Path) -> dict[str, np.ndarray | StoredTensor]:
    """Return all tensors of ``adapter_model.safetensors``, or of the shards of its index.

    They are not read yet, but for those of shards that are small together: so no more files are
    open than a large adapter has.

    Raises
    ------
    FormatError
        If a file is missing, truncated or contradicts its header or index.
    UnsupportedAdapterError
        If there are only pickled weights, which can run code when they are opened.
    """
    if is_file(directory / WEIGHTS_NAME):
        return dict(open_weights(directory / WEIGHTS_NAME)[0])
    if is_file(directory / INDEX_NAME):
        return _open_shards(directory / INDEX_NAME)
    pickled = next((p.name for p in children(directory) if p.suffix in _PICKLED), None)
    if pickled:
        raise UnsupportedAdapterError(
            f"{directory / pickled} is a pickle, which can run code when opened and is not read; "
            "load the adapter with PEFT and save it again with save_pretrained, which writes "
            f"{WEIGHTS_NAME}"
        )
    raise FormatError(f"{directory} has no {WEIGHTS_NAME} and no {INDEX_NAME}")


def is_large(size: int) -> bool:
    """Whether an adapter of so many bytes is gone through tensor by tensor, never in memory."""
    return size > IN_MEMORY


IN_MEMORY = 2**28
"""Bytes of tensors up to which an adapter is in memory: then no file stays open for it."""


def read_tensors(directory: Path) -> Tensors:
    """Return all tensors of an adapter directory; see `open_tensors`.

    Raises
    ------
    FormatError, UnsupportedAdapterError, DataError
        As `open_tensors` and `StoredTensor.read` do.
    """
    return {key: entries_of(tensor) for key, tensor in open_tensors(directory).items()}


_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def check_floating(key: str, tensor: np.ndarray, directory: Path) -> None:
    """Refuse a factor that is no finite floating-point matrix.

    Raises
    ------
    DataError
        Naming the directory and the key.
    """
    if tensor.dtype not in FLOATS:
        raise DataError(
            f"{directory}: {key} has dtype {tensor.dtype}; expected "
            f"{', '.join(known.name for known in FLOATS)}: dequantise the adapter first"
        )
    if not np.isfinite(tensor.astype(np.float64)).all():
        raise DataError(
            f"{directory}: {key} holds NaN or infinite values; expected finite numbers: "
            "the training run that wrote it diverged, take an earlier checkpoint"
        )


def adapter_files(
    config: dict[str, Any], tensors: Mapping[str, np.ndarray | Planned]
) -> dict[str, Content]:
    """Return the two files of an adapter directory, as bytes or, where large, as what writes them.

    Keys are sorted, so that equal adapters are equal files.
    """
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    metadata = {"format": "pt"}
    if is_large(sum(tensor.nbytes for tensor in tensors.values())):
        planned = {key: _planned(tensor) for key, tensor in tensors.items()}
        names = {dtype.newbyteorder("="): name for name, dtype in _DTYPES.items()}
        writes = partial(write_streamed, tensors=planned, names=names, metadata=metadata)
        return {CONFIG_NAME: text, WEIGHTS_NAME: writes}
    made = {key: x.make() if isinstance(x, Planned) else x for key, x in tensors.items()}
    return {CONFIG_NAME: text, WEIGHTS_NAME: _encoded(made, metadata, checksums=True)}


def _planned(tensor: np.ndarray | Planned) -> Planned:
    if isinstance(tensor, Planned):
        return tensor
    return Planned(tensor.dtype.newbyteorder("="), tensor.shape, lambda: tensor)


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return all tensors of a safetensors file, and the metadata in its header.

    Raises
    ------
    FormatError
        If the file is damaged.
    DataError
        If a tensor has a type that NumPy does not hold.

    Warns
    -----
    LotrWarning
        If a tensor is not as it was written, by the checksum in the header.
    """
    tensors, metadata = open_weights(path)
    return {key: tensor.read() for key, tensor in tensors.items()}, metadata


def open_weights(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return all tensors of a safetensors file, unread, and the metadata in its header.

    Raises
    ------
    FormatError, DataError
        As `read_file` does.
    """
    file = open_file(path)
    metadata = {key: text for key, text in file.metadata.items() if key != CHECKSUMS}
    return _stored(file, list(file.tensors)), metadata


def read_some(path: Path, prefix: str) -> Tensors:
    """Return the tensors of a file whose keys begin with ``prefix``, without it; no other is read.

    Raises
    ------
    FormatError, DataError
        As `read_file` does.
    """
    with safe_open(path) as file:
        keys = [key for key in file.tensors if key.startswith(prefix)]
        return {key.removeprefix(prefix): x.read() for key, x in _stored(file, keys).items()}


def _stored(file: OpenFile, keys: list[str]) -> dict[str, StoredTensor]:
    expected, found = by_key(file), {}
    for key in keys:
        _, _, name, shape, _, _ = file.tensors[key]
        dtype = _DTYPES.get(name)
        if dtype is None:
            raise DataError(
                f"{file.path}: {key} has a dtype that NumPy does not hold ({name}); expected "
                f"{', '.join(known.name for known in FLOATS)}: dequantise the adapter first"
            )
        found[key] = StoredTensor(file, key, dtype.newbyteorder("="), shape, expected.get(key))
    return found


def file_bytes(tensors: Tensors, metadata: Mapping[str, str], *, checksums: bool = False) -> bytes:
    """Return a safetensors file; equal tensors and metadata are equal bytes.

    With ``checksums`` its header holds one of every tensor; see `checksums`.
    """
    return b"".join(_encoded(tensors, metadata, checksums=checksums))


def _encoded(
    tensors: Tensors, metadata: Mapping[str, str], *, checksums: bool
) -> tuple[bytes, memoryview]:
    """A safetensors file in two parts: to join them would take its size in memory once more."""
    # Not ascontiguousarray, which makes a vector of a number.
    ordered = {key: np.asarray(tensors[key], order="C") for key in sorted(tensors)}
    content = safetensors.numpy.save(ordered, metadata=dict(metadata))
    return with_sorted_metadata(content, metadata, checksums=checksums)


def _open_shards(index_path: Path) -> dict[str, np.ndarray | StoredTensor]:
    """Return the tensors of the shards, each from the shard that the index names for it."""
    weight_map = read_weight_map(index_path)
    tensors: dict[str, np.ndarray | StoredTensor] = {}
    unnamed: dict[str, str] = {}
    shards = sorted(set(weight_map.values()))
    large = is_large(sum(file_size(index_path.parent / shard) for shard in shards))
    for shard in shards:
        file = open_file(index_path.parent / shard)
        unnamed |= dict.fromkeys(file.tensors.keys() - weight_map.keys(), shard)
        own = _stored(file, [key for key in file.tensors if weight_map.get(key) == shard])
        tensors |= own if large else {key: tensor.read() for key, tensor in own.items()}
    missing = next((key for key in weight_map if key not in tensors), None)
    if missing is not None:
        raise FormatError(
            f"{index_path} names {missing} in {weight_map[missing]}, which does not hold it; fetch "
            "the adapter again"
        )
    if unnamed:
        key = min(unnamed)
        raise FormatError(
            f"{index_path} does not name {key}, which {unnamed[key]} holds; they belong to "
            "different adapters"
        )
    return tensors


def read_weight_map(index_path: Path) -> dict[str, str]:
    """Return the file of every tensor, as an index of shards names it.

    Raises
    ------
    FormatError
        If the index is damaged, names a file that is elsewhere, or one that is missing.
    """
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path} has no weight_map; expected tensor names and their files")
    for shard in {repr(shard): shard for shard in weight_map.values()}.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard:
            raise FormatError(
                f"{index_path} names the shard {shard!r:.80}; expected a bare file name"
            )
        if not is_file(index_path.parent / shard):
            raise FormatError(f"{index_path} names the shard {shard}, which is missing")
    return weight_map
