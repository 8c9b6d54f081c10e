"""The leading spaces of a stack, and where the energy of its slices lies between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.fit import tuning
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import exact_flops, reduce_stack
from lotrtensor.core.slice_svd import slice_spectra
from lotrtensor.core.stacks.low_rank import LowRankStack

MOST_CORES = 2**25
"""Entries that the cores of all slices between the spaces hold at most, 256 MiB: beyond, the spaces
are cut to fewer columns, from a matrix-free block iteration."""

SAMPLE = 48
"""Slices whose residuals stand for those of all when ranks are priced."""


def strata(count: int, most: int) -> list[int]:
    """Places of ``most`` of ``count`` things, one at random of each of as many equal parts.

    Not evenly spaced: things of two kinds that come in turn would be of one kind then.

    >>> strata(5, 9), len(strata(100, 10))
    ([0, 1, 2, 3, 4], 10)
    """
    if count <= most:
        return list(range(count))
    ends = [i * count // most for i in range(most + 1)]
    rng = np.random.default_rng(count)
    return [int(place) for place in rng.integers(ends[:-1], ends[1:])]


def widest_space(slices: int) -> int:
    """Columns of spaces between which the cores of this many slices hold `MOST_CORES`."""
    most = math.isqrt(MOST_CORES // slices)
    return max(1, min(4 * most // 5, most - tuning.OVERSAMPLE))  # the block is wider by that much


def is_cheap(stack: LowRankStack) -> bool:
    """Whether all columns of a stack take some seconds, and memory that is given to cores."""
    a, b = stack.max_rank
    return exact_flops(stack) <= CHEAP_FLOPS and a * b <= MOST_CORES // stack.shape[0]


CHEAP_FLOPS = 1e11
"""Estimated cost of all columns up to which they are not looked for a few at a time, three seconds.
96 slices of 1536 × 384 at rank 8 are 3e10; two such took 8 s from few columns, and 1 s at once."""


class Spaces:
    """Orthonormal U (m × a) and V (n × b) by falling energy, of the HOSVD of a stack.

    Parameters
    ----------
    stack : LowRankStack
        K slices.
    columns : (int, int)
        Columns wanted, about; all if most are.
    """

    def __init__(self, stack: LowRankStack, columns: tuple[int, int]) -> None:
        self.stack = stack
        (a, b), most = stack.max_rank, widest_space(stack.shape[0])
        few = 2 * columns[0] < a, 2 * columns[1] < b
        if all(few) or (any(few) and not is_cheap(stack)):
            columns = min(columns[0], a), min(columns[1], b)
            reduction = reduce_stack(stack, columns, kind="matrix-free")
        elif a * b <= MOST_CORES // stack.shape[0]:
            reduction = reduce_stack(stack, kind="exact")
        else:
            reduction = reduce_stack(stack, (most, most), kind="matrix-free")
        self.reduced = ReducedStack(stack, reduction)
        self._residuals: dict[tuple[int, int], list[np.ndarray]] = {}

    @property
    def exact(self) -> bool:
        """Whether nothing of the stack lies outside."""
        return self.reduced.exact

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """U and V."""
        left, right = self.reduced.directions(max(self.reduced.largest))
        return to_numpy(left), to_numpy(right)

    @cached_property
    def cores2(self) -> tuple[np.ndarray, np.ndarray]:
        """Σ_k G_k² and the mean of the cores G_k = Uᵀ ΔW_k V, entry by entry (a × b)."""
        left, right = self.factors
        whole = mean = np.zeros((left.shape[1], right.shape[1]))
        for b, a in map(self.pair, range(self.stack.shape[0])):
            core = (left.T @ b) @ (a @ right)
            whole, mean = whole + core**2, mean + core / self.stack.shape[0]
        return whole, mean

    @cached_property
    def ladder(self) -> list[tuple[int, int]]:
        """Pairs of ranks, each about twice the one before, whose two discarded energies agree."""
        whole, _ = self.cores2
        tails = [np.append(np.cumsum(whole.sum(axis=i)[::-1])[::-1], 0.0) for i in (1, 0)]
        pairs, rank = [], 1
        while rank < max(whole.shape):
            p = min(rank, whole.shape[0])
            q = int(np.argmax(tails[1] <= tails[0][p]))
            pairs.append((p, max(1, min(q, whole.shape[1]))))
            rank *= 2
        return sorted(set(pairs))

    def pair(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """B (m × r) and A (r × n) of a slice."""
        b, a = self.stack.factors(k)
        return to_numpy(b), to_numpy(a)

    def residual(self, ranks: tuple[int, int]) -> Sequence[np.ndarray]:
        """Singular values of ΔW_k − U Uᵀ ΔW_k V Vᵀ of a sample of the slices, U and V cut."""
        if ranks not in self._residuals:
            left, right = (x[:, :r] for x, r in zip(self.factors, ranks, strict=True))
            lefts, rights = [], []
            for b, a in map(self.pair, strata(self.stack.shape[0], SAMPLE)):
                inside = left @ (left.T @ b)
                lefts.append(np.hstack([b - inside, inside]))
                rights.append(np.vstack([a, a - (a @ right) @ right.T]))
            self._residuals[ranks] = slice_spectra(LowRankStack(lefts, rights))
        return self._residuals[ranks]
