"""Leading singular triplets of a whole matrix: a full SVD while it is small, block Lanczos beyond.

Golub and Kahan's bidiagonalisation with blocks and full reorthogonalisation (Golub, Luk and
Overton, ACM TOMS 7, 1981), from a random start (Musco and Musco, NIPS 2015): a pass reads the
matrix twice, as one of subspace iteration does, and all blocks so far approximate together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from array_api_compat import device

from lotrtensor.core.arrays import Array, as_accumulator, as_working, namespace, to_numpy
from lotrtensor.core.fit import tuning
from lotrtensor.core.fit.iteration import stalled
from lotrtensor.core.linalg import norm2, orthonormal_basis, thin_qr
from lotrtensor.core.slice_svd import SliceSvd


class DenseSvd(NamedTuple):
    """Leading singular triplets of a matrix, the squared norm beyond them, and how they were found.

    ``lost2`` is a difference of two sums where a rank was given, good to the digits of the matrix.
    ``converged`` is False where the passes came to an end before the triplets had settled.
    """

    svd: SliceSvd
    lost2: float
    converged: bool


class Krylov(NamedTuple):
    """Orthonormal columns U (m × c), ΔWᵀU (n × c), what is beyond U, and whether it settled."""

    left: Array
    image: Array
    lost2: float
    converged: bool


def dense_svd(matrix: Array, rank: int | None, tolerance: float = 0.0) -> DenseSvd:
    """Leading singular triplets of a whole matrix ΔW (m × n) that is in memory.

    Parameters
    ----------
    matrix : array (m, n)
        ΔW.
    rank : int or None
        Triplets wanted at most; as many as ``tolerance`` needs if None.
    tolerance : float
        Where no rank is given, half of this relative error may lie beyond the triplets.

    Notes
    -----
    A pass of block Lanczos costs 4 m n b flops for b columns a block, 8 to 32, and 8 (m + n) b c
    to keep them orthogonal to the c before them.
    """
    matrix, side = as_working(matrix), min(matrix.shape)
    wanted = None if rank is None else min(rank, side)
    if side <= tuning.FULL_SVD_SIDE or (wanted or 0) * tuning.FULL_SVD_SHARE > side:
        return _full(matrix, wanted, tolerance)
    found = block_lanczos(matrix, wanted, tolerance)
    # ΔW ≈ U Zᵀ, and Z = P R: the singular values are those of the small triangle.
    basis, triangle = thin_qr(as_accumulator(found.image))
    turn, values, other = np.linalg.svd(to_numpy(triangle).T)
    place = {"dtype": matrix.dtype, "device": device(matrix)}
    xp, kept = namespace(matrix), _kept(values, wanted, found.lost2, tolerance)
    left = found.left @ xp.asarray(turn[:, :kept], **place)
    right = xp.astype(basis, matrix.dtype) @ xp.asarray(other[:kept].T, **place)
    lost2 = found.lost2 + float(np.sum(values[kept:] ** 2))
    return DenseSvd(SliceSvd(left, values[:kept], right), lost2, found.converged)


def _full(matrix: Array, wanted: int | None, tolerance: float) -> DenseSvd:
    """The whole decomposition, in float64."""
    left, values, right = np.linalg.svd(to_numpy(as_accumulator(matrix)), full_matrices=False)
    kept = _kept(values, wanted, 0.0, tolerance)
    place = {"dtype": matrix.dtype, "device": device(matrix)}
    xp = namespace(matrix)
    first, second = (np.ascontiguousarray(x) for x in (left[:, :kept], right[:kept].T))
    svd = SliceSvd(xp.asarray(first, **place), values[:kept], xp.asarray(second, **place))
    return DenseSvd(svd, float(np.sum(values[kept:] ** 2)), converged=True)


def _kept(values: np.ndarray, wanted: int | None, lost2: float, tolerance: float) -> int:
    """How many triplets are kept: those wanted, or as many as half of the tolerance needs.

    ``lost2`` is the squared norm beyond all of them.
    """
    if wanted is not None:
        return min(wanted, len(values))
    beyond2 = lost2 + np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)
    within = beyond2 <= (tolerance / 2) ** 2 * beyond2[0]
    return max(1, int(np.argmax(within))) if within.any() else len(values)


def block_lanczos(
    matrix: Array, rank: int | None = None, tolerance: float = 0.0, *, seed: int = 0
) -> Krylov:
    """Find orthonormal U (m × c) that holds most of ΔW (m × n): ΔW ≈ U (UᵀΔW).

    From random orthonormal V_0, every pass takes

        U_j = orth(ΔW V_j beyond U),   Z_j = ΔWᵀ U_j,   V_{j+1} = orth(Z_j beyond V).

    Parameters
    ----------
    matrix : array (m, n)
        ΔW.
    rank : int, optional
        Triplets whose energy decides when to stop: once further passes would lower the squared
        error by less than `tuning.FACTOR_RTOL` of it.
    tolerance : float
        Where no rank is given, stop once half of this relative error lies beyond U.
    seed : int
        Of the random start; the same seed gives the same result.

    Notes
    -----
    In exact arithmetic the best rank-r part in the space of q blocks of r columns has an error
    within a factor 1 + O(log² n / q²) of the least, whatever the gaps between singular values; q
    passes of subspace iteration have 1 + O(log n / q) (Musco and Musco, theorem 1). Narrower blocks
    and more of them come as near with fewer columns.
    """
    xp, side = namespace(matrix), min(matrix.shape)
    rng, whole2 = np.random.default_rng(seed), float(norm2(matrix))
    limit2, floor = (tolerance / 2) ** 2 * whole2, float(xp.finfo(matrix.dtype).eps) * whole2
    columns = min(max(rank or side, tuning.OVERSAMPLE), tuning.FIRST_COLUMNS, side)
    most = tuning.FACTOR_PASSES + (rank or 0) // columns
    right = _fresh(matrix.T[:, :0], columns, rng)
    left = _beyond(matrix @ right, matrix[:, :0])
    image = own = matrix.T @ left
    gram = _gram(image, image)
    captured: list[float] = []
    settled = probed = False
    while True:
        full, lost2 = left.shape[1] == side, max(whole2 - float(xp.linalg.trace(gram)), 0.0)
        if rank is not None:
            captured.append(_energy(gram, rank))
            # The energy of the wanted triplets: that of all columns while those are fewer.
            enough = left.shape[1] >= min(rank + columns, side)
            settled = enough and stalled(captured, whole2, tuning.FACTOR_RTOL, floor)
            if full or (settled and probed) or len(captured) >= most:
                return Krylov(left, image, lost2, full or settled)
        elif left.shape[1] and (full or lost2 <= limit2):
            # The difference of two sums may have lost its digits: it is measured.
            lost2 = float(norm2(matrix - left @ image.T))
            if full or lost2 <= limit2:
                return Krylov(left, image, lost2, converged=True)
        last = right[:, :0] if settled and not probed else _beyond(own, right)
        block = _beyond(matrix @ last, left)
        if not block.shape[1]:
            # Of equal singular values a start reaches as many as it has columns, and nothing at all
            # where it is exhausted: what else there is lies in other directions.
            last, probed = _fresh(right, columns, rng), settled
            block = _beyond(matrix @ last, left)
        if not block.shape[1]:
            lacking = max((rank or 1) - left.shape[1], 0)
            left = xp.concat([left, _fresh(left, lacking, rng)], axis=1)
            return Krylov(left, matrix.T @ left, lost2, converged=True)
        right = xp.concat([right, last], axis=1)
        block = block[:, : side - left.shape[1]]
        own = matrix.T @ block
        cross, corner = _gram(image, own), _gram(own, own)
        gram = xp.concat([xp.concat([gram, cross], axis=1), xp.concat([cross.T, corner], axis=1)])
        left, image = xp.concat([left, block], axis=1), xp.concat([image, own], axis=1)


def _random(like: Array, axis: int, columns: int, rng: np.random.Generator) -> Array:
    """Normal columns as long as an axis of ``like``, in its type."""
    xp = namespace(like)
    drawn = np.float64 if like.dtype == xp.float64 else np.float32
    block = rng.standard_normal((like.shape[axis], columns), dtype=drawn)
    return xp.asarray(block, dtype=like.dtype, device=device(like))


def _fresh(basis: Array, columns: int, rng: np.random.Generator) -> Array:
    """Random orthonormal columns beyond those of ``basis``."""
    columns = min(columns, basis.shape[0] - basis.shape[1])
    return _beyond(_random(basis, 0, columns, rng), basis)


def _beyond(block: Array, basis: Array) -> Array:
    """Orthonormal columns beyond those of ``basis`` that span what is there of ``block``.

    There may be fewer of them than in the block, or none: what is left of a column that lay in the
    basis is rounding, whose directions may lie in the basis again, and is dropped. What is kept is
    as much as `DROPPED` times the rounding, so that its own is taken off by projecting once more.
    """
    xp = namespace(block)
    size = float(xp.linalg.matrix_norm(block)) if block.shape[1] else 0.0
    least = DROPPED * float(xp.finfo(block.dtype).eps) * size
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
    # Two small factorisations in place of one that reveals the rank.
    columns, triangle = thin_qr(block)
    turn, values, _ = xp.linalg.svd(triangle, full_matrices=False)
    kept = int(xp.sum(xp.astype(values > least, xp.int64)))
    block = columns @ turn[:, :kept]
    return orthonormal_basis(block - basis @ (basis.T @ block)) if kept else block


DROPPED = 100.0
"""Singular values of the rest of a block, over the rounding of the whole, from which it is kept."""


def _gram(left: Array, right: Array) -> Array:
    return as_accumulator(left).T @ as_accumulator(right)


def _energy(gram: Array, rank: int) -> float:
    """Energy that the best ``rank`` directions of ΔWᵀU hold, from its Gram matrix."""
    xp = namespace(gram)
    values = xp.linalg.eigvalsh(gram)
    return float(xp.sum(values[max(values.shape[0] - rank, 0) :]))
