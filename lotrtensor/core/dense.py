"""Stacks whose slices are whole matrices: an array, or slices produced on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_api_compat import size

from lotrtensor.core.linalg import (
    Array,
    as_accumulator,
    as_working,
    check_finite,
    check_real_floating,
    constant,
    namespace,
    norm2,
)
from lotrtensor.core.stacks import SliceStack, Sweep
from lotrtensor.errors import ShapeError


class LazyStack:
    """K slices ΔW_k that are produced one at a time, so that memory holds one.

    Parameters
    ----------
    read : callable
        ``read(k)`` returns slice k (m × n), k = 0 … K − 1: a file reader, a difference of two
        checkpoints. It is called once a slice in every pass, in order.
    shape : (int, int, int)
        (K, m, n).
    like : array, optional
        Any array of the library, device and type that ``read`` returns; NumPy's float32 if not
        given.

    Raises
    ------
    ShapeError
        If ``shape`` is empty, or when a slice that is read has another shape.
    DataError
        When a slice that is read is not real floating point, or not finite.

    Notes
    -----
    Every method below is one pass over the slices.
    """

    def __init__(
        self,
        read: Callable[[int], Array],
        shape: tuple[int, int, int],
        *,
        like: Array | None = None,
    ) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ShapeError(f"shape is {shape}; expected (K, m, n), each at least 1")
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        sample = np.empty(0, dtype=np.float32) if like is None else like
        check_real_floating(sample, "like")
        self._read = read
        self._empty = as_working(sample[:0])
        self.dtype: Any = sample.dtype

    @property
    def max_rank(self) -> tuple[int, int]:
        """Largest left and right rank (p, q) that can be needed: (min(m, K n), min(n, K m))."""
        slices, m, n = self.shape
        return min(m, slices * n), min(n, slices * m)

    def empty(self) -> Array:
        """An array of no entries: library, device and working type of the products."""
        return self._empty

    def slice(self, k: int) -> Array:
        """Read slice ``k`` (m × n), in float32 at the least."""
        found = self._read(k)
        if tuple(found.shape) != self.shape[1:]:
            raise ShapeError(
                f"slice {k} is {tuple(found.shape)}; expected (m, n) = {self.shape[1:]}"
            )
        check_real_floating(found, f"slice {k}")
        found = as_working(found)
        check_finite(found, f"slice {k}")
        return found

    def scaled(self, weights: Sequence[float]) -> LazyStack:
        """Return the stack of w_k ΔW_k, still read on demand."""
        weights = [float(w) for w in weights]
        return LazyStack(lambda k: self.slice(k) * weights[k], self.shape, like=self._empty)

    def reduce(self) -> tuple[None, DenseStack, None]:
        """Return the slices in float64; the problem is as small as it gets."""
        return None, DenseStack(as_accumulator(self.to_dense())), None

    def sweep(self, left: Array, right: Array) -> Sweep:
        """The products of one pass: about 4 K m n b flops."""
        xp = namespace(left, right)
        sum_left, sum_right = xp.zeros_like(left), xp.zeros_like(right)
        cores, norms2 = [], []
        for k in range(self.shape[0]):
            found = self.slice(k)
            image = found @ right
            core = left.T @ image
            sum_left = sum_left + image @ core.T
            sum_right = sum_right + (found.T @ left) @ core
            cores.append(core)
            norms2.append(norm2(found))
        return Sweep(sum_left, sum_right, xp.stack(cores), xp.stack(norms2))

    def project(self, left: Array, right: Array) -> tuple[Array, Array]:
        """`core` and `residual_norms2` in one pass."""
        xp = namespace(left, right)
        cores, residuals = [], []
        for k in range(self.shape[0]):
            found = self.slice(k)
            core = left.T @ (found @ right)
            cores.append(core)
            residuals.append(norm2(found - (left @ core) @ right.T))
        return xp.stack(cores), xp.stack(residuals)

    def magnitude(self) -> float:
        """1: it would take a pass to know."""
        return 1.0

    def norms2(self) -> Array:
        """Squared Frobenius norms ‖ΔW_k‖², one a slice (K)."""
        xp = namespace(self._empty)
        return xp.stack([norm2(self.slice(k)) for k in range(self.shape[0])])

    def left_factor(self, right: Array | None = None) -> Array:
        """Return [ΔW_1 V … ΔW_K V] (m × Kq); V is the identity if not given."""
        slices = (self.slice(k) for k in range(self.shape[0]))
        xp = namespace(self._empty)
        return xp.concat([x if right is None else x @ right for x in slices], axis=1)

    def right_factor(self, left: Array | None = None) -> Array:
        """Return [ΔW_1ᵀ U … ΔW_Kᵀ U] (n × Kp); U is the identity if not given."""
        slices = (self.slice(k).T for k in range(self.shape[0]))
        xp = namespace(self._empty)
        return xp.concat([x if left is None else x @ left for x in slices], axis=1)

    def core(self, left: Array, right: Array) -> Array:
        """Cores Uᵀ ΔW_k V (K × p × q)."""
        xp = namespace(left, right)
        return xp.stack([left.T @ (self.slice(k) @ right) for k in range(self.shape[0])])

    def residual_norms2(self, left: Array, right: Array) -> Array:
        """Squared norms ‖ΔW_k − U Uᵀ ΔW_k V Vᵀ‖², from the residual itself, one a slice (K)."""
        return self.project(left, right)[1]

    def to_dense(self) -> Array:
        """The slices as one array (K × m × n)."""
        return namespace(self._empty).stack([self.slice(k) for k in range(self.shape[0])])

    def __add__(self, other: SliceStack) -> LazyStack:
        """Slice-wise sum, formed slice by slice."""
        if self.shape != other.shape:
            raise ShapeError(
                f"stacks of shapes (K, m, n) = {self.shape} and {other.shape} have no sum"
            )
        return LazyStack(lambda k: self.slice(k) + other.slice(k), self.shape, like=self._empty)

    def __sub__(self, other: SliceStack) -> LazyStack:
        """Slice-wise difference, formed slice by slice."""
        if self.shape != other.shape:
            raise ShapeError(
                f"stacks of shapes (K, m, n) = {self.shape} and {other.shape} have no difference"
            )
        return LazyStack(lambda k: self.slice(k) - other.slice(k), self.shape, like=self._empty)

    def __mul__(self, factor: float) -> LazyStack:
        """Every slice times a number."""
        return self.scaled([factor] * self.shape[0])

    __rmul__ = __mul__


class DenseStack(LazyStack):
    """Slices held as one array, which is never written to.

    Parameters
    ----------
    slices : array (K, m, n)
        Slice k is ``slices[k]``.

    Raises
    ------
    ShapeError
        If the array is empty or not three-dimensional.
    DataError
        If it is not real floating point, or not finite.
    """

    def __init__(self, slices: Array) -> None:
        namespace(slices)
        slices = constant(slices)
        if slices.ndim != 3 or size(slices) == 0:
            raise ShapeError(
                f"slices has shape {tuple(slices.shape)}; expected (K, m, n), not empty"
            )
        check_real_floating(slices, "slices")
        super().__init__(lambda k: slices[k, :, :], tuple(slices.shape), like=slices[0, 0, :])
        for k in range(self.shape[0]):
            check_finite(as_working(slices[k, :, :]), f"slice {k}")
        self._slices = slices

    def scaled(self, weights: Sequence[float]) -> DenseStack:
        """Return the stack of w_k ΔW_k, in memory like this one."""
        xp = namespace(self._slices)
        slices = (self.slice(k) * float(w) for k, w in enumerate(weights))
        made = DenseStack(xp.stack(list(slices)))
        made.dtype = self.dtype
        return made

    def magnitude(self) -> float:
        """Largest entry."""
        xp = namespace(self._slices)
        return float(xp.max(xp.abs(as_working(self._slices))))

    def slice(self, k: int) -> Array:
        """Return slice ``k`` (m × n), in float32 at the least."""
        return as_working(self._slices[k, :, :])
