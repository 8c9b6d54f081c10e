"""Linear algebra on arrays of any library, where the array API standard has no function.

Only these few functions know which library they run on: SciPy drives LAPACK for large NumPy
arrays, in place or for a subset of the eigenpairs; all else takes the standard's own route.
"""

from __future__ import annotations

import math

import numpy as np
from array_api_compat import (
    device,
    is_numpy_namespace,
)

from lotrtensor.core.arrays import Array, as_accumulator, itemsize, namespace
from lotrtensor.core.threads import scipy_linalg


def largest_entry(x: Array) -> float:
    """Largest absolute entry of ``x``, without a second array of its size."""
    xp = namespace(x)
    return max(float(xp.max(x)), -float(xp.min(x)))


def largest_term(left: Array, right: Array) -> float:
    """Largest product of an entry of a column of ``left`` (m × r) and of its row of ``right``.

    No entry of left · right is larger than r of these.
    """
    xp = namespace(left, right)
    columns = _largest_of_columns(left)
    rows = xp.maximum(xp.max(right, axis=1), -xp.min(right, axis=1))
    with np.errstate(over="ignore", under="ignore"):
        found = float(xp.max(as_accumulator(columns) * as_accumulator(rows)))
    if not found and bool(xp.any((columns > 0) & (rows > 0))):
        return math.ulp(0.0)  # a product that is not zero, but below every number
    return found


