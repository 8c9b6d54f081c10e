"""A metric on columns, and rounding with error feedback under it.

An error of an update costs what it changes of a model's outputs, not its norm. With M positive
definite the columns of a factor are compared by xᵀMx, and held as M = RᵀR + τ I of few rows R.

Rounding entry by entry, the entries that are still to come make good what those before lost: at
entry i the errors e of the entries before it are fixed, and x is rounded about the place that the
least (e, e')ᵀM(e, e') over the errors e' of all that follow gives to it (Frantar et al., "GPTQ",
arXiv 2210.17323; Hassibi and Stork, "Optimal brain surgeon" (1992)). Where M = RᵀR + τ I the
future answers through d = rows of R numbers alone, so that a column of n entries costs n d, and the
preparation n d², whatever n is: with a = R e of the entries before, and K = τ I + Σ r rᵀ over the
columns of R that follow,

    min over e' of ‖a + R e'‖² + τ ‖e'‖²  =  τ aᵀ K⁻¹ a .
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lotrtensor.core.bits.grid import round_to_grid

BLOCK = 64
"""Entries that are rounded between two looks at all that follow."""


class _Block(NamedTuple):
    """Entries of one block: their place, and how they answer the errors of the blocks before."""

    start: int
    stop: int
    answer: np.ndarray
    """(b, d): takes a = R e of the entries before to where the block's errors should be."""
    upper: np.ndarray
    """(b, b): triangle U with UᵀU the inverse of the block's metric, the future at its best."""


@dataclass(frozen=True, eq=False)
class Metric:
    """M = RᵀR + τ I on columns of n entries.

    Attributes
    ----------
    factor : ndarray (d, n)
        R.
    floor : float
        τ, positive.
    """

    factor: np.ndarray
    floor: float

    @property
    def size(self) -> int:
        """Entries n of a column."""
        return int(self.factor.shape[1])

    def times(self, x: np.ndarray) -> np.ndarray:
        """Return M x."""
        found: np.ndarray = self.factor.T @ (self.factor @ x) + self.floor * x
        return found

    def root(self, x: np.ndarray) -> np.ndarray:
        """Return a triangle T (c × c) with TᵀT = xᵀ M x, of ``x`` (n × c), c ≤ n + d."""
        both = np.vstack([self.factor @ x, np.sqrt(self.floor) * x])
        return np.linalg.qr(both).R

    @property
    def gain(self) -> float:
        """What a squared error of one entry costs after feedback: the mean of the pivots of M."""
        return float(np.mean(self._pivots))

    @cached_property
    def _pivots(self) -> np.ndarray:
        uppers = [np.diag(block.upper) for block in self._blocks]
        found: np.ndarray = self.floor / np.concatenate(uppers) ** 2
        return found

    @cached_property
    def _blocks(self) -> list[_Block]:
        from scipy.linalg import cho_factor, cho_solve, cholesky

        d, n = self.factor.shape
        after = self.floor * np.eye(d)
        found = []
        # From the last block on, so that what follows is summed and never subtracted.
        for start in reversed(range(0, n, BLOCK)):
            stop = min(start + BLOCK, n)
            own = self.factor[:, start:stop]
            solved = cho_solve(cho_factor(after), own)
            metric = np.eye(stop - start) + own.T @ solved
            inverse = np.linalg.inv(metric)
            upper = cholesky((inverse + inverse.T) / 2)
            found.append(_Block(start, stop, -inverse @ solved.T, upper))
            after += own @ own.T
        return found[::-1]

    def round(self, x: np.ndarray, step: float) -> np.ndarray:
        """Return codes (n × c) of columns ``x`` on a grid, each entry after those before it."""
        codes = np.empty_like(x)
        lost = np.zeros((self.factor.shape[0], x.shape[1]))
        for start, stop, answer, upper in self._blocks:
            target = x[start:stop] + answer @ lost
            for i in range(stop - start):
                codes[start + i] = round_to_grid(target[i], step)
                error = (target[i] - step * codes[start + i]) / upper[i, i]
                target[i + 1 :] -= np.outer(upper[i, i + 1 :], error)
            lost += self.factor[:, start:stop] @ (step * codes[start:stop] - x[start:stop])
        return codes
