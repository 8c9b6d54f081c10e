"""Pieces of work on threads, processes or machines: their results in order, or one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from typing import Any

from lotrtensor.errors import FormatError, OptionError


@contextlib.contextmanager
def running(executor: Executor | None) -> Iterator[Executor]:
    """The executor that was given, or threads for as long as they are needed.

    Raises
    ------
    OptionError
        If it is no executor.
    """
    if executor is None:
        with ThreadPoolExecutor() as threads:
            yield threads
    elif isinstance(executor, Executor):
        yield executor
    else:
        raise OptionError(
            f"executor is a {type(executor).__name__}; expected a concurrent.futures.Executor"
        )


def results(
    executor: Executor,
    work: Callable[..., Any],
    each: Sequence[tuple[Any, ...]],
    progress: Callable[[int], None],
) -> list[Any]:
    """Results of all pieces of one kind, in their order.

    Where one fails, those that have not begun are cancelled, and those that have are waited for.
    Executors that do not tell which have begun, as Dask's, are not: a piece of theirs may still
    write once this has ended, and has to write where nobody else does.

    Parameters
    ----------
    executor : concurrent.futures.Executor
        What runs them.
    work : callable
        A function of a module.
    each : sequence of tuple
        Arguments of every piece.
    progress : callable
        Told of the number of results that are there before every one.

    Raises
    ------
    FormatError
        If a worker has ended before its work was done.
    OptionError
        If the executor has been shut down.
    """
    pieces: list[Future[Any]] = []
    found: list[Any] = []
    try:
        for arguments in each:
            pieces.append(_submitted(executor, work, arguments))
        for piece in pieces:
            progress(len(found))
            found.append(piece.result())
    except BrokenExecutor as error:
        raise FormatError(
            f"a worker ended before its work was done ({error}); run the same command again"
        ) from error
    finally:
        wait([piece for piece in pieces if not piece.cancel()])
    return found


def _submitted(
    executor: Executor, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> Future[Any]:
    try:
        return executor.submit(work, *arguments)
    except BrokenExecutor:
        raise
    except RuntimeError as error:
        raise OptionError(f"the executor takes no work: {error}") from error
