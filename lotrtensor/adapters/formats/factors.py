"""Stored factors: read as matrices, checked, the scale folded in; and shaped as they were.

Those of a large adapter are checked when it is loaded, and read again whenever they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lotrtensor.adapters.formats.tensors import (
    BFLOAT16,
    StoredTensor,
    check_floating,
    crc32_of,
    entries_of,
)
from lotrtensor.adapters.modules import LazyModule, LoraModule
from lotrtensor.core.linalg import largest_entry, largest_term, squares_hold
from lotrtensor.errors import FormatError, UnsupportedAdapterError


class Factor(NamedTuple):
    """A stored factor under the key that an error names, in memory or not yet read."""

    key: str
    tensor: np.ndarray | StoredTensor

    @property
    def entries(self) -> np.ndarray:
        """The factor in memory."""
        return entries_of(self.tensor)


def as_matrices(up: Factor, down: Factor, path: Path) -> tuple[Factor, Factor, tuple[int, ...]]:
    """Return B and A as matrices, and the kernel of a convolution, empty for any other layer.

    A convolution's A is (r, c, k, k) and its B (m, r, 1, 1): ΔW is the m × (c · k · k) matrix of
    its kernel's update, since B holds one weight a channel.

    Raises
    ------
    UnsupportedAdapterError
        If the shapes are neither of matrices nor of such a convolution.
    """
    a, b = down.entries, up.entries
    kernel = a.shape[2:]
    if b.ndim != a.ndim or a.ndim > 5 or any(size != 1 for size in b.shape[2:]):
        raise UnsupportedAdapterError(
            f"{path}: {down.key} is {a.shape} and {up.key} is {b.shape}; "
            "expected matrices, or a convolution (r, c, k, k) and one of kernel 1 (m, r, 1, 1)"
        )
    if not kernel or 0 in a.shape:
        return up._replace(tensor=b), down._replace(tensor=a), ()
    if a.shape[0] != b.shape[1] and b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise UnsupportedAdapterError(
            f"{path}: {down.key} is {a.shape} and {up.key} is {b.shape}: a convolution in "
            f"{a.shape[0] // b.shape[1]} groups, whose update is no product of two matrices"
        )
    up = up._replace(tensor=b.reshape(b.shape[:2]))
    return up, down._replace(tensor=a.reshape(a.shape[0], -1)), kernel


def with_kernel(
    name: str, b: np.ndarray, a: np.ndarray, kernel: Sequence[int], path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors B and A of a convolution in the shapes that a file has for them.

    Raises
    ------
    FormatError
        If the inputs are no multiple of the kernel's size.
    """
    if a.shape[1] % math.prod(kernel):
        raise FormatError(
            f"{path}: {name} has {a.shape[1]} inputs, which {list(kernel)} do not divide"
        )
    return b.reshape(*b.shape, *(1 for _ in kernel)), a.reshape(a.shape[0], -1, *kernel)


def check_pair(b: Factor, a: Factor, path: Path) -> None:
    """Refuse two stored factors that are no pair of matrices (m, r) and (r, n).

    Raises
    ------
    FormatError
        If a shape is wrong.
    DataError
        If a factor is not finite floating point.
    """
    for factor in (a, b):
        if factor.tensor.ndim != 2 or 0 in factor.tensor.shape:
            raise FormatError(
                f"{path}: {factor.key} has shape {factor.tensor.shape}; expected a matrix "
                "of rank at least 1 (an empty one comes from a sharded run saved without gathering)"
            )
        check_floating(factor.key, factor.entries, path)
    if b.tensor.shape[1] != a.tensor.shape[0]:
        raise FormatError(
            f"{path}: {b.key} is {b.tensor.shape} and {a.key} is {a.tensor.shape}; expected "
            "(m, r) and (r, n) with one r"
        )


def scaled_module(
    name: str, b: Factor, a: Factor, scale: float, path: Path, embedding: bool = False
) -> LoraModule:
    """Return a module from its two stored matrices, ``scale`` folded into B.

    Raises
    ------
    FormatError
        If the scale makes them infinite.
    """
    wide = np.result_type(*(_as_wide(f.tensor.dtype) for f in (a, b)))
    up, down = b.entries.astype(wide), a.entries.astype(wide)
    size = largest_term(up, down) * abs(scale)
    # In float32 a factor could become zero or infinite, though the product does not.
    largest = largest_entry(up) * abs(scale)
    if not squares_hold(size, up) or (largest and not 1e-30 < largest < 1e30):
        up, down = up.astype(np.float64), down.astype(np.float64)
    with np.errstate(over="ignore"):
        scaled = up * up.dtype.type(scale)
    if not np.isfinite(scaled).all():
        raise FormatError(
            f"{path}: {b.key} times its scale {scale:.3g} (alpha over r) is infinite; "
            "expected a scale of ordinary size"
        )
    return LoraModule(
        name=name,
        B=scaled,
        A=down,
        embedding=embedding,
        stored=(b.tensor.dtype, a.tensor.dtype),
    )


def on_demand(
    module: LoraModule, b: Factor, a: Factor, read: tuple[Factor, Factor], scale: float
) -> LoraModule:
    """Return a module whose factors are read from their file whenever they are asked for.

    They are read-only: what is written to them would be gone with the next reading. One that is cut
    out of a tensor stays in memory.

    Parameters
    ----------
    module : LoraModule
        What `scaled_module` returned.
    b, a : Factor
        The factors as they are in the file, of whatever shape.
    read : (Factor, Factor)
        What has been read of them, and checked.
    scale : float
        What is folded into B.
    """
    if not (isinstance(b.tensor, StoredTensor) and isinstance(a.tensor, StoredTensor)):
        return module
    (m, n), r, dtype = module.shape, module.rank, module.B.dtype
    up, down = b.tensor, a.tensor
    sums = [crc32_of(factor.entries) for factor in read]

    def make() -> tuple[np.ndarray, np.ndarray]:
        wide = up.unchanged(sums[0]).reshape(m, r).astype(dtype) * dtype.type(scale)
        thin = down.unchanged(sums[1]).reshape(r, n).astype(dtype)
        for factor in (wide, thin):
            factor.setflags(write=False)
        return wide, thin

    return LazyModule(module.name, (m, n), r, make, module.embedding, module.stored)


def _as_wide(dtype: np.dtype) -> np.dtype:
    """Type that a stored factor is worked with in: float64 stays, the rest is float32."""
    return np.dtype("float64") if dtype == np.float64 else np.dtype("float32")


def widest(dtypes: set[np.dtype]) -> np.dtype:
    """Return the one storage type, or float32 where half-precision types are mixed."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    half = {BFLOAT16, np.dtype("float16")}
    return np.dtype("float64") if np.dtype("float64") in dtypes - half else np.dtype("float32")
