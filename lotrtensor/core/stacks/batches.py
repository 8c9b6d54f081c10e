"""Runs of neighbouring slices of equal rank, whose products are one batched call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from lotrtensor.core.arrays import Array, namespace

ENTRIES = 2**21
"""Entries of the factors that one batch holds at most: work space stays small beside the whole."""


class Batch(NamedTuple):
    """``slices`` neighbours of rank ``rank``, whose factors are side by side in ``span``."""

    span: slice
    slices: int
    rank: int

    def columns(self, x: Array) -> Array:
        """Return the blocks (slices × a × rank) of ``x`` (a × ρ)."""
        xp = namespace(x)
        blocks = xp.reshape(x[:, self.span], (x.shape[0], self.slices, self.rank))
        return xp.permute_dims(blocks, (1, 0, 2))

    def rows(self, x: Array) -> Array:
        """Return the blocks (slices × rank × b) of ``x`` (ρ × b)."""
        return namespace(x).reshape(x[self.span, :], (self.slices, self.rank, x.shape[1]))


def batches(ranks: Sequence[int], column: int) -> list[Batch]:
    """Return the batches of slices of these ranks; a column of their factors has m + n numbers."""
    found, start = [], 0
    for rank, run in groupby(ranks):
        slices = len(list(run))
        most = max(1, ENTRIES // (rank * column))
        for first in range(0, slices, most):
            count = min(most, slices - first)
            found.append(Batch(slice(start, start + count * rank), count, rank))
            start += count * rank
    return found


def side_by_side(blocks: Array) -> Array:
    """Return blocks (count × a × c) as one matrix (a × count c)."""
    count, a, c = blocks.shape
    xp = namespace(blocks)
    return xp.reshape(xp.permute_dims(blocks, (1, 0, 2)), (a, count * c))


def one_below_another(blocks: Array) -> Array:
    """Return blocks (count × a × c) as one matrix (count a × c)."""
    count, a, c = blocks.shape
    return namespace(blocks).reshape(blocks, (count * a, c))
