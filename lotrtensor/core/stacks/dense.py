"""Stacks whose slices are whole matrices: an array, or slices produced on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_api_compat import is_array_api_obj, size

from lotrtensor.core.arrays import (
    Array,
    as_accumulator,
    as_working,
    check_finite,
    check_plain,
    check_real_floating,
    constant,
    namespace,
)
from lotrtensor.core.linalg import largest_entry, norm2, squares_hold
from lotrtensor.core.options import check_integer, shown
from lotrtensor.core.stacks.algebra import LinearOperators
from lotrtensor.core.stacks.protocol import (
    SliceStack,
    Sweep,
    check_one_shape,
    check_stack,
    check_weights,
)
from lotrtensor.errors import DataError, ShapeError


class LazyStack(LinearOperators):
    """K slices ΔW_k that are produced one at a time, so that only one is in memory.

    Parameters
    ----------
    read : callable
        ``read(k)`` returns slice k (m × n), k = 0 … K − 1: a file reader, a difference of two
        checkpoints. It is called once per slice in every pass, in order.
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
    Every method below is one pass over the slices, except the norms: the first pass of any other
    method computes them as well.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> stack = lt.LazyStack(lambda k: np.full((4, 5), k + 1.0), (3, 4, 5))
    >>> lt.norm(stack) ** 2  # 20 (1 + 4 + 9)
    280.0
    """

    def __init__(
        self,
        read: Callable[[int], Array],
        shape: tuple[int, int, int],
        *,
        like: Array | None = None,
    ) -> None:
        try:
            slices, m, n = (check_integer(side, "a side of the shape", 1) for side in shape)
        except (TypeError, ValueError) as error:
            raise ShapeError(
                f"shape is {shown(shape)}; expected (K, m, n), each at least 1"
            ) from error
        self.shape = (slices, m, n)
        sample = np.empty(0, dtype=np.float32) if like is None else like
        check_real_floating(sample, "like")
        self._read = read
        self._empty = as_working(sample[:0])
        self._norms2: dict[int, Array] = {}
        self.dtype: Any = sample.dtype
        self.lazy = True

    @property
    def max_rank(self) -> tuple[int, int]:
        """Largest left and right rank (p, q) that can be needed: (min(m, K n), min(n, K m))."""
        slices, m, n = self.shape
        return min(m, slices * n), min(n, slices * m)

    def empty(self) -> Array:
        """An array of no entries: library, device and working type of the products."""
        return self._empty

    def slice(self, k: int) -> Array:
        """Read slice ``k`` (m × n), in the working type of ``like``."""
        found = constant(self._read(k))
        if not is_array_api_obj(found) or namespace(found) is not namespace(self._empty):
            raise DataError(
                f"slice {k} is a {type(found).__module__}.{type(found).__name__}; expected an "
                f"array like ``like``, a {type(self._empty).__module__} one"
            )
        if tuple(found.shape) != self.shape[1:]:
            raise ShapeError(
                f"slice {k} is {tuple(found.shape)}; expected (m, n) = {self.shape[1:]}"
            )
        check_real_floating(found, f"slice {k}")
        with np.errstate(over="ignore"):  # what overflows is refused below, by number
            found = namespace(found).astype(found, self._empty.dtype, copy=False)
        if k not in self._norms2:
            # The first reading takes the norm, which tells at once whether all entries are finite.
            with np.errstate(over="ignore"):
                self._norms2[k] = norm2(found)
            if not self._norms2[k] or not squares_hold(math.sqrt(self._norms2[k]), found):
                check_finite(found, f"slice {k}")
                self._check_magnitude(found, k)
        return found

    def _check_magnitude(self, found: Array, k: int) -> None:
        """Refuse a slice whose squares overflow, or are all zero though it is not."""
        size = largest_entry(found)
        if self.lazy and (size > 1.0 or not self._norms2[k]) and not squares_hold(size, found):
            raise DataError(
                f"slice {k} has entries up to {size:.3g}, whose squares {found.dtype} does not "
                "hold; divide the slices by that, or read them in float64"
            )

    def scaled(self, weights: Sequence[float]) -> LazyStack:
        """Return the stack of w_k ΔW_k, formed slice by slice."""
        weights = check_weights(weights, self.shape[0])
        return self._formed(lambda k: self.slice(k) * weights[k])

    def _formed(self, read: Callable[[int], Array], *others: SliceStack) -> LazyStack:
        """A stack formed from this one and others when it is read; lazy if one of them is."""
        empties = [self._empty, *(other.empty() for other in others)]
        xp = namespace(*empties)
        working = xp.result_type(*(x.dtype for x in empties))
        made = LazyStack(read, self.shape, like=xp.astype(self._empty, working))
        made.lazy = self.lazy or any(other.lazy for other in others)
        if not others:
            made.dtype = self.dtype
        return made

    def reduce(self) -> tuple[None, DenseStack, None]:
        """Return the slices in float64; the problem is as small as it gets."""
        return None, DenseStack(as_accumulator(self.to_dense())), None

    def sweep(self, left: Array, right: Array) -> Sweep:
        """The products of one pass: about 4 K m n b flops."""

        def products(k: int) -> tuple[Array, Array, Array]:
            found = self.slice(k)
            image = found @ right
            core = left.T @ image
            return image @ core.T, (found.T @ left) @ core, core

        xp = namespace(left, right)
        sum_left, sum_right = xp.zeros_like(left), xp.zeros_like(right)
        cores = []
        for k in range(self.shape[0]):
            # In a function of its own, so that the slice is freed before the next one is read.
            step_left, step_right, core = products(k)
            sum_left, sum_right = sum_left + step_left, sum_right + step_right
            cores.append(core)
        return Sweep(sum_left, sum_right, xp.stack(cores), self.norms2())

    def project(self, left: Array, right: Array) -> tuple[Array, Array]:
        """`core` and `residual_norms2` in one pass."""

        def products(k: int) -> tuple[Array, Array]:
            found = self.slice(k)
            core = left.T @ (found @ right)
            return core, norm2(found - (left @ core) @ right.T)

        xp = namespace(left, right)
        cores, residuals = zip(*map(products, range(self.shape[0])), strict=True)
        return xp.stack(cores), xp.stack(residuals)

    def magnitude(self) -> float:
        """1: it would take a pass to know."""
        return 1.0

    def norms2(self) -> Array:
        """Squared Frobenius norms ‖ΔW_k‖², one per slice (K); a pass if any is unread."""
        slices = range(self.shape[0])
        for k in slices:
            if k not in self._norms2:
                self.slice(k)
        return namespace(self._empty).stack([self._norms2[k] for k in slices])

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
        """Squared norms ‖ΔW_k − U Uᵀ ΔW_k V Vᵀ‖², from the residual itself, one per slice (K)."""
        return self.project(left, right)[1]

    def to_dense(self) -> Array:
        """The slices as one array (K × m × n)."""
        return namespace(self._empty).stack([self.slice(k) for k in range(self.shape[0])])

    def __add__(self, other: SliceStack) -> LazyStack:
        """Slice-wise sum, formed slice by slice."""
        check_stack(other)
        check_one_shape(self, other)
        return self._formed(lambda k: self.slice(k) + other.slice(k), other)

    __radd__ = __add__

    def _times(self, factor: float) -> LazyStack:
        return self.scaled([factor] * self.shape[0])


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

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> stack = lt.DenseStack(np.ones((3, 4, 5)))
    >>> stack.shape, lt.tucker2(stack, rank=1).tucker2.parameters
    ((3, 4, 5), 12)
    """

    def __init__(self, slices: Array) -> None:
        check_plain(slices, "slices")
        slices = constant(slices)
        if slices.ndim != 3 or size(slices) == 0:
            raise ShapeError(
                f"slices has shape {tuple(slices.shape)}; expected (K, m, n), not empty"
            )
        check_real_floating(slices, "slices")
        if not squares_hold(largest_entry(as_working(slices)), as_working(slices[0, 0, :])):
            slices = as_accumulator(slices)  # in float32 the squares would leave the range
        super().__init__(lambda k: slices[k, :, :], tuple(slices.shape), like=slices[0, 0, :])
        self.lazy = False
        self._slices = slices
        self.norms2()  # which refuses what is not finite

    def magnitude(self) -> float:
        """Largest entry."""
        return largest_entry(as_working(self._slices))
