"""Checkpoints of whole models: safetensors, sharded or not, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from lotrtensor.adapters.formats.directory import (
    check_inputs_outside,
    expand,
    replace_directory,
)
from lotrtensor.adapters.formats.tensors import BFLOAT16, read_json_object
from lotrtensor.errors import DataError, FormatError, UnsupportedAdapterError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

FLOAT_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": BFLOAT16,
}
"""Types that weights are computed with, by their names in a safetensors header."""

_OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"}
_BLOCK = 2**24


class Stored(NamedTuple):
    """Where a tensor is: its file, type as the header names it, shape, and bytes in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """Where every tensor of a checkpoint is; nothing is loaded.

    Attributes
    ----------
    directory : Path
        The checkpoint's directory.
    tensors : mapping of str to Stored
        Every tensor by its key.
    single : bool
        Whether a single file was named, rather than a directory.
    """

    directory: Path
    tensors: Mapping[str, Stored]
    single: bool = False

    def dtype(self, key: str) -> np.dtype:
        """Type of a weight.

        Raises
        ------
        DataError
            If the tensor is not floating point of 16 bits at the least: it is quantised.
        """
        stored = self.tensors[key]
        if stored.dtype not in FLOAT_TYPES:
            raise DataError(
                f"{self.directory / stored.file}: {key} has dtype {stored.dtype}; expected "
                "float32, float16, bfloat16 or float64: dequantise the checkpoint first"
            )
        return FLOAT_TYPES[stored.dtype]

    def read(self, key: str) -> np.ndarray:
        """Read one weight, in its own type.

        Raises
        ------
        FormatError
            If the file cannot be read.
        DataError
            If the tensor is not floating point.
        """
        self.dtype(key)
        path = self.directory / self.tensors[key].file
        try:
            with safe_open(path, "numpy") as file:
                tensor: np.ndarray = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read ({error}); fetch it again") from error
        return tensor

    def blocks(self, key: str) -> Iterable[np.ndarray]:
        """Bytes of one tensor of any type, a block of them at a time."""
        stored = self.tensors[key]
        path = self.directory / stored.file
        try:
            with path.open("rb") as file:
                file.seek(stored.start)
                for start in range(stored.start, stored.stop, _BLOCK):
                    count = min(_BLOCK, stored.stop - start)
                    yield np.frombuffer(file.read(count), dtype=np.uint8)
        except OSError as error:
            raise FormatError(f"{path} cannot be read ({error}); fetch it again") from error

    def packed(self) -> dict[str, str]:
        """Modules that hold quantised numbers, each with the key of one."""
        return {
            key.rpartition(".")[0]: key
            for key, stored in self.tensors.items()
            if stored.dtype not in FLOAT_TYPES and len(stored.shape) > 0
        }


def open_checkpoint(directory: Path) -> Checkpoint:
    """List the tensors of a checkpoint directory, or of a single safetensors file.

    Raises
    ------
    FormatError
        If there is no checkpoint, or a shard is missing, damaged or lacks a tensor.
    UnsupportedAdapterError
        If there are only pickled weights.
    """
    directory = expand(directory)
    if directory.is_file() and directory.suffix == ".safetensors":
        return Checkpoint(directory.parent, _read_header(directory), single=True)
    if (directory / INDEX_NAME).is_file():
        return Checkpoint(directory, _read_shards(directory))
    if (directory / SINGLE_NAME).is_file():
        return Checkpoint(directory, _read_header(directory / SINGLE_NAME))
    for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (directory / pickled).is_file():
            raise UnsupportedAdapterError(
                f"{directory / pickled} is a pickle, which can run code when opened and is not "
                f"read; load the model and save it with save_pretrained, which writes {SINGLE_NAME}"
            )
    raise FormatError(
        f"{directory} has no {SINGLE_NAME} and no {INDEX_NAME}; expected a checkpoint in "
        "safetensors form"
    )


