"""Overlap of the leading singular subspaces of slices: how far they use the same directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.slice_svd import SliceSvd

LEADING = 0.9
"""Share of a slice's squared norm that its leading directions hold."""


class Subspaces(NamedTuple):
    """Orthonormal leading left (m × d) and right (n × d) singular vectors of one slice."""

    left: np.ndarray
    right: np.ndarray


def leading_subspaces(svd: SliceSvd, energy: float = LEADING) -> Subspaces:
    """Singular vectors of the fewest largest values that hold a share ``energy`` of ‖ΔW_k‖².

    They belong to the product B_k A_k: another gauge of the factors has the same. A zero slice
    has no direction, d = 0.
    """
    held = np.cumsum(svd.values**2)
    count = int(np.searchsorted(held, energy * held[-1])) + 1 if held[-1] > 0 else 0
    return Subspaces(to_numpy(svd.left[:, :count]), to_numpy(svd.right[:, :count]))


def overlaps(bases: Sequence[np.ndarray]) -> np.ndarray:
    """Mean squared cosine of the principal angles between every two subspaces.

    Parameters
    ----------
    bases : sequence of ndarray (m, d_k)
        Orthonormal columns.

    Returns
    -------
    ndarray (K, K)
        ‖Q_kᵀQ_l‖² / min(d_k, d_l): 1 where one space holds the other, 0 where they are orthogonal,
        about max(d_k, d_l) / m for unrelated ones; NaN where one is empty. All from one matrix
        product; see `subspace_overlap` for two.
    """
    counts = np.array([basis.shape[1] for basis in bases])
    stacked = np.concatenate(list(bases), axis=1)
    ends = np.cumsum(counts)
    squares = np.zeros((len(bases), int(ends[-1])))
    products = (stacked.T @ stacked) ** 2
    for k, (end, count) in enumerate(zip(ends, counts, strict=True)):
        squares[k] = products[end - count : end].sum(axis=0)
    sums = np.stack([squares[:, e - c : e].sum(axis=1) for e, c in zip(ends, counts, strict=True)])
    smaller = np.minimum(counts[:, None], counts[None, :]).astype(float)
    smaller[smaller == 0] = np.nan
    found: np.ndarray = np.minimum(sums / smaller, 1.0)
    return found


def chance(bases: Sequence[np.ndarray]) -> float:
    """Mean of `overlaps` between unrelated subspaces of these dimensions: max(d_k, d_l) / m.

    A random d-dimensional space holds d / m of any direction's energy on average. 0 for one space.
    """
    counts = np.array([basis.shape[1] for basis in bases])
    larger = np.maximum(counts[:, None], counts[None, :])[~np.eye(len(bases), dtype=bool)]
    return float(larger.mean()) / bases[0].shape[0] if larger.size else 0.0
