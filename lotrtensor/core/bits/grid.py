"""A grid of one step: rounding to it, and what a normal column then costs and loses.

A column x becomes codes c = sign(x) ⌊|x| / Δ + ρ⌋ on a grid of step Δ. With ρ below ½ the zero is
wider than the other cells, which costs little accuracy and saves bits where few codes are not zero.
Codes are stored by their entropy (`lotrtensor.core.bits.stream`), so that no width is chosen: at
one step for all columns, those of more energy take more bits by themselves. That is reverse
water-filling (Cover and Thomas, "Elements of Information Theory" (2006), theorem 10.3.3), at the
quarter of a bit that such a grid costs over the optimum (Gish and Pierce, IEEE Trans. Inf.
Theory 14 (1968)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from lotrtensor.core.arrays import Array, namespace
from lotrtensor.core.options import shown
from lotrtensor.errors import RankError

ROUNDING = 0.45
"""ρ above. Of 0.33, 0.4, 0.45 and 0.5 the one of the least error at an eighth of the bytes of the
bundled adapter; the others lose up to 1 % more."""


def round_to_grid(x: Array, step: float) -> Array:
    """Return the codes sign(x) ⌊|x| / step + ρ⌋, integers in the type of ``x``.

    Parameters
    ----------
    x : array
        Any real array.
    step : float
        Δ, positive.

    Returns
    -------
    array
        Codes: x ≈ step · codes.
    """
    xp = namespace(x)
    return xp.sign(x) * xp.floor(xp.abs(x) / step + ROUNDING)


def round_to_width(x: Array, bits: int) -> Array:
    """Return codes of one width, on a grid of its own for each column.

    Parameters
    ----------
    x : array (m, c)
        Columns.
    bits : int
        Width b, 1 to `WIDEST`. To `NORMAL` bits, of some steps between the one that loses least of
        a normal column and the one that reaches to the largest entry, each column has the one that
        loses least of it; above, the latter.

    Returns
    -------
    array (m, c)
        Codes in the type of ``x``: the 2ᵇ odd integers from 1 − 2ᵇ to 2ᵇ − 1, or, above `NORMAL`
        bits, the integers from 1 − 2ᵇ⁻¹ to 2ᵇ⁻¹ − 1.
    """
    xp = namespace(x)
    largest = xp.max(xp.abs(x), axis=0)
    one = xp.ones_like(largest)
    if bits > NORMAL:
        scale = largest / (2.0 ** (bits - 1) - 1.0)
        return xp.round(x / xp.where(scale > 0, scale, one))
    most = float(2 ** (bits - 1))
    least = xp.where(largest > 0, xp.sqrt(xp.mean(x * x, axis=0)) * _even_step(bits), one)
    ratio = xp.where(largest > 0, largest / (most * least), one)
    found, kept2 = x, -one
    for share in _SHARES:
        codes = 2 * xp.clip(xp.floor(x / (least * ratio**share)), -most, most - 1) + 1
        # What a column keeps of its square at the best scale of its codes, in steps of its own.
        inner = xp.sum(codes * (x / least), axis=0)
        now2 = inner * inner / xp.sum(codes * codes, axis=0)
        found, kept2 = xp.where(now2 > kept2, codes, found), xp.maximum(now2, kept2)
    return found


_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Powers of the ratio of both steps at which a column is tried: cores, of which few entries hold
the most, lose up to ten times less between the two than at the normal one."""

NORMAL = 7
"""Bits to which columns of one width are rounded as normal ones, to odd integers: more of these are
beyond the seven bits that stand together in a stream (`lotrtensor.core.bits.stream`)."""

WIDEST = 16
"""Bits of a code of one width, at most: codes are 16-bit integers."""


