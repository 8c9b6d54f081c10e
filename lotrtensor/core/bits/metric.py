"""A metric on columns: a matrix of few directions and a multiple of the identity.

An error of an update costs what it changes of a model's outputs, not its norm. With M positive
definite the columns of a factor are compared by xᵀMx, and held as M = RᵀR + τ I of few rows R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
        wide = self.factor.astype(np.float64)
        found: np.ndarray = wide.T @ (wide @ x) + self.floor * x
        return found

    def root(self, x: np.ndarray) -> np.ndarray:
        """Return a triangle T (c × c) with TᵀT = xᵀ M x, of ``x`` (n × c), c ≤ n + d."""
        both = np.vstack([self.factor.astype(np.float64) @ x, np.sqrt(self.floor) * x])
        return np.linalg.qr(both).R
