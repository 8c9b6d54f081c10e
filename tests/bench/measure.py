"""One measurement: seconds, and the peak of memory in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Median time of ``repeats`` runs after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def in_own_process(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run ``work`` in a fresh process and add its peak memory, ``peak_bytes``."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_with_peak, (work, *args))


def _with_peak(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    found = work(*args)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found
