"""Rounding with error feedback, under the metrics of several slices side by side.

Entry by entry, the entries that are still to come make good what those before lost: at entry i the
errors e of the entries before it are fixed, and x is rounded about the place that the least
(e, e')ᵀM(e, e') over the errors e' of all that follow gives to it (Frantar et al., "GPTQ", arXiv
2210.17323; Hassibi and Stork, "Optimal brain surgeon" (1992)). Where M = RᵀR + τ I the future
answers through d = rows of R numbers alone, so that a column of n entries costs n d, and the
preparation n d², whatever n is: with a = R e of the entries before, and K = τ I + Σ r rᵀ over the
columns of R that follow,

    min over e' of ‖a + R e'‖² + τ ‖e'‖²  =  τ aᵀ K⁻¹ a .
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lotrtensor.core.bits.grid import round_to_grid
from lotrtensor.core.bits.metric import Metric

BLOCK = 64
"""Entries that are rounded between two looks at all that follow."""


class _Block(NamedTuple):
    """Entries of one block, of K metrics: how they answer the errors of the blocks before."""

    start: int
    stop: int
    answer: np.ndarray
    """(K, b, d): takes a = R e of the entries before to where the block's errors should be."""
    spread: np.ndarray
    """(K, b, b): triangle U with UᵀU the inverse of the block's metric, the future at its best,
    each row over its pivot: what an error of one entry asks of those after it."""


class Feedback:
    """Rounding of columns of n entries under K metrics of that size.

    Parameters
    ----------
    metrics : sequence of Metric
        M_k = R_kᵀR_k + τ_k I. What is prepared is kept in the type of R.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics
        self._directions = max(len(metric.factor) for metric in metrics)
        self._blocks, pivots = [], []
        floors = np.array([metric.floor for metric in metrics])[:, None, None]
        after = floors * np.eye(self._directions)
        # From the last block on, so that what follows is summed and never subtracted.
        for start in reversed(range(0, metrics[0].size, BLOCK)):
            own = self._factors(start)
            solved = np.linalg.solve(after, own)
            inverse = np.linalg.inv(np.eye(own.shape[2]) + own.swapaxes(1, 2) @ solved)
            upper = np.linalg.cholesky((inverse + inverse.swapaxes(1, 2)) / 2).swapaxes(1, 2)
            pivot = np.diagonal(upper, axis1=1, axis2=2)
            pivots.append(floors[:, :, 0] / pivot**2)
            kept = metrics[0].factor.dtype
            answer = (-inverse @ solved.swapaxes(1, 2)).astype(kept)
            spread = (upper / pivot[:, :, None]).astype(kept)
            self._blocks.append(_Block(start, start + own.shape[2], answer, spread))
            after += own @ own.swapaxes(1, 2)
        self._blocks.reverse()
        self.gains: np.ndarray = np.mean(np.concatenate(pivots, axis=1), axis=1)
        """What a squared error of one entry costs after feedback: the mean of the pivots (K)."""

    def _factors(self, start: int) -> np.ndarray:
        """Columns of all R for one block (K × d × b), in float64."""
        stop = min(start + BLOCK, self._metrics[0].size)
        found = np.zeros((len(self._metrics), self._directions, stop - start))
        for k, metric in enumerate(self._metrics):
            found[k, : len(metric.factor)] = metric.factor[:, start:stop]
        return found

    def round(self, columns: Sequence[np.ndarray], step: float) -> list[np.ndarray]:
        """Return codes of the columns (n × c_k) of every slice on a grid (see `round_to_grid`).

        Each entry after those before it. Slices go side by side, those of fewer columns with
        columns of zeros, which stay zeros and are taken off again.
        """
        counts = [x.shape[1] for x in columns]
        if not any(counts):
            return list(columns)
        whole = np.zeros((len(columns), columns[0].shape[0], max(counts)))
        for k, x in enumerate(columns):
            whole[k, :, : counts[k]] = x / step
        codes = np.empty_like(whole)
        lost = np.zeros((len(columns), self._directions, max(counts)))
        for start, stop, answer, spread in self._blocks:
            target = whole[:, start:stop] + answer @ lost
            for i in range(stop - start):
                x = target[:, i]
                code = round_to_grid(x, 1.0)
                codes[:, start + i] = code
                error = (x - code)[:, None, :]
                target[:, i + 1 :] -= spread[:, i, i + 1 :, None] * error
            lost += self._factors(start) @ (codes[:, start:stop] - whole[:, start:stop])
        return [own[:, :count] for own, count in zip(codes, counts, strict=True)]
