"""Balanced thin factors of a small matrix: the best B A of a given rank."""

from __future__ import annotations

import numpy as np


def balanced_factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return B (a × rank) and A (rank × b) whose product is the best of its rank.

    The singular values are shared evenly, B = P √Σ and A = √Σ Qᵀ, so that neither factor uses up
    the range or the digits of a half-precision type.

    Parameters
    ----------
    matrix : ndarray (a, b)
        Any real matrix; the sides are small.
    rank : int
        At most min(a, b).

    Returns
    -------
    B : ndarray (a, rank)
        In float64, as A.
    A : ndarray (rank, b)
        ‖matrix − B A‖ is the discarded energy √(Σ_{i>rank} σ_i²) (Eckart–Young).
    """
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]
