"""One thread for every matrix product, so that a result does not depend on how many there are.

Several threads sum the blocks of a product in another order than one does, and what is rounded
otherwise can stop an iteration a pass sooner. Equal input shall be equal bytes on a laptop and on
a server: parts that are independent of one another are worked on at the same time instead.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import threadpoolctl

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_lock = threading.RLock()
_depth = 0
_limits: list[threadpoolctl.threadpool_limits] = []


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit NumPy's and SciPy's linear algebra to one thread; nested, the outermost counts."""
    global _depth  # noqa: PLW0603 - the limit is one of the process
    with _lock:
        if _depth == 0:
            _limits.append(threadpoolctl.threadpool_limits(1, user_api="blas"))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            while _depth == 0 and _limits:
                _limits.pop().restore_original_limits()


def scipy_linalg() -> Any:
    """Import ``scipy.linalg`` where it is first needed: that takes longer than most commands.

    It brings a BLAS of its own, which a limit that was set before does not know of.
    """
    with _lock:
        known = "scipy.linalg" in sys.modules
        import scipy.linalg

        if _depth and not known:
            _limits.append(threadpoolctl.threadpool_limits(1, user_api="blas"))
    return scipy.linalg


def on_one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute the same numbers whatever the number of threads is.

    >>> @on_one_thread
    ... def twice(x):
    ...     return 2 * x
    >>> twice(3)
    6
    """

    @wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        with one_thread():
            return function(*args, **kwargs)

    return limited


def side_by_side(function: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """Return ``function`` of every part, as many at a time as there are processors.

    Each part is computed on one thread, so that the results do not depend on that number.

    >>> side_by_side(abs, [-1, 2, -3])
    [1, 2, 3]
    """
    workers = min(len(parts), _processors())
    if workers < 2:
        return one_by_one(function, parts)
    from concurrent.futures import ThreadPoolExecutor

    with one_thread(), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, parts))


def one_by_one(function: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """Return ``function`` of every part, in turn: for parts that are small, or a caller's pool.

    >>> one_by_one(abs, [-1, 2, -3])
    [1, 2, 3]
    """
    return [function(part) for part in parts]


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
