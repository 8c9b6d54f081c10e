"""Check whether the tensors of an adapter's files are as they were written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from lotrtensor.adapters.formats.checksums import by_key, checksum
from lotrtensor.adapters.formats.directory import SINGLE_FILE, expand
from lotrtensor.adapters.formats.header import safe_open
from lotrtensor.adapters.formats.paths import children, is_dir, is_file
from lotrtensor.adapters.formats.tensors import INDEX_NAME, check_exists, read_weight_map
from lotrtensor.errors import FormatError


class FileCheck(NamedTuple):
    """What became of a file: its tensors, and the keys of those that are not as they were written.

    ``checked`` is False where the file holds no checksums.
    """

    path: Path
    tensors: int
    checked: bool
    damaged: tuple[str, ...]


def check_files(path: str | os.PathLike[str]) -> tuple[FileCheck, ...]:
    """Compare all tensors of an adapter with the checksums beside them.

    Parameters
    ----------
    path : path-like
        An adapter directory, or a safetensors file.

    Returns
    -------
    tuple of FileCheck
        One a file.

    Raises
    ------
    FormatError
        If there are no safetensors files, or one contradicts its own header or index.
    """
    found = expand(path)
    check_exists(found)
    return tuple(_check(file) for file in _files(found))


def _files(path: Path) -> list[Path]:
    if not is_dir(path):
        return [path]
    if is_file(path / INDEX_NAME):
        return [path / name for name in sorted(set(read_weight_map(path / INDEX_NAME).values()))]
    files = [child for child in children(path) if child.suffix == SINGLE_FILE]
    if not files:
        raise FormatError(f"{path} holds no {SINGLE_FILE} file; expected an adapter")
    return files


def _check(path: Path) -> FileCheck:
    with safe_open(path) as file:
        expected = by_key(file)
        damaged = [
            key
            for key, stored in file.tensors.items()
            if expected and checksum(stored, file.read(key).data) != expected[key]
        ]
        return FileCheck(path, len(file.tensors), bool(expected), tuple(damaged))
