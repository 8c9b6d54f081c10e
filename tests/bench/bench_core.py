"""The core against its targets: one large group, TensorLy, growth with size, slices from disk."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import tensorly
from tensorly.decomposition import partial_tucker

from lotrtensor import LazyStack, LowRankStack, tucker2
from tests.bench.measure import in_own_process, seconds
from tests.bench.stacks import planted_stack

Row = dict[str, Any]


def large_group(method: str) -> Row:
    """32 slices of 4096 × 4096, r = 16, rank 32, float32."""
    stack = planted_stack(32, 4096, 4096, 16)
    taken = seconds(lambda: tucker2(stack, 32, method=method))
    fit = tucker2(stack, 32, method=method)
    return {
        "case": f"32 × 4096 × 4096, r 16, rank 32, {method}",
        "seconds": taken,
        "error": fit.relative_error,
        "bound": fit.lower_bound,
    }


def against_tensorly(slices: int, side: int, r: int) -> Row:
    """Dense ``partial_tucker`` and `tucker2` at rank 32 of the same slices, one after the other."""
    stack = planted_stack(slices, side, side, r)
    dense = stack.to_dense()
    tensorly.set_backend("numpy")
    taken = seconds(lambda: tucker2(stack, 32, method="matrix-free"))
    error = tucker2(stack, 32, method="matrix-free").relative_error
    start = time.perf_counter()
    (core, factors), _ = partial_tucker(dense, rank=[32, 32], modes=[1, 2], tol=1e-5)
    theirs = time.perf_counter() - start
    lost2 = norm2 = 0.0
    for k in range(slices):
        lost2 += float(np.sum((dense[k] - factors[0] @ core[k] @ factors[1].T) ** 2.0))
        norm2 += float(np.sum(dense[k] ** 2.0))
    return {
        "case": f"{slices} × {side} × {side}, r {r}, rank 32, matrix-free",
        "seconds": taken,
        "error": error,
        "tensorly seconds": theirs,
        "tensorly error": (lost2 / norm2) ** 0.5,
        "ratio": theirs / taken,
    }


AXES = {"slices": (20, 40, 80), "r": (16, 32, 64), "m + n": (2048, 4096, 8192)}
"""Sizes along which the others are as large as they get: 80 slices of 8192 × 8192, r = 64."""


def growth(axis: str) -> Row:
    """Log–log slope of the matrix-free time along one axis."""
    times = []
    for value in AXES[axis]:
        size = {"slices": 80, "m": 8192, "n": 8192, "r": 64}
        size.update({"m": value, "n": value} if axis == "m + n" else {axis: value})
        stack = planted_stack(size["slices"], size["m"], size["n"], size["r"])
        # One number of passes for all, so that the slope is that of the cost of a pass.
        times.append(seconds(lambda s=stack: _few_passes(s), 3))
    slope = np.polyfit(np.log(AXES[axis]), np.log(times), 1)[0]
    return {"case": f"growth in {axis}", "seconds": times[-1], "slope": float(slope)}


def lazy(slices: int = 32, side: int = 4096) -> Row:
    """Whole slices produced on demand: passes, and time against the same matrix products."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((side, side), dtype=np.float32) / 64
    left = rng.standard_normal((side, 32), dtype=np.float32)
    reads = 0

    def read(k: int) -> np.ndarray:
        nonlocal reads
        reads += 1
        core = np.random.default_rng(k).standard_normal((32, side), dtype=np.float32)
        return base + left @ core

    block = rng.standard_normal((side, 40), dtype=np.float32)
    image = base @ block
    start = time.perf_counter()
    for k in range(slices):
        read(k)
    reading = time.perf_counter() - start
    products = slices * seconds(lambda: (base @ block, base.T @ image), 3)
    reads = 0
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = tucker2(LazyStack(read, (slices, side, side)), 32)
    taken = time.perf_counter() - start
    passes = reads / slices
    return {
        "case": f"{slices} slices of {side}² on demand, rank 32",
        "seconds": taken,
        "error": fit.relative_error,
        "passes": passes,
        "ratio": taken / (passes * (reading + products)),
    }


DENSE = ((8, 512, 8), (16, 1024, 16), (32, 2048, 16))
"""Slices, side and r that the dense route is run on; the last takes it six minutes."""


def run() -> list[Row]:
    """All measurements, each in a process of its own."""
    rows = [in_own_process(large_group, method) for method in ("exact", "matrix-free")]
    rows += [in_own_process(against_tensorly, *case) for case in DENSE]
    rows += [in_own_process(growth, axis) for axis in AXES]
    rows.append(in_own_process(lazy))
    return rows


def _few_passes(stack: LowRankStack) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tucker2(stack, 32, method="matrix-free", max_passes=4)
