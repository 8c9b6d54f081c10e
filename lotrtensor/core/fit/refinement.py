"""Refinement of matrix-free blocks at exactly the ranks wanted: HOOI on the whole stack."""

from __future__ import annotations

from typing import NamedTuple

from lotrtensor.core.arrays import Array, as_accumulator, namespace
from lotrtensor.core.fit.iteration import stalled
from lotrtensor.core.linalg import leading_eigenvectors, orthonormal_basis
from lotrtensor.core.stacks.protocol import SliceStack


class Refinement(NamedTuple):
    """Orthonormal U (m × p), V (n × q), their cores (K × p × q) and how they were reached.

    ``captured`` is the energy Σ_k ‖UᵀΔW_k V‖² after each round of two passes over the slices.
    """

    left: Array
    right: Array
    core: Array
    captured: tuple[float, ...]
    converged: bool

    @property
    def passes(self) -> int:
        """Passes over the slices: two per round, and one for the cores."""
        return 2 * len(self.captured) + 1


def refine(
    stack: SliceStack,
    blocks: tuple[Array, Array],
    start: tuple[Array, Array],
    *,
    start2: float,
    norm2: float,
    rtol: float,
    max_rounds: int,
) -> Refinement:
    """Maximise Σ_k ‖UᵀΔW_k V‖² over U and V of exactly the ranks wanted.

    A wider block converges to the solution at its own, larger ranks; the best (p, q) directions
    inside it need not be the best of all. So U and V alternately take one step of subspace
    iteration on the Gram matrix projected by the other one at its wanted rank, and keep the leading
    directions of their block:

        U ← leading p of U_b by Σ_k (ΔW_k V)(ΔW_k V)ᵀ,   U_b ← orth(Σ_k (ΔW_k V)(ΔW_k V)ᵀ U_b).

    Parameters
    ----------
    stack : SliceStack
        A stack in memory.
    blocks : array (m, b), array (n, c)
        Orthonormal U_b and V_c.
    start : array (m, p), array (n, q)
        Orthonormal U and V to start from.
    start2 : float
        What ``start`` captures, Σ_k ‖UᵀΔW_k V‖².
    norm2 : float
        Σ_k ‖ΔW_k‖².
    rtol : float
        Stop when further rounds are expected to gain less than this share of the squared error.
    max_rounds : int
        Stop here in any case.

    Notes
    -----
    Its fixed points are those of HOOI (see `lotrtensor.core.fit.hooi.hooi`) on the whole stack.
    """
    (left_block, right_block), (left, right) = blocks, start
    floor = float(namespace(left).finfo(left.dtype).eps) * norm2
    captured = [start2]
    while True:
        sweep = stack.sweep(left_block, right)
        left = left_block @ _leading(sweep.core, left.shape[1])
        left_block = orthonormal_basis(sweep.left)
        sweep = stack.sweep(left, right_block)
        core = namespace(left).matrix_transpose(sweep.core)
        turn = _leading(core, right.shape[1])
        right = right_block @ turn
        right_block = orthonormal_basis(sweep.right)
        kept = as_accumulator(sweep.core @ turn)
        captured.append(float(namespace(kept).sum(kept * kept)))
        converged = stalled(captured, norm2, rtol, floor)
        if converged or len(captured) > max_rounds:
            return Refinement(left, right, stack.core(left, right), tuple(captured[1:]), converged)


def _leading(core: Array, rank: int) -> Array:
    """The ``rank`` directions of the rows of all cores (K × b × c) that hold most energy."""
    xp = namespace(core)
    wide = as_accumulator(core)
    gram = xp.sum(wide @ xp.matrix_transpose(wide), axis=0)
    return xp.astype(leading_eigenvectors(gram, rank), core.dtype)
