"""Clusters: the slices of a group split among several bases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lotrtensor.core.arrays import as_working, to_numpy
from lotrtensor.core.fit.certificate import Tucker2Fit
from lotrtensor.core.fit.tucker2_fit import Method, tucker2
from lotrtensor.core.linalg import orthonormal_basis
from lotrtensor.core.operands import Operand, as_stack
from lotrtensor.core.options import check_integer, shown
from lotrtensor.core.ranks.goal import Rank, check_rank
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import DataError, RankError


@dataclass(frozen=True, eq=False)
class Clustering:
    """A partition of the slices and a decomposition of each part.

    Attributes
    ----------
    labels : ndarray (K,) of int
        Cluster of every slice, numbered by first appearance.
    fits : tuple of Tucker2Fit
        One per cluster, of its slices in their order.
    relative_error : float
        √(Σ_k ‖ΔW_k − U_c G_k V_cᵀ‖² / Σ_k ‖ΔW_k‖²) with c the cluster of slice k.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> a, b = np.eye(4)[:, :1], np.eye(4)[:, 1:2]
    >>> found = lt.cluster([(a, a.T), (b, b.T), (a, a.T)], 2, rank=1)
    >>> found.labels.tolist(), len(found.fits), found.parameters
    ([0, 1, 0], 2, 19)
    """

    labels: np.ndarray
    fits: tuple[Tucker2Fit, ...]
    relative_error: float

    @property
    def parameters(self) -> int:
        """Number of stored numbers of all clusters."""
        return sum(fit.tucker2.parameters for fit in self.fits)


def cluster(
    stack: Operand,
    clusters: int,
    rank: Rank,
    *,
    restarts: int = 4,
    seed: int = 0,
    max_rounds: int = 20,
    method: Method = "auto",
) -> Clustering:
    """Split the slices among ``clusters`` bases (U_c, V_c) of one rank.

    A round assigns every slice to the basis that leaves it the smallest residual, then fits every
    basis again. A start ends with the first round that does not lower the error. The starts are
    contiguous runs of slices, because neighbouring layers are alike, and random partitions.

    Parameters
    ----------
    stack : LowRankStack, Tucker2 or list of pairs (B_k, A_k)
        K slices of thin factors.
    clusters : int
        How many bases, at most K.
    rank : int or (int, int)
        Left and right rank of every basis; a cluster that needs less gets what it needs.
    restarts : int
        Random starts beside the contiguous one.
    seed : int
        Of the random starts.
    max_rounds : int
        Rounds of a start at most.
    method : str
        Of the fits, as for `tucker2`; ``"hosvd"`` finds much the same parts in far less time.

    Returns
    -------
    Clustering
        The best of all starts; its error is never above that of any start.

    Raises
    ------
    RankError
        If ``clusters`` is not between 1 and K, or the rank is out of range.

    Notes
    -----
    Both half steps lower Σ_k ‖ΔW_k − U_c U_cᵀ ΔW_k V_c V_cᵀ‖², as in clustering by subspaces
    (Bradley and Mangasarian, "k-Plane clustering", J. Global Optim. 16 (2000)). A round costs one
    fit and one residual per cluster.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> a, b = np.eye(4)[:, :1], np.eye(4)[:, 1:2]
    >>> found = lt.cluster([(a, a.T), (b, b.T), (a, a.T)], 2, rank=1)
    >>> found.labels.tolist(), found.relative_error < 1e-12
    ([0, 1, 0], True)
    """
    stack = as_stack(stack)
    if not isinstance(stack, LowRankStack):
        raise DataError(
            f"the stack is a {type(stack).__name__}; clusters need thin factors: a LowRankStack, "
            "a list of pairs (B_k, A_k) or a Tucker2"
        )
    slices = stack.shape[0]
    if not isinstance(clusters, int | np.integer) or not 1 <= clusters <= slices:
        raise RankError(
            f"clusters is {shown(clusters)}; expected between 1 and the {slices} slices"
        )
    restarts = check_integer(restarts, "restarts", 0)
    max_rounds = check_integer(max_rounds, "max_rounds", 0)
    seed = check_integer(seed, "seed", 0)
    pair = check_rank(rank, stack.max_rank)
    rng = np.random.default_rng(seed)
    starts = [np.arange(slices) * clusters // slices]
    starts += [_random_labels(rng, slices, clusters) for _ in range(restarts)]
    norms2 = to_numpy(stack.norms2())
    found = [_descend(stack, labels, pair, norms2, max_rounds, method) for labels in starts]
    return min(found, key=lambda clustering: clustering.relative_error)


def _descend(
    stack: LowRankStack,
    labels: np.ndarray,
    pair: tuple[int, int],
    norms2: np.ndarray,
    max_rounds: int,
    method: Method,
) -> Clustering:
    best = _refit(stack, labels, pair, norms2, method)
    for _ in range(max_rounds):
        labels = _reassign(stack, best)
        if np.array_equal(labels, best.labels):
            break
        found = _refit(stack, labels, pair, norms2, method)
        if found.relative_error >= best.relative_error:
            break
        best = found
    return best


def _refit(
    stack: LowRankStack,
    labels: np.ndarray,
    pair: tuple[int, int],
    norms2: np.ndarray,
    method: Method,
) -> Clustering:
    # Numbered by first appearance; a cluster that lost all its slices is gone.
    order = list(dict.fromkeys(labels.tolist()))
    labels = np.array([order.index(label) for label in labels.tolist()])
    fits, whole = [], SquaredError()
    for c in range(len(order)):
        members = np.nonzero(labels == c)[0]
        part = stack.take(members.tolist())
        p, q = (min(r, most) for r, most in zip(pair, part.max_rank, strict=True))
        fit = tucker2(part, (p, q), method=method)
        fits.append(fit)
        norm2 = float(norms2[members].sum())
        # Of a zero slice nothing is lost, and its error is no number to be squared.
        whole += SquaredError(fit.relative_error**2 * norm2 if norm2 else 0.0, norm2)
    return Clustering(labels, tuple(fits), whole.relative)


def _reassign(stack: LowRankStack, found: Clustering) -> np.ndarray:
    """Cluster of smallest residual for every slice; its own one where that ties."""
    residuals = []
    for fit in found.fits:
        left, right = (
            orthonormal_basis(as_working(x)) for x in (fit.tucker2.left, fit.tucker2.right)
        )
        residuals.append(to_numpy(stack.residual_norms2(left, right)))
    table = np.stack(residuals)
    own = table[found.labels, np.arange(table.shape[1])]
    best = table.argmin(axis=0)
    return np.where(table.min(axis=0) < own * (1 - 1e-12), best, found.labels)


def _random_labels(rng: np.random.Generator, slices: int, clusters: int) -> np.ndarray:
    """A random partition without an empty part."""
    labels = np.concatenate([np.arange(clusters), rng.integers(clusters, size=slices - clusters)])
    return rng.permutation(labels)
