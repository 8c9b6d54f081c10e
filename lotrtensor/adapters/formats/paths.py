"""What stands at a path: asked without surprise, and opened only where it is a regular file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from lotrtensor.errors import FormatError

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF}
"""Codes that say that nothing is there, where others say that it cannot be told."""


def is_file(path: Path) -> bool:
    """Whether a regular file stands at ``path``, or a link to one.

    Raises
    ------
    FormatError
        If the file system does not tell: it forbids to look, or takes no such name.
    """
    return stat.S_ISREG(_mode(path))


def is_dir(path: Path) -> bool:
    """Whether a directory stands at ``path``; see `is_file`."""
    return stat.S_ISDIR(_mode(path))


def exists(path: Path) -> bool:
    """Whether anything stands at ``path``; see `is_file`."""
    return _mode(path) != 0


def file_size(path: Path) -> int:
    """Bytes of a file; see `is_file`."""
    try:
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def children(directory: Path) -> list[Path]:
    """What a directory holds, by name.

    Raises
    ------
    FormatError
        If it cannot be listed.
    """
    try:
        return sorted(directory.iterdir())
    except (OSError, ValueError) as error:
        raise unreadable(directory, error) from error


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device could block, or never end.

    ``buffering`` is that of `open`.

    Raises
    ------
    FormatError
        If it is none, or cannot be opened.
    """
    try:
        # Without waiting: a pipe that took the file's place since would block the opening.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path} is no regular file; expected one")
    return open(descriptor, "rb", buffering)  # noqa: PTH123 - of a descriptor


_BINARY = getattr(os, "O_BINARY", 0)


def unreadable(path: Path, error: Exception) -> FormatError:
    """Return the refusal of a path that the file system gives no access to."""
    return FormatError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode  # noqa: PTH116 - Path.stat hides nothing, but has no mode 0
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        raise unreadable(path, error) from error
    except ValueError as error:  # a NUL, or a character that the file system cannot encode
        raise unreadable(path, error) from error
