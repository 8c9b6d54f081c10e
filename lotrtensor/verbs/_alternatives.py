"""What other forms would reach at a size, as predicted: no file is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.compressed_group import Alternative
from lotrtensor.core.bits.stack import Parts, StackInBits
from lotrtensor.core.ranks.allocation import allocate_parameters
from lotrtensor.core.ranks.curve import efficient_pairs, outside2
from lotrtensor.core.ranks.terms import ranks_for_parameters, truncation_error
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.threads import one_by_one

Each = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
"""`lotrtensor.core.threads.side_by_side`, or one by one."""


class PriceInBits(NamedTuple):
    """Bytes of a whole file in bits, its relative error, and the step of its grid."""

    bytes: float
    relative_error: float
    step: float = 0.0


Prices = dict[Parts, list[PriceInBits]]
"""Sizes and errors of what a file may be made of, by rising size."""


def prices_in_bits(
    groups: Sequence[StackInBits],
    coarsest: float,
    overhead: int,
    largest: float,
    each: Each = one_by_one,
) -> Prices:
    """Sizes and errors on grids from the coarsest on, to ``largest`` bytes.

    Parameters
    ----------
    groups : sequence of StackInBits
        Groups that may be made of both parts.
    coarsest : float
        Step of the first grid.
    overhead : int
        Bytes of a file that holds no codes: config, index and headers.
    largest : float
        Bytes at which to stop.
    each : callable
        How the groups are gone through.

    Notes
    -----
    Normal columns are assumed; on trained adapters that is within 5 % of the errors that files
    have, from half of the bytes down to a 64th.
    """
    norm2 = sum(group.norm2 for group in groups)
    prices: Prices = {"both": [], "private": [], "shared": []}
    for step in grids(coarsest):
        predicted = each(partial(StackInBits.predictions, step=step), groups)
        for parts, found in prices.items():
            size = overhead + CODER * sum(prediction[parts].bits for prediction in predicted) / 8
            lost2 = sum(prediction[parts].lost2 for prediction in predicted)
            price = PriceInBits(size, SquaredError(lost2, norm2).relative, step)
            if not found or (size > found[-1].bytes and price[1] < found[-1].relative_error):
                found.append(price)
        if all(found[-1].bytes > largest for found in prices.values()):
            break
    return prices


def grids(coarsest: float) -> list[float]:
    """Steps from the coarsest on, falling."""
    return [coarsest * 2.0 ** (-i / GRIDS) for i in range(OCTAVES * GRIDS)]


CODER = 1.02
"""Bytes of codes over those of their entropy, as measured: see `lotrtensor.core.bits.stream`."""

GRIDS = 3
"""Grids an octave of steps; between them errors are interpolated."""

OCTAVES = 24
"""Octaves of steps that are looked through before the largest size is given up."""


def error_at(prices: Sequence[PriceInBits], size: float) -> float | None:
    """The error at a size, between those of the neighbouring grids; None below the smallest."""
    if size < prices[0].bytes:
        return None
    found = float(np.exp(np.interp(math.log(size), *_logarithms(prices))))
    return found if found > _LEAST else 0.0


def step_at(prices: Sequence[PriceInBits], size: float) -> float | None:
    """The step of a grid of that size; None below the smallest."""
    if size < prices[0].bytes:
        return None
    sizes, _, steps = np.array(prices).T
    return math.exp(float(np.interp(math.log(size), np.log(sizes), np.log(steps))))


def size_of(prices: Sequence[PriceInBits], error: float) -> float | None:
    """The smallest size of at most that error; None where none reaches it."""
    if error < prices[-1].relative_error:
        return None
    sizes, errors = _logarithms(prices)
    return math.exp(float(np.interp(math.log(max(error, _LEAST)), errors[::-1], sizes[::-1])))


_LEAST = 1e-12
"""Relative error that counts as none."""


def _logarithms(prices: Sequence[PriceInBits]) -> tuple[np.ndarray, np.ndarray]:
    """Of sizes and errors: between two grids the one is about a power of the other."""
    sizes, errors, _ = np.array(prices).T
    return np.log(sizes), np.log(np.maximum(errors, _LEAST))


def alternatives(
    groups: Sequence[StackInBits],
    slice_ranks: Sequence[Sequence[int]],
    itemsize: int,
    made: PriceInBits,
    prices: Prices,
) -> tuple[Alternative, ...]:
    """Errors of the pure forms at the size of what was made.

    Parameters
    ----------
    groups : sequence of StackInBits
        Groups that may be made of both parts.
    slice_ranks : sequence of sequence of int
        Ranks r_k of the slices of every group.
    itemsize : int
        Bytes of a number of the forms that are not in bits.
    made : PriceInBits
        Size and error of the file that was made.
    prices : dict
        See `prices_in_bits`. How much larger the file is than these say of its error is taken
        off the size of the others in bits, which have columns and a coder like it.
    """
    parameters, width = int(made.bytes) // itemsize, 8 * itemsize
    predicted = size_of(prices["both"], made.relative_error) or made.bytes
    return (
        Alternative("terms of single modules, in bits", error_at(prices["private"], predicted)),
        Alternative("shared factors, in bits", error_at(prices["shared"], predicted)),
        Alternative(f"truncated LoRA, {width} bit", _truncated(groups, parameters)),
        Alternative(f"LoTR, {width} bit", _lotr(groups, slice_ranks, parameters)),
    )


def _truncated(groups: Sequence[StackInBits], parameters: int) -> float | None:
    spectra = [values for group in groups for values in group.spectra]
    costs = [sum(group.sides) for group in groups for _ in group.spectra]
    if parameters < sum(costs):
        return None  # rank 1 for every module
    return truncation_error(spectra, ranks_for_parameters(spectra, costs, parameters))


def _lotr(
    groups: Sequence[StackInBits], slice_ranks: Sequence[Sequence[int]], parameters: int
) -> float | None:
    curves = [
        efficient_pairs(outside2(group.squares.sums2), group.norm2, group.stack.shape, ranks)
        for group, ranks in zip(groups, slice_ranks, strict=True)
    ]
    if parameters < sum(int(curve.parameters[0]) for curve in curves):
        return None
    chosen = allocate_parameters(curves, parameters)
    lost2 = sum(float(curve.error2[i]) for curve, i in zip(curves, chosen, strict=True))
    return SquaredError(lost2, sum(group.norm2 for group in groups)).relative
