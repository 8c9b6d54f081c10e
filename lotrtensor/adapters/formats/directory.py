"""Outputs: what may be replaced, and files and directories written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lotrtensor.adapters.formats.paths import children, exists, is_dir, is_file, unreadable
from lotrtensor.adapters.formats.publish import (
    Content,
    absolute,
    publish,
    scratch,
    sync,
    unwritable,
    write_synced,
)
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
    if not isinstance(text, str) or not text or "\0" in text or not _encodable(text):
        raise OptionError(f"the path is {path!r}; expected the path of a file or directory")
    return text


def _encodable(text: str) -> bool:
    try:
        return bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False


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
    if path.is_symlink() or not is_dir(path):
        raise _no_adapter(path)
    names = [child.name for child in children(path)]
    if not names:
        return
    if not is_file(path / CONFIG_NAME):
        raise _no_adapter(path)
    foreign = next((name for name in names if not _OWN.fullmatch(name)), None)
    if foreign is not None:
        raise FormatError(
            f"{path} holds {foreign}, which is no part of an adapter and would be deleted; move it "
            "away or choose another output"
        )


_OWN = re.compile(
    r"adapter_config\.json|adapter_model(-\d+-of-\d+)?\.safetensors|"
    r"adapter_model\.safetensors\.index\.json"
)
"""Names of the files that an adapter directory is made of."""


def _no_adapter(path: Path) -> FormatError:
    return FormatError(
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
    if _stands(path, force=force) and (path.is_symlink() or not is_file(path)):
        raise FormatError(f"{path} exists and is no file; it is not replaced")


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
    resolved = _resolved(output)
    for path in inputs:
        found = _resolved(path)
        if found.is_relative_to(resolved) and not (in_place and found == resolved):
            raise FormatError(
                f"{output} holds {path}, which replacing it would delete; choose another output"
            )


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        return expand(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
        raise unreadable(expand(path), error) from error


def _stands(path: Path, *, force: bool) -> bool:
    try:
        stands = os.path.lexists(path) or exists(path)
    except ValueError as error:
        raise unwritable(path, error) from error
    if stands and not force:
        raise FormatError(f"{path} exists; choose another output or add --force to replace it")
    return stands


def write_file(
    path: Path,
    content: bytes,
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write ``content`` as the file ``path``, atomically; its parents are made where missing.

    Parameters
    ----------
    path : Path
        The file.
    content : bytes
        What it holds.
    force : bool
        Replace a file that stands there.
    check : callable, optional
        Refuses a file that may not be replaced.

    Raises
    ------
    FormatError
        If the output may not be replaced, or cannot be written; nothing has changed then.
    """
    path = absolute(path)

    def replaceable(place: Path) -> None:
        check_file_output(place, force=True)
        if check is not None:
            check(place)

    check_file_output(path, force=force)
    if force and exists(path):
        replaceable(path)
    with scratch(path) as folder:
        fresh = folder / path.name
        try:
            write_synced(fresh, content)
        except OSError as error:
            raise unwritable(path, error) from error
        publish(fresh, path, replaceable, force=force)


def write_directory(path: Path, files: Mapping[str, Content], *, force: bool = False) -> None:
    """Write ``files`` as the directory ``path``, atomically.

    Parameters
    ----------
    path : Path
        The directory to make; its parents are made where missing.
    files : mapping of str to Content
        Contents by file name, whole or in parts, or what writes them.
    force : bool
        Replace an adapter directory that stands there.

    Raises
    ------
    FormatError
        If the output may not be replaced, or cannot be written; nothing has changed then.
    """
    path = absolute(path)
    check_output(path, force=force)
    with scratch(path) as folder:
        fresh = folder / path.name
        try:
            fresh.mkdir()
            for name, content in files.items():
                write_synced(fresh / name, content)
            sync(fresh)
        except OSError as error:
            raise unwritable(path, error) from error
        publish(fresh, path, partial(check_output, force=True), force=force)
