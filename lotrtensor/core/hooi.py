"""HOOI: higher-order orthogonal iteration, the alternating refinement of U and V."""

from __future__ import annotations

from typing import NamedTuple

from lotrtensor.core.linalg import Array, leading_left, namespace
from lotrtensor.core.stacks import SliceStack


class Hooi(NamedTuple):
    """Orthonormal U (m × p), V (n × q), and how they were reached.

    ``history`` holds the squared error after each sweep, relative to Σ_k ‖ΔW_k‖², as estimated
    from the captured energy; it never rises.
    """

    left: Array
    right: Array
    sweeps: int
    history: tuple[float, ...]
    converged: bool


def hooi(
    stack: SliceStack,
    right: Array,
    rank: tuple[int, int],
    *,
    norm2: float,
    squared: bool,
    rtol: float = 1e-6,
    max_sweeps: int = 100,
) -> Hooi:
    """Maximise the captured energy Σ_k ‖Uᵀ ΔW_k V‖² by turns over U and V.

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
        Stop when a sweep lowers the squared error by less than this share of it.
    max_sweeps : int
        Stop here in any case.

    Notes
    -----
    De Lathauwer, De Moor, Vandewalle, "On the best rank-1 and rank-(R1, …, RN) approximation of
    higher-order tensors", SIAM J. Matrix Anal. 21 (2000), algorithm 4.2.
    """
    p, q = rank
    history: list[float] = []
    captured = 0.0
    for sweep in range(1, max_sweeps + 1):
        left, _ = leading_left(stack.left_factor(right), p, squared=squared)
        right, values = leading_left(stack.right_factor(left), q, squared=squared)
        gain, captured = -captured, float(namespace(values).sum(values**2))
        gain += captured
        # Rounding alone moves the captured energy by this much.
        noise = 1e-14 * norm2
        history.append(max(norm2 - captured, 0.0) / norm2)
        if sweep > 1 and gain <= max(rtol * (norm2 - captured), noise):
            return Hooi(left, right, sweep, tuple(history), True)
    return Hooi(left, right, max_sweeps, tuple(history), False)
