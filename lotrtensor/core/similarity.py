"""Inner products, similarity and angles of stacks and decompositions, without densifying."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from lotrtensor.core.arrays import Array, as_accumulator, check_real_floating, namespace
from lotrtensor.core.linalg import orthonormal_basis
from lotrtensor.core.operands import Operand, as_stack
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.errors import DataError, ShapeError

COLUMNS = 1024
"""Columns of thin factors that are multiplied with all others at a time: so many rows in memory."""


def inner(a: Operand, b: Operand) -> float:
    """Inner product Σ_k ⟨ΔW_k, ΔW'_k⟩ of two stacks or decompositions of one shape.

    Thin factors: Σ_k ⟨B_kᵀB'_k, A_k A'_kᵀ⟩, r × r products only. Where one side is dense or lazy,
    its slices are taken one at a time.

    Parameters
    ----------
    a, b : SliceStack, Tucker2, array or list of pairs
        Operands of one shape (K, m, n); see `as_stack`.

    Returns
    -------
    float
        Σ_k tr(ΔW_kᵀ ΔW'_k), summed in float64 where the library has it.

    Raises
    ------
    ShapeError
        If K, m or n differ.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> lt.inner(2 * lt.LowRankStack(B, A), list(zip(B, A))) / lt.norm(list(zip(B, A))) ** 2
    2.0
    """
    first, second = as_stack(a), as_stack(b)
    if first.shape != second.shape:
        raise ShapeError(
            f"stacks of (K, m, n) = {first.shape} and {second.shape} have no inner product"
        )
    if isinstance(second, LowRankStack) and not isinstance(first, LowRankStack):
        first, second = second, first
    return math.fsum(_slice_inner(first, second, k) for k in range(first.shape[0]))


def norm(a: Operand) -> float:
    """Frobenius norm √(Σ_k ‖ΔW_k‖²).

    Parameters
    ----------
    a : SliceStack, Tucker2, array or list of pairs
        See `as_stack`. Thin factors stay thin; whole slices are read once.

    Returns
    -------
    float
        The norm.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.norm(np.ones((4, 2, 2)))
    4.0
    """
    norms2 = as_stack(a).norms2()
    return math.sqrt(float(namespace(norms2).sum(norms2)))


def cosine_similarity(a: Operand, b: Operand) -> float:
    """Cosine ⟨a, b⟩ / (‖a‖ ‖b‖) of two stacks; 0 where one is zero.

    It depends on the products B_k A_k alone, so that the same adapter in another gauge has
    similarity 1.

    Parameters
    ----------
    a, b : SliceStack, Tucker2, array or list of pairs
        Operands of one shape (K, m, n); see `as_stack`.

    Returns
    -------
    float
        Between −1 and 1, but for rounding.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> turn = np.array([[2.0, 1.0], [0.0, 1.0]])
    >>> same = lt.LowRankStack(B @ turn, np.linalg.inv(turn) @ A)
    >>> round(lt.cosine_similarity(lt.LowRankStack(B, A), same), 6)
    1.0
    """
    first, second = _in_range(as_stack(a)), _in_range(as_stack(b))
    scale = norm(first) * norm(second)
    return inner(first, second) / scale if scale else 0.0


def principal_angles(a: Array, b: Array) -> Array:
    """Principal angles, in radians and rising, between the column spaces of ``a`` and ``b``.

    Parameters
    ----------
    a, b : array (m, p), (m, p')
        Any bases, of full column rank: the left or right factors of two decompositions.

    Returns
    -------
    array (min(p, p'),)
        0 where the spaces share a direction, π/2 where one is orthogonal to the other.

    Raises
    ------
    ShapeError
        If the two have different numbers of rows.
    DataError
        If the columns of one are dependent.

    Notes
    -----
    Cosines are the singular values of QᵀQ'; small angles are taken from the sines instead, which
    keeps them accurate (Björck and Golub, Math. Comp. 27 (1973); Knyazev and Argentati, SIAM J.
    Sci. Comput. 23 (2002)).

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.principal_angles(np.eye(3)[:, :2], np.eye(3)[:, 1:]).round(4).tolist()  # 0 and π/2
    [0.0, 1.5708]
    """
    namespace(a, b)
    for x in (a, b):
        check_real_floating(x, "a basis")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
        raise ShapeError(
            f"bases have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (m, p) and (m, p')"
        )
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    xp = namespace(a, b)
    a, b = as_accumulator(a), as_accumulator(b)
    for x in (a, b):
        values = xp.linalg.svdvals(x)
        if x.shape[1] > x.shape[0] or not bool(values[-1] > 1e-12 * values[0]):
            raise DataError(
                f"a basis of shape {tuple(x.shape)} has dependent columns; expected full column "
                "rank: take the factors of orthogonalised() or of a truncation"
            )
    first, second = orthonormal_basis(a), orthonormal_basis(b)
    inside = first.T @ second
    cosines = xp.linalg.svdvals(inside)
    sines = xp.flip(xp.linalg.svdvals(second - first @ inside), axis=0)
    one = xp.ones_like(cosines)
    cosines, sines = xp.minimum(cosines, one), xp.minimum(sines, one)
    return xp.where(cosines * cosines > 0.5, xp.asin(sines), xp.acos(cosines))


def subspace_overlap(a: Array, b: Array) -> float:
    """Mean squared cosine of the principal angles: 1 for one space, 0 for orthogonal ones.

    Parameters
    ----------
    a, b : array (m, p), (m, p')
        Bases, as for `principal_angles`.

    Returns
    -------
    float
        ‖QᵀQ'‖² / min(p, p') with Q and Q' orthonormal bases of the two spaces.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> round(lt.subspace_overlap(np.eye(3)[:, :2], np.eye(3)[:, 1:]), 6)  # one of two directions
    0.5
    """
    xp = namespace(a, b)
    return float(xp.mean(xp.cos(principal_angles(a, b)) ** 2))


def _in_range(stack: SliceStack) -> SliceStack:
    """The stack, brought to size 1 where squares would leave the range of float64."""
    size = stack.magnitude()
    return stack if not size or 1e-60 < size < 1e60 else stack * (1.0 / size)


def _slice_inner(a: SliceStack, b: SliceStack, k: int) -> float:
    if isinstance(a, LowRankStack):
        left, right = (as_accumulator(x) for x in a.factors(k))
        xp = namespace(left)
        if isinstance(b, LowRankStack):
            left2, right2 = (as_accumulator(x) for x in b.factors(k))
            return float(xp.sum((left.T @ left2) * (right @ right2.T)))
        image = left.T @ as_accumulator(b.slice(k))
        return float(xp.sum(image * right))
    first, second = as_accumulator(a.slice(k)), as_accumulator(b.slice(k))
    return float(namespace(first).sum(first * second))


def pair_products(lefts: Sequence[np.ndarray], rights: Sequence[np.ndarray]) -> np.ndarray:
    """Inner products ⟨B A, B' A'⟩ (K × K) of every two of K slices, from their thin factors.

    Parameters
    ----------
    lefts, rights : sequences of ndarray (m, r_k), (r_k, n)
        B_k and A_k; some of their columns are multiplied with all others at a time.
    """
    left, right = np.hstack(lefts).astype(np.float64), np.vstack(rights).astype(np.float64)
    counts = [b.shape[1] for b in lefts]
    starts = np.cumsum([0, *counts[:-1]])
    found = np.zeros((len(lefts), len(lefts)))
    for some in _blocks(counts):
        first, last = starts[some.start], starts[some.start] + sum(counts[some])
        both = (left[:, first:last].T @ left) * (right[first:last] @ right.T)
        sums = np.add.reduceat(both, starts[some] - first, axis=0)
        found[some] = np.add.reduceat(sums, starts, axis=1)
    return found


def _blocks(counts: Sequence[int]) -> Iterator[slice]:
    start, total = 0, 0
    for i, count in enumerate(counts):
        if total and total + count > COLUMNS:
            yield slice(start, i)
            start, total = i, 0
        total += count
    yield slice(start, len(counts))


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines of every two from their inner products; those of a zero are zero."""
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    safe = np.where(norms > 0, norms, 1.0)
    found: np.ndarray = np.clip(products / np.outer(safe, safe), -1.0, 1.0)
    return found


def average_linkage(
    cosine: np.ndarray, *, threshold: float | None = None, count: int | None = None
) -> np.ndarray:
    """Return clusters by average linkage of cosines, numbered from 0, the largest first.

    Parameters
    ----------
    cosine : ndarray (K, K)
        Cosines of every two.
    threshold : float, optional
        Mean cosine from which on clusters are joined.
    count : int, optional
        Number of clusters at most, in place of it.
    """
    if len(cosine) == 1:
        return np.zeros(1, int)
    distances = np.maximum(1.0 - 0.5 * (cosine + cosine.T), 0.0)
    np.fill_diagonal(distances, 0.0)
    tree = hierarchy.linkage(squareform(distances, checks=False), method="average")
    if count is not None:
        # Not fcluster's maxclust, which finds fewer in SciPy 1.13.
        labels = hierarchy.cut_tree(tree, min(count, len(cosine))).ravel().tolist()
    else:
        labels = hierarchy.fcluster(tree, 1.0 - (threshold or 0.0), criterion="distance").tolist()
    order = sorted(set(labels), key=lambda label: (-labels.count(label), labels.index(label)))
    return np.array([order.index(label) for label in labels])