def _largest_of_columns(x: Array) -> Array:
    """Largest absolute entry of every column of ``x`` (m × r)."""
    xp, (m, r) = namespace(x), x.shape
    # Few columns are reduced some hundred rows at a time, as one long row: eight times as fast.
    rows = max(1, 1024 // max(r, 1))
    whole = m // rows * rows
    if rows == 1 or whole == 0:
        return xp.maximum(xp.max(x, axis=0), -xp.min(x, axis=0))
    long = xp.reshape(x[:whole, :], (whole // rows, rows * r))
    found = xp.reshape(xp.maximum(xp.max(long, axis=0), -xp.min(long, axis=0)), (rows, r))
    if whole < m:
        rest = x[whole:, :]
        found = xp.concat([found, xp.maximum(xp.max(rest, axis=0), -xp.min(rest, axis=0))[None, :]])
    return xp.max(found, axis=0)


def squares_hold(size: float, x: Array) -> bool:
    """Whether products of several entries of about ``size`` stay in the range of ``x``'s type.

    A pass forms ΔW ΔWᵀ U, and what is 1e-7 of the largest entries shall count in it.
    """
    limit = 1e150 if itemsize(x) >= 8 else 1e10
    return size == 0.0 or 1.0 / limit < size < limit


def norm2(x: Array) -> Array:
    """Squared Frobenius norm of a matrix, summed in the widest type a block of rows at a time."""
    xp = namespace(x)
    count, rows = x.shape[0], max(1, _BLOCK // x.shape[1])
    blocks = (as_accumulator(x[a : min(a + rows, count), :]) for a in range(0, count, rows))
    return xp.sum(xp.stack([xp.sum(xp.vecdot(block, block)) for block in blocks]))


def norms2(x: Array) -> Array:
    """Squared Frobenius norms of the matrices of ``x`` (K × a × b), summed in the widest type."""
    wide, xp = as_accumulator(x), namespace(x)
    return xp.sum(xp.vecdot(wide, wide), axis=-1)


_BLOCK = 2**18
"""Entries that are widened at once, so that no second copy of a large slice is made; of a matrix of
many columns half as many rows, for its Gram matrix."""


def orthonormal_basis(x: Array) -> Array:
    """Orthonormal columns that span those of ``x`` (a × b, b ≤ a): the Q of its QR."""
    return thin_qr(x)[0]


def thin_qr(x: Array) -> tuple[Array, Array]:
    """Return Q (a × c) with orthonormal columns and R (c × b) with x = Q R, c = min(a, b)."""
    xp = namespace(x)
    if is_numpy_namespace(xp) and x.size > LARGE**2:
        q, r = scipy_linalg().qr(x, mode="economic", check_finite=False)
        return q, r
    q, r = xp.linalg.qr(x)
    return q, r


LARGE = 1000
"""Side from which SciPy pays: NumPy and SciPy bring a BLAS each, whose threads wait for a while on
the cores that the other one wants, so that a small call to the one after the other is slow."""


def gram_root(x: Array) -> Array:
    """Return R (b × b, or a × b where that is lower) with RᵀR = xᵀx for tall ``x`` (… × a × b).

    In the widest type from the QR of ``x``. A narrower type takes the eigenvectors of xᵀx in the
    widest one instead: its products of two are exact there, so that the root is as good as a QR in
    the type of ``x``, in a third of the time. That is so beside the largest column: one that is
    smaller by 1e-8 is lost, which a QR would keep.
    """
    xp = namespace(x)
    wide = as_accumulator(x)
    if wide.dtype == x.dtype or x.shape[-2] < x.shape[-1]:  # whose b × b matrix would be larger
        root = np.linalg.qr(wide, mode="r") if is_numpy_namespace(xp) else xp.linalg.qr(wide)[1]
        return xp.astype(root, x.dtype, copy=False)
    values2, vectors = xp.linalg.eigh(xp.matrix_transpose(wide) @ wide)
    values2 = xp.where(values2 > 0, values2, xp.zeros_like(values2))
    return xp.astype(xp.sqrt(values2)[..., :, None] * xp.matrix_transpose(vectors), x.dtype)


def singular_values(x: Array) -> Array:
    """All min(a, b) singular values of ``x`` (a × b), falling.

    Of a type narrower than the widest one they are roots of the eigenvalues of the Gram matrix in
    the widest: that is as good as the numbers are, at a fifth of the time; see `gram_root`.
    """
    xp = namespace(x)
    x = x if x.shape[0] >= x.shape[1] else x.T
    if as_accumulator(x[:0, :]).dtype == x.dtype:
        return xp.linalg.svdvals(gram_root(x))
    # As many rows as half of the columns at least: else the sums cost more than the products.
    rows = max(1, _BLOCK // x.shape[1], x.shape[1] // 2)
    gram = 0.0
    for start in range(0, x.shape[0], rows):
        block = as_accumulator(x[start : min(start + rows, x.shape[0]), :])
        gram = gram + block.T @ block
    values2 = xp.flip(xp.linalg.eigvalsh(gram), axis=0)
    return xp.sqrt(xp.where(values2 > 0, values2, xp.zeros_like(values2)))


def leading_eigenvectors(gram: Array, rank: int) -> Array:
    """The ``rank`` leading eigenvectors (a × rank) of a small symmetric matrix (a × a)."""
    return namespace(gram).linalg.eigh(gram)[1][:, gram.shape[0] - rank :]


def leading_left(x: Array, rank: int, *, squared: bool) -> tuple[Array, Array]:
    """Leading left singular vectors and values of ``x`` (a × c).

    Parameters
    ----------
    x : array (a, c)
        A matrix in float64 where the library has it.
    rank : int
        How many vectors, at most a. Where ``rank`` exceeds the rank of ``x`` the basis is
        completed with any orthonormal columns.
    squared : bool
        Take the eigenvectors of x xᵀ: cheaper, but singular values below 1e-8 of the largest
        drown in rounding. False takes the singular value decomposition.

    Returns
    -------
    vectors : array (a, rank)
        Orthonormal columns, by descending singular value.
    values : array (rank,)
        The singular values.
    """
    # LAPACK's fast routes can leave completed vectors 1e-12 off orthogonal; a QR puts that right.
    xp = namespace(x)
    a, c = x.shape
    if not squared:
        if c > 2 * a:
            x = gram_root(x.T).T  # the same singular values and left vectors, sooner
            c = a
        if c < rank:
            padding = xp.zeros((a, rank - c), dtype=x.dtype, device=device(x))
            x = xp.concat([x, padding], axis=1)
        vectors, values, _ = xp.linalg.svd(x, full_matrices=False)
        vectors, values = vectors[:, :rank], values[:rank]
        completed = bool(values[-1] <= 1e-10 * values[0])
        return orthonormal_basis(vectors) if completed else vectors, values
    gram = x @ x.T
    if is_numpy_namespace(xp) and a > LARGE:
        values2, vectors = scipy_linalg().eigh(
            gram, subset_by_index=(a - rank, a - 1), check_finite=False, overwrite_a=True
        )
    else:
        values2, vectors = xp.linalg.eigh(gram)
        values2, vectors = values2[a - rank :], vectors[:, a - rank :]
    values2 = xp.where(values2 > 0, values2, xp.zeros_like(values2))
    return orthonormal_basis(xp.flip(vectors, axis=1)), xp.flip(xp.sqrt(values2), axis=0)


def stepped_left(x: Array, block: Array) -> tuple[Array, Array]:
    """One step towards the leading left singular vectors of ``x`` (a × c), from a near block.

    Rayleigh and Ritz inside the spaces of ``block`` and x xᵀ ``block`` together: what the result
    captures is at least what ``block`` does.

    Parameters
    ----------
    x : array (a, c)
        A matrix.
    block : array (a, b)
        Orthonormal columns near the vectors wanted; 2 b ≤ a.

    Returns
    -------
    vectors : array (a, b)
        Orthonormal columns, by descending value.
    values : array (b,)
        ‖xᵀ vector‖ of each: singular values, once converged.

    Notes
    -----
    Cost 8 a b c flops, where the eigenvectors of x xᵀ take 2 a² c + 9 a³. Knyazev, SIAM J. Sci.
    Comput. 23 (2001), without the previous directions.
    """
    xp, columns = namespace(x), block.shape[1]
    basis, _ = thin_qr(xp.concat([block, x @ (x.T @ block)], axis=1))
    inside = basis.T @ x
    values2, turn = xp.linalg.eigh(inside @ inside.T)
    values2, turn = xp.flip(values2, axis=0)[:columns], xp.flip(turn, axis=1)[:, :columns]
    return basis @ turn, xp.sqrt(xp.where(values2 > 0, values2, xp.zeros_like(values2)))
