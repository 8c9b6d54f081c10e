"""Directions that most slices have: the other end from which a shared part can start.

A Tucker-2 takes directions by their energy, so that it begins with large terms of single slices
and shares those. The mean projector

    (1/K) Σ_k U_k U_kᵀ ,   U_k the singular vectors of slice k,

does not see singular values: a direction that all slices have has the eigenvalue 1 in it, one that
a single slice has 1/K. What is shared between these directions leaves the large terms to the
private part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.slice_svd import SliceSvd
from lotrtensor.core.tucker2 import Tucker2

MOST = 0.5
"""Share of the slices that have to have a direction."""

SLICES = 2.5
"""Number of slices that have to, at the least: of two spaces every direction is in one of them."""


def common_spaces(svds: Sequence[SliceSvd]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return orthonormal bases U (m × p) and V (n × q) of the directions that most slices have.

    Parameters
    ----------
    svds : sequence of SliceSvd
        The slices.

    Returns
    -------
    pair of ndarray or None
        None where no direction is common on one of the sides.
    """
    left = _common([to_numpy(svd.left) for svd in svds])
    if not left.shape[1]:  # of most adapters: the other side need not be looked at
        return None
    right = _common([to_numpy(svd.right) for svd in svds])
    return (left, right) if right.shape[1] else None


def part_between(
    spaces: tuple[np.ndarray, np.ndarray],
    svds: Sequence[SliceSvd],
    private: Sequence[SliceSvd] = (),
) -> Tucker2:
    """Return U Uᵀ(ΔW_k − P_k)V Vᵀ, P_k being the ``private`` terms of slice k if there are any.

    Parameters
    ----------
    spaces : pair of ndarray (m, p), (n, q)
        Orthonormal U and V.
    svds, private : sequence of SliceSvd
        The slices ΔW_k, and what is not to be shared of them.

    Returns
    -------
    Tucker2
        With columns turned so that they come by falling energy.
    """
    left, right = spaces
    core = np.stack([_inside(left, svd, right) for svd in svds])
    if private:
        core -= np.stack([_inside(left, terms, right) for terms in private])
    turn = np.linalg.svd(np.hstack(list(core)), full_matrices=False)[0]
    other = np.linalg.svd(np.vstack(list(core)).T, full_matrices=False)[0]
    return Tucker2(left @ turn, turn.T @ core @ other, right @ other)


def _inside(left: np.ndarray, svd: SliceSvd, right: np.ndarray) -> np.ndarray:
    found: np.ndarray = (left.T @ to_numpy(svd.left) * svd.values) @ (
        right.T @ to_numpy(svd.right)
    ).T
    return found


def _common(bases: Sequence[np.ndarray]) -> np.ndarray:
    """Eigenvectors (m × p), of large eigenvalue, of the mean projector on spaces of these bases."""
    least = max(MOST, SLICES / len(bases))
    side = np.hstack(list(bases)) / math.sqrt(len(bases))
    if least >= 1.0:
        return side[:, :0]
    # Few vectors of many entries: the small Gram matrix has the same eigenvalues but for zeros.
    values, vectors = np.linalg.eigh(side.T @ side)
    kept = values > least
    found: np.ndarray = side @ (vectors[:, kept] / np.sqrt(values[kept]))
    return found
