"""Differences, negatives and quotients, derived from sums and multiples."""

from __future__ import annotations

import math
from typing import Any, Self

from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.errors import DataError


class LinearOperators:
    """Operators that follow from ``a + b`` and ``a * number``."""

    __array_ufunc__ = None  # NumPy's scalars then leave multiplication from the left to us

    def __mul__(self, factor: float) -> Self:
        """Every slice times a number."""
        return self._times(_number(factor, "multiplied"))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        """Every slice over a number."""
        number = _number(divisor, "divided")
        if number == 0.0:
            raise DataError("slices are divided by 0; expected any other number")
        return self._times(1.0 / number)

    def __neg__(self) -> Self:
        """Every slice with the other sign."""
        return self._times(-1.0)

    def __sub__(self, other: Any) -> Any:
        """Slice-wise difference, kept like a sum."""
        return self + (other * -1.0 if isinstance(other, LinearOperators | SliceStack) else other)

    def __add__(self, other: Any) -> Any:
        """Slice-wise sum."""
        raise NotImplementedError

    def _times(self, factor: float) -> Self:
        raise NotImplementedError


def _number(value: object, done: str) -> float:
    """Return a real number, or an array without axes that holds one."""
    if not isinstance(value, str | bytes | complex) and getattr(value, "shape", ()) == ():
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise DataError(f"slices are {done} by {value!r}; expected a finite number")
