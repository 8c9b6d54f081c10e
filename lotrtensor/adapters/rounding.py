"""Rounding to a storage type, which must hold the numbers."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from lotrtensor.core.linalg import largest_entry
from lotrtensor.errors import DataError


def rounded(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return ``x`` in ``dtype``.

    Raises
    ------
    DataError
        If a finite number becomes infinite, float16 ends at 65504; or if they are so small that
        the largest is lost. The message names ``name``.
    """
    with np.errstate(over="ignore", under="ignore"):
        found = x.astype(dtype)
    wide = found.astype(np.float64)
    largest = float(np.max(np.abs(x), initial=0.0))
    if not np.isfinite(wide).all() or _lost(largest, dtype):
        wider = "float32" if dtype.itemsize < 4 else "float64"
        raise DataError(
            f"{name} has entries up to {largest:.3g}, which {dtype.name} does not hold; store it "
            f"as {wider}"
        )
    return found


def _lost(largest: float, dtype: np.dtype) -> bool:
    """Whether a type stores another number, by a quarter, for the largest of some."""
    with np.errstate(under="ignore"):
        return abs(float(np.float64(largest).astype(dtype)) - largest) > largest / 4


def exact_scale(largest: float, dtype: np.dtype) -> float:
    """Return a power of two by which numbers are divided so that a type holds them; mostly 1.

    Parameters
    ----------
    largest : float
        The largest of them, without its sign.
    dtype : dtype
        The type.

    Notes
    -----
    To divide by a power of two changes no digit. Numbers well inside the range keep 1.

    Examples
    --------
    >>> import numpy as np
    >>> exact_scale(3.0, np.dtype("float32")), exact_scale(3e5, np.dtype("float16"))
    (1.0, 262144.0)
    """
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    smallest, most = float(info.smallest_normal), float(info.max)
    if dtype.itemsize >= 4 or most > 1e30:  # what is multiplied with them has a range as well
        smallest, most = smallest * 1e8, most / 1e8
    if largest == 0.0 or smallest <= largest <= most:
        return 1.0
    return 2.0 ** math.floor(math.log2(largest))


def narrowed(b: np.ndarray, a: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return two matrices in float32, half the memory, where that is far finer than what is stored.

    Parameters
    ----------
    b, a : ndarray
        Factors or singular vectors, whose columns are of about one size.
    dtype : dtype
        What they will be stored in: to float32 and wider ones nothing is narrowed, and no matrix
        that is beyond 1e±30.
    """
    sizes = largest_entry(b), largest_entry(a)
    if dtype.itemsize > 2 or not all(1e-30 < size < 1e30 for size in sizes if size):
        return b, a
    return b.astype(np.float32), a.astype(np.float32)


def check_size(size: float, what: str) -> None:
    """Refuse an update whose squares no type holds.

    Parameters
    ----------
    size : float
        About its largest entry.
    what : str
        What it is, named in the message.

    Raises
    ------
    DataError
        Naming it.
    """
    if size and not 1e-140 < size < 1e140:
        raise DataError(
            f"{what} makes an update with entries of about {size:.3g}, whose squares no type "
            "holds; multiply or divide it by a number"
        )
