"""Write a copy of a checkpoint with some tensors changed and every other byte kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from lotrtensor.adapters.formats.checkpoint import SINGLE_NAME, WEIGHT_NAMES, Checkpoint
from lotrtensor.adapters.formats.directory import (
    check_inputs_outside,
    expand,
    replace_directory,
)
from lotrtensor.adapters.formats.json_text import read_json
from lotrtensor.adapters.formats.paths import children, is_dir, is_file
from lotrtensor.errors import FormatError

_OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"}


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
        Names of the tensors that change.
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
    for name in keys:
        changed[source.tensors[name].file].append(name)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            for path in _files_beside(source):
                shutil.copy2(path, fresh / path.name)
            for path in _module_directories(source):
                shutil.copytree(path, fresh / path.name)
            # A single file gets the name that is looked for in a directory.
            kept = WEIGHT_NAMES if source.single else changed
            for shard in sorted(changed):
                target = fresh / (shard if shard in kept else SINGLE_NAME)
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
    holds_weights = any(is_file(path / name) for name in WEIGHT_NAMES)
    if path.is_symlink() or not holds_weights:
        raise FormatError(f"{path} exists and is no checkpoint directory; it is not replaced")


def _files_beside(source: Checkpoint) -> list[Path]:
    """Files that belong to the model and hold no weights; none beside a file named alone.

    An index is copied where it is the one that was read: another would speak of weights that are
    not written.
    """
    if source.single:
        return []
    return [
        path
        for path in children(source.directory)
        if is_file(path)
        and path.suffix not in {".safetensors", *_OTHER_WEIGHTS}
        and (path.name == source.index or not path.name.endswith(".index.json"))
    ]


def _module_directories(source: Checkpoint) -> list[Path]:
    """Subdirectories that hold further modules of a sentence encoder: a pooling, a dense layer."""
    listing = source.directory / "modules.json"
    if source.single or not is_file(listing):
        return []
    modules = read_json(listing)
    try:
        names = [str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise FormatError(f"{listing} does not list modules and their paths: {error}") from error
    return [
        source.directory / name
        for name in names
        if name and Path(name).name == name and is_dir(source.directory / name)
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
