"""An output appears whole or not at all: made beside its place, synced, and exchanged for it.

On Linux one call of the kernel puts the new output in the place of the old one, so that a process
that is killed at any moment leaves the one or the other. Where there is no such call the old output
is moved away first, and a kill between the two renames leaves it in the hidden folder beside, from
which the next writer takes it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lotrtensor.errors import FormatError, LotrError

_NOREPLACE, _EXCHANGE, _HERE = 1, 2, -100  # of linux/fs.h and fcntl.h
_MISSING = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV}
_MARK = ".lotr-unfinished"
_PATIENCE = 5.0
_OLD = "old"


def absolute(path: Path) -> Path:
    """Return a path from the root, links in it not followed."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow a link


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to make an output in; it is gone afterwards, whatever happens.

    So are those of writers of this output that were killed, and, if the output is not made, the
    parents that were.

    Raises
    ------
    FormatError
        If it cannot be made.
    """
    parents = [p for p in path.parents if not os.path.lexists(p)]
    with contextlib.ExitStack() as undo:
        undo.callback(_drop_parents, path, parents)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stem = _stem(path)
            # Nobody clears away a folder that is about to be held.
            with _held(path.parent, _PATIENCE):
                _clear_unfinished(path, stem)
                folder = Path(tempfile.mkdtemp(prefix=stem, suffix=_MARK, dir=path.parent))
                undo.callback(_drop, path, folder)
                undo.enter_context(_held(folder))
        except (OSError, ValueError) as error:
            raise unwritable(path, error) from error
        yield folder


def _drop(path: Path, folder: Path) -> None:
    """Remove the folder of a writer that is done."""
    try:
        _restore(path, folder)
        shutil.rmtree(folder, ignore_errors=True)  # the output stands, or never did
    except BaseException:  # an interrupt, which shall leave no folder either
        _restore(path, folder)
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _drop_parents(path: Path, parents: list[Path]) -> None:
    """Remove the parents that were made for an output that was not."""
    if not os.path.lexists(path):
        for parent in parents:
            with contextlib.suppress(OSError):  # another writer uses it, or there is none
                parent.rmdir()


@contextlib.contextmanager
def whole(path: Path, check: Callable[[Path], object], *, force: bool) -> Iterator[Path]:
    """A place of the name of ``path`` to write to, which becomes ``path`` if nothing fails.

    What has been written can so be read again before it takes the place of anything.

    Parameters
    ----------
    path : Path
        The output.
    check : callable
        Refuses an output that may not be replaced.
    force : bool
        Replace what stands there.
    """
    path = absolute(path)
    with scratch(path) as folder:
        fresh = folder / path.name
        try:
            yield fresh
        except LotrError as error:  # it names the place, which is nothing to the user
            raise type(error)(str(error).replace(str(fresh), str(path))) from error
        publish(fresh, path, check, force=force)


def publish(fresh: Path, path: Path, check: Callable[[Path], object], *, force: bool) -> None:
    """Put what is complete at ``fresh``, in a `scratch` folder, in its place.

    Parameters
    ----------
    fresh, path : Path
        From and to.
    check : callable
        Refuses an output that may not be replaced.
    force : bool
        Replace what stands there; otherwise whatever has appeared there stays.

    Raises
    ------
    FormatError
        If it cannot be put there; nothing has changed then.
    """
    try:
        if force and os.path.lexists(path):
            check(path)
            _replace(fresh, path, check)
        else:
            _rename_new(fresh, path)
    except FileExistsError as error:
        raise FormatError(
            f"{path} has appeared while it was written; it is not replaced: choose another output"
        ) from error
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error
    with contextlib.suppress(OSError):  # the output stands; only its durability is open
        sync(path.parent)


Content = bytes | tuple[bytes | memoryview, ...] | Callable[[BinaryIO], None]
"""Bytes of a file, whole or in parts that follow each other; or what writes them."""


def write_synced(path: Path, content: Content) -> None:
    """Write a file whose content is on the disk afterwards."""
    with path.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.writelines(content if isinstance(content, tuple) else (content,))
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Bring the names of a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: Exception) -> FormatError:
    """Return the refusal of an output that the file system does not take."""
    return FormatError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")


def _replace(fresh: Path, path: Path, check: Callable[[Path], object]) -> None:
    """Exchange two outputs; what is taken out is checked again, now that nobody writes to it."""
    if renameat2(fresh, path, _EXCHANGE):
        try:
            check(fresh)
        except BaseException:
            renameat2(fresh, path, _EXCHANGE)
            raise
        return
    if fresh.is_file():
        fresh.replace(path)
        return
    path.rename(fresh.parent / _OLD)
    fresh.rename(path)


def _rename_new(fresh: Path, path: Path) -> None:
    """Rename to a place where nothing is, and where nothing that appears is touched."""
    if renameat2(fresh, path, _NOREPLACE):
        return
    if fresh.is_file():
        path.hardlink_to(fresh)
    elif os.path.lexists(path):
        raise FileExistsError
    else:
        fresh.rename(path)  # which no directory that holds anything lets itself be replaced by


def renameat2(source: Path, target: Path, flags: int) -> bool:
    """Call the kernel's renameat2; False where it, or the file system, has none.

    Raises
    ------
    OSError
        If it refuses.
    """
    function = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        return False
    function = ctypes.CDLL(None, use_errno=True).renameat2
    if not function(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags):
        return True
    code = ctypes.get_errno()
    if code in _MISSING:
        return False
    raise OSError(code, os.strerror(code), str(target))


def _restore(path: Path, folder: Path) -> None:
    """Put the old output back where two renames were interrupted between them."""
    old = folder / _OLD
    with contextlib.suppress(OSError):
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)


def _stem(path: Path) -> str:
    """What the names of the folders of an output begin with; no longer than a name may be."""
    return "." + os.fsdecode(os.fsencode(path.name)[:100]) + "."


def _clear_unfinished(path: Path, stem: str) -> None:
    """Remove the folders of writers that were killed: nobody holds them any more."""
    for entry in path.parent.iterdir():
        if not (entry.name.startswith(stem) and entry.name.endswith(_MARK)) or entry.is_symlink():
            continue
        with contextlib.suppress(OSError), _held(entry):
            _restore(path, entry)
            shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder, as long as this process lives at most.

    Raises
    ------
    BlockingIOError
        If another process holds it for longer than ``patience``, in seconds.
    """
    if fcntl is None or (patience and folder.name.endswith(_MARK)):  # within a folder that is held
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, time.monotonic() + patience)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, until: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise BlockingIOError(errno.EAGAIN, "another process holds the folder") from None
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return
        else:
            return


try:
    import fcntl
except ImportError:  # Windows, where a folder in use cannot be removed anyhow
    fcntl = None  # type: ignore[assignment]