def _read_shards(directory: Path) -> dict[str, Stored]:
    weight_map = read_json_object(directory / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{directory / INDEX_NAME} has no weight_map")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not (directory / name).is_file():
            raise FormatError(f"{directory}: the shard {name} is missing")
        for key, stored in _read_header(directory / name).items():
            # Where two shards hold a key, the index says which of them counts.
            if weight_map.get(key, name) == name:
                tensors[key] = stored
    missing = next((key for key in weight_map if key not in tensors), None)
    if missing is not None:
        raise FormatError(
            f"{directory / INDEX_NAME} names {missing} in {weight_map[missing]}, which does not "
            "hold it; fetch the checkpoint again"
        )
    return tensors


def _read_header(path: Path) -> dict[str, Stored]:
    """Type, shape and place of every tensor of a file that safetensors has found in order."""
    try:
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error}); fetch it again") from error
    return {
        key: Stored(
            path.name,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            8 + length + entry["data_offsets"][1],
        )
        for key, entry in header.items()
        if key != "__metadata__"
    }


def rewrite_checkpoint(
    source: Checkpoint,
    output: Path,
    keys: Iterable[str],
    change: Callable[[str], np.ndarray],
    *,
    force: bool,
) -> None:
    """Copy a checkpoint with some tensors changed, shard by shard, atomically.

    A changed tensor has the type and shape that it had, so that every header stays as it is and
    all other tensors, of whatever type, are copied byte by byte.

    Parameters
    ----------
    source : Checkpoint
        The checkpoint. The files beside its weights are copied as they are: configuration,
        tokenizer, the further modules of a sentence encoder; weights in other forms are not, for
        they would be those of the base.
    output : Path
        Directory to make.
    keys : iterable of str
        Tensors that change.
    change : callable
        ``change(key)`` returns what is written for a tensor, in its type and shape.
    force : bool
        Replace a checkpoint directory that stands there.

    Raises
    ------
    FormatError
        If the output may not be replaced, or cannot be written; nothing has changed then.
    """
    check_checkpoint_output(output, force=force)
    check_inputs_outside(output, source.directory)
    output = Path(os.path.abspath(expand(output)))  # noqa: PTH100 - Path.resolve would follow a link
    changed: dict[str, list[str]] = {stored.file: [] for stored in source.tensors.values()}
    for key in keys:
        changed[source.tensors[key].file].append(key)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            for path in _files_beside(source):
                shutil.copy2(path, fresh / path.name)
            for path in _module_directories(source):
                shutil.copytree(path, fresh / path.name)
            for shard in sorted(changed):
                target = fresh / (SINGLE_NAME if source.single else shard)
                _rewrite_shard(source, shard, target, changed[shard], change)
            replace_directory(fresh, output, old)
    except OSError as error:
        raise FormatError(f"{output} cannot be written: {error.strerror or error}") from error


def check_checkpoint_output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists and is not a checkpoint that ``force`` may replace.

    Raises
    ------
    FormatError
        Before any work is done.
    """
    path = expand(path)
    try:
        if not path.exists() and not path.is_symlink():
            return
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error
    if not force:
        raise FormatError(f"{path} exists; choose another output or add --force to replace it")
    holds_weights = (path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file()
    if path.is_symlink() or not holds_weights:
        raise FormatError(f"{path} exists and is no checkpoint directory; it is not replaced")


def _files_beside(source: Checkpoint) -> list[Path]:
    """Files that belong to the model and hold no weights; none beside a file named alone."""
    if source.single:
        return []
    return [
        path
        for path in source.directory.iterdir()
        if path.is_file()
        and path.suffix not in {".safetensors", *_OTHER_WEIGHTS}
        and (path.name == INDEX_NAME or not path.name.endswith(".index.json"))
    ]


def _module_directories(source: Checkpoint) -> list[Path]:
    """Subdirectories that hold further modules of a sentence encoder: a pooling, a dense layer."""
    listing = source.directory / "modules.json"
    if source.single or not listing.is_file():
        return []
    try:
        modules = json.loads(listing.read_text(encoding="utf-8"))
        names = [str(module["path"]) for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{listing} does not list modules and their paths: {error}") from error
    return [
        source.directory / name
        for name in names
        if name and Path(name).name == name and (source.directory / name).is_dir()
    ]


def _rewrite_shard(
    source: Checkpoint,
    shard: str,
    path: Path,
    keys: Iterable[str],
    change: Callable[[str], np.ndarray],
) -> None:
    shutil.copyfile(source.directory / shard, path)
    with path.open("r+b") as file:
        for key in keys:
            file.seek(source.tensors[key].start)
            file.write(np.ascontiguousarray(change(key)).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
