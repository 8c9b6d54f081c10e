"""Checkpoints of whole models: safetensors, sharded or not, one tensor in memory at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from lotrtensor.adapters.formats.directory import expand, replace_directory
from lotrtensor.adapters.formats.tensors import FLOATS, read_json_object
from lotrtensor.errors import DataError, FormatError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where every tensor of a checkpoint is, and its shape; nothing is loaded.

    Attributes
    ----------
    directory : Path
        The checkpoint's directory.
    files : mapping of str to str
        File name of every tensor.
    shapes : mapping of str to tuple of int
        Shape of every tensor.
    """

    directory: Path
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, key: str) -> np.ndarray:
        """Read one tensor, in its own type.

        Raises
        ------
        FormatError
            If the file cannot be read.
        DataError
            If the tensor is not floating point.
        """
        path = self.directory / self.files[key]
        try:
            with safe_open(path, "numpy") as file:
                tensor: np.ndarray = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read ({error}); fetch it again") from error
        except (AttributeError, TypeError, KeyError) as error:
            raise DataError(f"{path}: {key} has a dtype that is not read: dequantise it") from error
        if tensor.dtype not in FLOATS:
            raise DataError(
                f"{path}: {key} has dtype {tensor.dtype}; expected float32, float16, bfloat16 or "
                "float64"
            )
        return tensor


def open_checkpoint(directory: Path) -> Checkpoint:
    """List the tensors of a checkpoint directory, or of a single safetensors file.

    Raises
    ------
    FormatError
        If there is no checkpoint, or a shard is missing, damaged or lacks a tensor.
    """
    directory = expand(directory)
    if directory.is_file() and directory.suffix == ".safetensors":
        directory, names = directory.parent, [directory.name]
    elif (directory / INDEX_NAME).is_file():
        weight_map = read_json_object(directory / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{directory / INDEX_NAME} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
    elif (directory / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        raise FormatError(
            f"{directory} has no {SINGLE_NAME} and no {INDEX_NAME}; expected a checkpoint in "
            "safetensors form"
        )
    files: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise FormatError(f"{directory}: the shard {name} is missing")
        try:
            with safe_open(path, "numpy") as file:
                for key in file.keys():  # noqa: SIM118 - the file is no mapping
                    files[key] = name
                    shapes[key] = tuple(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read ({error}); fetch it again") from error
    return Checkpoint(directory, files, shapes)


def rewrite_checkpoint(
    source: Checkpoint,
    output: Path,
    change: Callable[[str, np.ndarray], np.ndarray],
    *,
    force: bool,
) -> None:
    """Copy a checkpoint with some tensors changed, shard by shard, atomically.

    Parameters
    ----------
    source : Checkpoint
        The checkpoint; every other file of its directory is copied as it is.
    output : Path
        Directory to make.
    change : callable
        ``change(key, tensor)`` returns what is written for a tensor, in its type and shape.
    force : bool
        Replace a checkpoint directory that stands there.

    Raises
    ------
    FormatError
        If the output may not be replaced, or cannot be written; nothing has changed then.
    """
    check_checkpoint_output(output, force=force)
    output = Path(os.path.abspath(expand(output)))  # noqa: PTH100 - Path.resolve would follow a link
    if source.directory.resolve() == output.resolve():
        raise FormatError(f"{output} is the base checkpoint itself; choose another output")
    shards = sorted(set(source.files.values()))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            for path in source.directory.iterdir():
                if path.is_file() and path.suffix != ".safetensors":
                    shutil.copy2(path, fresh / path.name)
            for shard in shards:
                _rewrite_shard(source, shard, fresh / shard, change)
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
    if not path.exists():
        return
    if not force:
        raise FormatError(f"{path} exists; choose another output or add --force to replace it")
    if not ((path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file()):
        raise FormatError(f"{path} exists and is no checkpoint directory; it is not replaced")


def _rewrite_shard(
    source: Checkpoint, shard: str, path: Path, change: Callable[[str, np.ndarray], np.ndarray]
) -> None:
    keys = [key for key, name in source.files.items() if name == shard]
    with safe_open(source.directory / shard, "numpy") as file:
        metadata = file.metadata()
        tensors = {key: np.ascontiguousarray(change(key, file.get_tensor(key))) for key in keys}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    with path.open("rb") as written:
        os.fsync(written.fileno())
