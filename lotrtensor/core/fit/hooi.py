"""HOOI: higher-order orthogonal iteration, the alternating refinement of U and V."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from lotrtensor.core.arrays import Array, namespace, to_numpy
from lotrtensor.core.fit import tuning
from lotrtensor.core.fit.convergence import still_to_come
from lotrtensor.core.linalg import leading_left, stepped_left


class Hooi(NamedTuple):
    """Orthonormal U (m × p), V (n × q), and how they were reached.

    ``history`` holds the squared error after each sweep, relative to Σ_k ‖ΔW_k‖²; but for rounding
    it never rises.

    Examples
    --------
    >>> import numpy as np
    >>> from lotrtensor.core import hooi
    >>> found = hooi(np.random.default_rng(0).normal(size=(3, 4, 5)), 2)
    >>> found.sweeps == len(found.history), found.history[-1] <= found.history[0]
    (True, True)
    """

    left: Array
    right: Array
    sweeps: int
    history: tuple[float, ...]
    converged: bool


class Projectable(Protocol):
    """What HOOI asks of a stack; see `SliceStack`."""

    def left_factor(self, right: Array | None = None) -> Array:
        """See `SliceStack.left_factor`."""

    def right_factor(self, left: Array | None = None) -> Array:
        """See `SliceStack.right_factor`."""

    def residual_norms2(self, left: Array, right: Array) -> Array:
        """See `SliceStack.residual_norms2`."""


def hooi(
    stack: Projectable,
    right: Array,
    rank: tuple[int, int],
    *,
    norm2: float,
    squared: bool,
    rtol: float = tuning.RTOL,
    max_sweeps: int = tuning.MAX_SWEEPS,
) -> Hooi:
    """Maximise the captured energy Σ_k ‖Uᵀ ΔW_k V‖² alternately over U and V.

    A sweep sets U to the p leading left singular vectors of [ΔW_1 V … ΔW_K V], then V to the q
    leading ones of [ΔW_1ᵀ U … ΔW_Kᵀ U].

    Parameters
    ----------
    stack : SliceStack
        A small stack: both factors are decomposed in every sweep.
    right : array (n, q)
        The V to start from, orthonormal; HOSVD's.
    rank : (int, int)
        Left and right rank (p, q).
    norm2 : float
        Σ_k ‖ΔW_k‖².
    squared : bool
        See `leading_left`.
    rtol : float
        Stop when all further sweeps together are expected to lower the squared error by less than
        this share of it; see `still_to_come`.
    max_sweeps : int
        Stop here in any case.

    Notes
    -----
    Large sides are decomposed once, and then follow from sweep to sweep by block Krylov steps,
    which captures less in one sweep, in a tenth of its time; the stopping rule is the same.
    De Lathauwer, De Moor, Vandewalle, "On the best rank-1 and rank-(R1, …, RN) approximation of
    higher-order tensors", SIAM J. Matrix Anal. 21 (2000), algorithm 4.2.
    """
    p, q = rank
    left_side, right_side = _Side(p, squared), _Side(q, squared)
    history: list[float] = []
    for sweep in range(1, max_sweeps + 1):
        left, _ = left_side.leading(_completed(stack.left_factor, right, p))
        right, values = right_side.leading(_completed(stack.right_factor, left, q))
        if squared:
            # Far above rounding the captured energy gives the error without another product.
            error2 = max(norm2 - float(namespace(values).sum(values**2)), 0.0) / norm2
        else:
            error2 = float(to_numpy(stack.residual_norms2(left, right)).sum()) / norm2
        history.append(error2)
        if _converged(history, rtol):
            return Hooi(left, right, sweep, tuple(history), True)
    return Hooi(left, right, max_sweeps, tuple(history), False)


class _Side:
    """The leading ``rank`` directions of one side, sweep after sweep.

    From one sweep to the next they turn little. On a side that is large beside the rank, the first
    sweep decomposes the whole Gram matrix, and every later one takes one step from the block that
    the last one left (`stepped_left`), which captures no less than that block did.
    """

    def __init__(self, rank: int, squared: bool) -> None:
        self._rank, self._squared = rank, squared
        self._block: Array | None = None

    def leading(self, factor: Array) -> tuple[Array, Array]:
        """Directions and singular values of ``factor`` (a × c); see `leading_left`."""
        rank, side = self._rank, factor.shape[0]
        columns = rank + tuning.OVERSAMPLE
        if not self._squared or side <= tuning.CHEAP or 4 * columns > side:
            return leading_left(factor, rank, squared=self._squared)
        if self._block is None:
            self._block, values = leading_left(factor, columns, squared=True)
        else:
            self._block, values = stepped_left(factor, self._block)
        return self._block[:, :rank], values[:rank]


def _converged(history: list[float], rtol: float) -> bool:
    """Whether gains have ended, or all later ones are expected below ``rtol`` of the error."""
    if len(history) < 2:
        return False
    # Below 1e-30 of the whole there is only rounding left.
    gain = history[-2] - history[-1]
    if gain <= 1e-30 or len(history) < 3:
        return gain <= 1e-30
    return gain * still_to_come(history[-3] - history[-2], gain) <= rtol * history[-1]


def _completed(factor: Callable[..., Array], other: Array, rank: int) -> Array:
    """Return the factor projected by ``other``, with columns enough for ``rank`` directions.

    If the projected slices span fewer, this half of the sweep could take any further directions;
    those of the most energy in the whole stack are best for the next half.
    """
    projected = factor(other)
    if projected.shape[1] >= rank:
        return projected
    return namespace(projected).concat([projected, 1e-7 * factor()], axis=1)
