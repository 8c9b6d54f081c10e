"""Size against error of one group: the rank pairs that no other pair beats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lotrtensor.core.ranks.pareto import undominated
from lotrtensor.core.squared_error import relative_errors
from lotrtensor.errors import RankError


class Frontier(NamedTuple):
    """Rank pairs that no other pair beats in both size and error, by rising parameters.

    ``ranks`` (F × 2), ``parameters`` (F, rising) and ``error2`` (F, falling): the squared error
    that truncation of the HOSVD reaches there. ``norm2`` is the squared norm of the stack.
    """

    ranks: np.ndarray
    parameters: np.ndarray
    error2: np.ndarray
    norm2: float


def tucker2_parameters(
    shape: tuple[int, int, int],
    p: np.ndarray | int,
    q: np.ndarray | int,
    slice_ranks: Sequence[int] | None = None,
) -> np.ndarray:
    """Stored numbers of a Tucker-2 of ranks (p, q): m p + n q + K p q.

    Where slices of ranks r_k are known, a core may be kept as a product, so that it costs
    min(p q, r_k (p + q)).
    """
    slices, m, n = shape
    dense = np.multiply(p, q)
    if slice_ranks is not None and len(slice_ranks) != slices:
        raise RankError(f"found {len(slice_ranks)} slice_ranks; expected {slices}, one per slice")
    if slice_ranks is None:
        cores = slices * dense
    else:
        cores = np.zeros_like(dense)
        for r, count in Counter(slice_ranks).items():
            cores = cores + count * np.minimum(dense, r * np.add(p, q))
    return np.asarray(np.multiply(m, p) + np.multiply(n, q) + cores)


def outside2(core2: np.ndarray) -> np.ndarray:
    """Squared error of keeping the leading (p, q) corner of every core, for all p and q at once.

    ``core2`` (a × b) is Σ_k of the squared entries of the cores. Entry [p − 1, q − 1] of the
    result is its sum outside the p × q corner, a sum of what is left out: nothing cancels. With
    orthonormal factors this is the error of the truncated decomposition.
    """
    right_of = np.cumsum(core2[:, ::-1], axis=1)[:, ::-1]
    right_of = np.concatenate([right_of[:, 1:], np.zeros((core2.shape[0], 1))], axis=1)
    rows = core2.sum(axis=1)
    below = np.concatenate([np.cumsum(rows[::-1])[::-1][1:], [0.0]])
    lost: np.ndarray = np.cumsum(right_of, axis=0) + below[:, None]
    return lost


def efficient_pairs(
    error2: np.ndarray,
    norm2: float,
    shape: tuple[int, int, int],
    slice_ranks: Sequence[int] | None,
) -> Frontier:
    """Return the pairs (p, q) that none beats, from the squared errors of all of them (a × b)."""
    p, q = np.meshgrid(*(np.arange(1, s + 1) for s in error2.shape), indexing="ij")
    parameters = tucker2_parameters(shape, p, q, slice_ranks)
    ranks = np.stack([p.ravel(), q.ravel()], 1)
    # Compare roots, since squares may differ in their last digit alone.
    keep = undominated(parameters.ravel(), relative_errors(error2.ravel(), norm2))
    return Frontier(ranks[keep], parameters.ravel()[keep], error2.ravel()[keep], norm2)


def pair_at(curve: Frontier, index: int) -> tuple[int, int]:
    """Return the ranks (p, q) at ``index`` of ``curve``."""
    p, q = curve.ranks[index]
    return int(p), int(q)
