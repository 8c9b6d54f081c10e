"""Named tensors and configuration of an adapter directory, from safetensors and JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from lotrtensor.adapters.formats.directory import CONFIG_NAME
from lotrtensor.adapters.formats.header import with_sorted_metadata
from lotrtensor.errors import DataError, FormatError, UnsupportedAdapterError

WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""The 8-bit types by their names in a header: safetensors writes them, but does not read them."""
FLOATS: tuple[np.dtype[Any], ...] = (
    *(np.dtype("float64"), np.dtype("float32"), np.dtype("float16"), BFLOAT16),
    *FLOAT8.values(),
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
    if not directory.is_dir():
        raise FormatError(
            f"{directory} is a file; expected the adapter directory that holds {CONFIG_NAME} "
            f"and {WEIGHTS_NAME}"
        )
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FormatError(f"{directory} has no {CONFIG_NAME}; expected an adapter directory")
    return read_json_object(path)


def check_exists(path: Path) -> None:
    """Refuse a path at which nothing is.

    Raises
    ------
    FormatError
        If there is nothing, or the file system does not take the name.
    """
    try:
        exists = path.exists()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    if not exists:
        raise FormatError(f"{path} does not exist; expected an adapter directory")


def read_tensors(directory: Path) -> Tensors:
    """Return all tensors of ``adapter_model.safetensors``, or of the shards of its index.

    Raises
    ------
    FormatError
        If a file is missing, truncated or contradicts its header or index.
    UnsupportedAdapterError
        If there are only pickled weights, which can run code when they are opened.
    """
    if (directory / WEIGHTS_NAME).is_file():
        return read_file(directory / WEIGHTS_NAME)[0]
    if (directory / INDEX_NAME).is_file():
        return _read_shards(directory / INDEX_NAME)
    pickled = next((p.name for p in sorted(directory.iterdir()) if p.suffix in _PICKLED), None)
    if pickled:
        raise UnsupportedAdapterError(
            f"{directory / pickled} is a pickle, which can run code when opened and is not read; "
            "load the adapter with PEFT and save it again with save_pretrained, which writes "
            f"{WEIGHTS_NAME}"
        )
    raise FormatError(f"{directory} has no {WEIGHTS_NAME} and no {INDEX_NAME}")


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


def adapter_files(config: dict[str, Any], tensors: Tensors) -> dict[str, bytes]:
    """Return the two files of an adapter directory as bytes.

    Keys are sorted, so that equal adapters are equal files.
    """
    return {
        CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS_NAME: file_bytes(tensors, {"format": "pt"}),
    }


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return all tensors of a safetensors file, and the metadata in its header.

    Raises
    ------
    FormatError
        If the file is damaged.
    DataError
        If a tensor has a type that NumPy does not hold.
    """
    tensors: dict[str, Any] = {}
    try:
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                name = file.get_slice(key).get_dtype()
                tensors[key] = None if name in FLOAT8 else file.get_tensor(key)
        missing = [key for key, tensor in tensors.items() if tensor is None]
        tensors |= _read_float8(path, missing)
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read ({error}); the file is damaged or incomplete: fetch it again"
        ) from error
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: {key} has a dtype that NumPy does not hold ({error}); expected "
            f"{', '.join(known.name for known in FLOATS)}: dequantise the adapter first"
        ) from error
    return tensors, metadata


def _read_float8(path: Path, keys: list[str]) -> Tensors:
    if not keys:
        return {}
    entries = dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    return {
        key: np.frombuffer(entries[key]["data"], FLOAT8[entries[key]["dtype"]]).reshape(
            entries[key]["shape"]
        )
        for key in keys
    }


def file_bytes(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file; equal tensors and metadata are equal bytes."""
    # Not ascontiguousarray, which makes a vector of a number.
    ordered = {key: np.asarray(tensors[key], order="C") for key in sorted(tensors)}
    content = safetensors.numpy.save(ordered, metadata=dict(metadata))
    return with_sorted_metadata(content, metadata)


def _read_shards(index_path: Path) -> Tensors:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path} has no weight_map; expected tensor names and their files")
    tensors: Tensors = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise FormatError(f"{index_path} names the shard {shard!r}; expected a bare file name")
        if not (index_path.parent / shard).is_file():
            raise FormatError(f"{index_path} names the shard {shard}, which is missing")
        tensors |= read_file(index_path.parent / shard)[0]
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise FormatError(f"{index_path} names {missing[0]}, which no shard holds")
    return tensors


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises
    ------
    FormatError
        If it cannot be read, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content