def check_width(bits: object) -> int:
    """Return a width in bits.

    Raises
    ------
    RankError
        If it is no integer between 1 and `WIDEST`.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= WIDEST:
        raise RankError(f"bits is {shown(bits)}; expected an integer from 1 to {WIDEST}")
    return int(bits)


class Cost(NamedTuple):
    """What normal entries cost on a grid: ``bits`` an entry, and ``distortion``.

    The distortion is the squared error over the variance, after the codes' best scale.
    """

    bits: np.ndarray
    distortion: np.ndarray


def column_cost(deviation: np.ndarray, width: int | None) -> Cost:
    """Return `grid_cost`, or what columns of one ``width`` cost and lose at any deviation."""
    if width is None:
        return grid_cost(deviation)
    if width > NORMAL:
        # The largest of some thousand normal entries is about 4 standard deviations.
        step = 4.0 / (2.0 ** (width - 1) - 1.0)
        bits, distortion = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(step), step**2 / 12
    else:
        bits, distortion = _even_cost(width, _even_step(width))
    return Cost(np.full(np.shape(deviation), bits), np.full(np.shape(deviation), distortion))


def grid_cost(deviation: np.ndarray) -> Cost:
    """Return what normal columns cost and lose, by their standard deviations in steps.

    Parameters
    ----------
    deviation : ndarray
        Standard deviation over step, σ / Δ, of every column.

    Returns
    -------
    Cost
        Entropy of a code, and 1 − E[x c]² / E[c²]: 0 bits and 1 where every code is zero.
    """
    deviations, bits, distortions = _table()
    with np.errstate(divide="ignore"):
        place = np.log2(np.asarray(deviation, dtype=np.float64))
    (found, logarithm) = interpolated(place, (bits, distortions))
    # Far above a step, the entropy of the density less that of a cell, and Δ² / 12.
    fine = place > deviations[-1]
    found = np.where(fine, place + 0.5 * math.log2(2 * math.pi * math.e), found)
    distortion = np.exp(logarithm)
    with np.errstate(over="ignore"):
        distortion = np.where(fine, 2.0 ** (-2.0 * place) / 12, distortion)
    coarse = place < deviations[0]
    return Cost(np.where(coarse, 0.0, found), np.where(coarse, 1.0, distortion))


@cache
def _even_step(bits: int) -> float:
    """The step, in standard deviations, at which 2ᵇ even levels lose least of a normal column.

    Max, IRE Trans. Inf. Theory 6 (1960), table II.
    """
    from scipy.optimize import minimize_scalar  # half a second, for one width that few ask for

    found = minimize_scalar(
        lambda step: _even_cost(bits, step)[1], bounds=(1e-3, 3.0), method="bounded"
    )
    return float(found.x)


def _even_cost(bits: int, step: float) -> tuple[float, float]:
    """Entropy and distortion of 2ᵇ levels at odd multiples of half a step."""
    from scipy.special import ndtr

    borders = step * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1) + 1.0)
    levels = (borders[1:] + borders[:-1]) / 2
    borders[0], borders[-1] = -np.inf, np.inf
    shares = np.diff(ndtr(borders))
    moments = -np.diff(np.exp(-(borders**2) / 2)) / math.sqrt(2 * math.pi)
    product, square = float(moments @ levels), float(shares @ levels**2)
    some = shares[shares > 0]
    return -float(np.sum(some * np.log2(some))), 1 - product**2 / square


def interpolated(place: np.ndarray, columns: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``numpy.interp`` at ``place`` of columns over the places of the table, to the last bit.

    They are `PLACES` a unit, so that the neighbours of an entry are known without a search.
    """
    last = len(columns[0]) - 1
    scaled = np.clip(place, FIRST_PLACE, FIRST_PLACE + last / PLACES) * PLACES  # exact
    index = scaled.astype(np.int64, copy=False)
    index -= index > scaled  # towards zero is up, where it is negative
    index -= FIRST_PLACE * PLACES
    np.minimum(index, last - 1, out=index)
    offset = (scaled - (index + FIRST_PLACE * PLACES)) / PLACES
    beyond = place >= FIRST_PLACE + last / PLACES
    found = []
    for column in columns:
        slopes = np.diff(column) * PLACES
        inside = slopes[index] * offset + column[index]
        found.append(np.where(beyond, column[-1], inside))
    return found


FIRST_PLACE, PLACES = -4, 8
"""Logarithm of the least deviation in the table, and how many there are to a factor of two."""


@cache
def _table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log₂ of deviations from 1/16 to 256 steps, bits, and logarithms of the distortion."""
    deviations = np.arange(FIRST_PLACE, 8.01, 1 / PLACES)
    rows = [_normal(2.0**deviation) for deviation in deviations]
    return deviations, np.array([row[0] for row in rows]), np.log([row[1] for row in rows])


def _normal(deviation: float) -> tuple[float, float]:
    """Entropy and distortion of a standard normal of ``deviation`` steps, summed code by code."""
    codes = np.arange(1, math.ceil(9 * deviation) + 3)
    lower, upper = (codes - ROUNDING) / deviation, (codes + 1 - ROUNDING) / deviation
    # Not scipy.special: importing it takes longer than compressing most adapters.
    above = np.array([math.erfc(border / math.sqrt(2)) / 2 for border in (*lower, upper[-1])])
    shares = above[:-1] - above[1:]
    first_moments = (np.exp(-(lower**2) / 2) - np.exp(-(upper**2) / 2)) / math.sqrt(2 * math.pi)
    both = np.append(np.repeat(shares[shares > 0], 2), 1 - 2 * shares.sum())
    bits = -float(np.sum(both * np.log2(both)))
    product, square = 2 * float(first_moments @ codes), 2 * float(shares @ codes**2)
    return bits, 1 - product**2 / square
