"""An output appears whole or not at all: written beside, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lotrtensor.errors import FormatError, OptionError

CONFIG_NAME = "adapter_config.json"
SINGLE_FILE = ".safetensors"
"""Suffix of an adapter that is one file: kohya's and diffusers' LoRA."""


def expand(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` with a leading ``~`` expanded.

    Raises
    ------
    OptionError
        If it is no path.
    FormatError
        If there is no such home directory.
    """
    path = check_path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FormatError(f"{path} names no home directory: {error}") from error


def check_path(path: str | os.PathLike[str]) -> str:
    """Return ``path`` as text.

    Raises
    ------
    OptionError
        If it is neither text nor a path, or is empty, or no file system has such a name.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise OptionError(f"the path is {path!r}; expected the path of a file or directory")
    return text


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output directory that exists, before any work is done.

    Raises
    ------
    FormatError
        If ``path`` exists and ``force`` is not given, or if it is no adapter directory, which
        ``force`` does not replace either; or if it has the name of a file.
    """
    path = expand(path)
    if path.suffix == SINGLE_FILE:
        raise FormatError(
            f"{path} names a file, and this adapter is a directory; leave {SINGLE_FILE} away"
        )
    if not _stands(path, force=force):
        return
    replaceable = (
        path.is_dir()
        and not path.is_symlink()
        and ((path / CONFIG_NAME).is_file() or not any(path.iterdir()))
    )
    if not replaceable:
        raise FormatError(
            f"{path} exists and is not an adapter directory (no {CONFIG_NAME}); it is not "
            "replaced: choose another output"
        )


def check_file_output(path: Path, *, force: bool) -> None:
    """Refuse an output file that exists, before any work is done.

    Raises
    ------
    FormatError
        If ``path`` exists and ``force`` is not given, or if it is no regular file.
    """
    path = expand(path)
    if _stands(path, force=force) and (path.is_symlink() or not path.is_file()):
        raise FormatError(f"{path} exists and is no file; it is not replaced")


def check_lora_output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists: a directory, or a file if it ends in ``.safetensors``.

    Raises
    ------
    FormatError
        As `check_output` and `check_file_output` do.
    """
    check = check_file_output if path.suffix == SINGLE_FILE else check_output
    check(path, force=force)


def check_inputs_outside(
    output: Path, *inputs: str | os.PathLike[str], in_place: bool = False
) -> None:
    """Refuse an output directory that is, or holds, what is read: to replace it would delete that.

    Parameters
    ----------
    output : Path
        What is to be written.
    *inputs : path-like
        What is read.
    in_place : bool
        The output may be the input itself, which is read to the end before it is replaced.

    Raises
    ------
    FormatError
        Naming the input.
    """
    resolved = expand(output).resolve()
    for path in inputs:
        found = expand(path).resolve()
        if found.is_relative_to(resolved) and not (in_place and found == resolved):
            raise FormatError(
                f"{output} holds {path}, which replacing it would delete; choose another output"
            )


def _stands(path: Path, *, force: bool) -> bool:
    try:
        if not path.exists() and not path.is_symlink():
            return False
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error
    if not force:
        raise FormatError(f"{path} exists; choose another output or add --force to replace it")
    return True


def write_file(path: Path, content: bytes, *, force: bool = False) -> None:
    """Write ``content`` as the file ``path``, atomically; its parents are made where missing.

    Raises
    ------
    FormatError
        If the output may not be replaced, or cannot be written; nothing has changed then.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow a link
    check_file_output(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            fresh = Path(scratch) / "new"
            _write_synced(fresh, content)
            fresh.replace(path)
        with contextlib.suppress(OSError):  # the new file stands; only its durability is open
            _sync(path.parent)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error


def write_directory(path: Path, files: Mapping[str, bytes], *, force: bool = False) -> None:
    """Write ``files`` as the directory ``path``, atomically.

    Parameters
    ----------
    path : Path
        The directory to make; its parents are made where missing.
    files : mapping of str to bytes
        Contents by file name.
    force : bool
        Replace an adapter directory that stands there.

    Raises
    ------
    FormatError
        If the output may not be replaced, or cannot be written; nothing has changed then.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow a link
    check_output(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            for name, content in files.items():
                _write_synced(fresh / name, content)
            _sync(fresh)
            replace_directory(fresh, path, old)
            shutil.rmtree(old, ignore_errors=True)  # interrupted here, the context still clears it
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error


def replace_directory(fresh: Path, path: Path, old: Path) -> None:
    """Rename ``fresh`` to ``path``; what stood there goes to ``old``, and back if that fails.

    A signal between the two renames must not lose both, hence every exception is caught.
    """
    try:
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    with contextlib.suppress(OSError):  # the new directory stands; only its durability is open
        _sync(path.parent)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
