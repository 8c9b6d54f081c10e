"""Codebooks of one width: the best 2ᵇ levels for a normal entry, and codes packed to b bits.

Each level is the mean of its cell, and each border half-way between two levels (Max, IRE Trans.
Inf. Theory 6 (1960); Lloyd, IEEE Trans. Inf. Theory 28 (1982)).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from lotrtensor.core.arrays import Array, namespace
from lotrtensor.errors import FormatError, RankError

WIDEST = 8
"""Bits of a code, at most."""


class Codebook(NamedTuple):
    """``levels`` (2ᵇ, rising) of a standard normal entry, and the squared error that they leave."""

    levels: np.ndarray
    distortion: float


@cache
def codebook(bits: int) -> Codebook:
    """Return the levels of ``bits`` bits.

    Parameters
    ----------
    bits : int
        1 to `WIDEST`.

    Raises
    ------
    RankError
        If ``bits`` is out of range.
    """
    if not isinstance(bits, int | np.integer) or not 1 <= bits <= WIDEST:
        raise RankError(f"bits is {bits!r}; expected an integer between 1 and {WIDEST}")
    count = 2**bits
    # Fine levels are as dense as the cube root of the density (Panter and Dite, Proc. IRE 39
    # (1951)), which for a normal one is a normal one √3 as wide.
    levels = math.sqrt(3.0) * ndtri((np.arange(count) + 0.5) / count)
    for _ in range(_ITERATIONS):
        borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        shares = np.diff(ndtr(borders))
        density = np.exp(-(borders**2) / 2) / math.sqrt(2 * math.pi)
        levels = -np.diff(density) / shares
    return Codebook(levels, 1.0 - float(np.sum(shares * levels**2)))


_ITERATIONS = 2000
"""Lloyd's iterations, slow for many levels: the distortion is then within 0.3 % of the least."""


def quantise(x: Array, bits: int) -> tuple[Array, float]:
    """Return codes and scale of a column: x ≈ scale · levels[codes].

    The scale starts at the root mean square and is refitted to the codes, which follow it, until
    both stand still.

    Parameters
    ----------
    x : array (m,)
        The column.
    bits : int
        1 to `WIDEST`.

    Returns
    -------
    codes : array (m,) of int
        Places in the codebook.
    scale : float
        0 for a column of zeros.
    """
    xp = namespace(x)
    levels = xp.asarray(codebook(bits).levels, dtype=x.dtype)
    borders = (levels[1:] + levels[:-1]) / 2
    scale = math.sqrt(float(xp.mean(x * x)))
    codes = xp.zeros(x.shape, dtype=xp.int64)
    if not scale:
        return codes, 0.0
    for _ in range(_FITS):
        codes = xp.searchsorted(borders, x / scale)
        found = xp.take(levels, codes)
        fitted = float(xp.sum(found * x)) / float(xp.sum(found * found))
        if abs(fitted - scale) <= 1e-6 * scale or fitted <= 0.0:
            break
        scale = fitted
    return codes, scale


_FITS = 10
"""Fits of a scale; three are enough but for a column of a few entries."""


def packed(codes: np.ndarray, bits: int) -> bytes:
    """Return codes of ``bits`` bits side by side, the first in the highest bits of a byte."""
    planes = codes.reshape(-1)[:, None].astype(np.int64) >> np.arange(bits)[::-1] & 1
    return np.packbits(planes.astype(np.uint8)).tobytes()


def unpacked(content: bytes, bits: int, count: int) -> np.ndarray:
    """Return ``count`` codes of ``bits`` bits: the inverse of `packed`.

    Raises
    ------
    FormatError
        If the content has another length.
    """
    expected = -(-count * bits // 8)
    if len(content) != expected:
        raise FormatError(
            f"{count} codes of {bits} bits are {len(content)} bytes; expected {expected}"
        )
    planes = np.unpackbits(np.frombuffer(content, np.uint8), count=count * bits)
    found: np.ndarray = planes.reshape(count, bits).astype(np.int64) @ (
        1 << np.arange(bits, dtype=np.int64)[::-1]
    )
    return found
