"""From a large stack to a small one: the choice between exact and matrix-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lotrtensor.core.arrays import Array, as_accumulator, namespace, to_numpy
from lotrtensor.core.fit import tuning
from lotrtensor.core.fit.bounds import discarded_energy
from lotrtensor.core.fit.hosvd import hosvd
from lotrtensor.core.fit.iteration import Iteration, block_iteration
from lotrtensor.core.fit.refinement import refine
from lotrtensor.core.linalg import orthonormal_basis
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.stacks.dense import DenseStack
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.core.tucker2 import Tucker2

Kind = Literal["exact", "matrix-free", "projected"]
"""How a small problem came about: equal, from block iteration, or between given spaces."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """ΔW_k ≈ Q · small_k · Pᵀ with orthonormal Q and P, None standing for the identity.

    ``norms2`` are ‖ΔW_k‖² (K). ``lost2`` is the squared norm that the small problem leaves out, 0
    if ``kind`` is exact. ``discarded2`` is a lower bound on the squared error at the rank asked
    for, where a better one is known than the small problem gives. ``passes``, ``history`` (relative
    errors) and ``converged`` describe the iteration.
    """

    kind: Kind
    left: Array | None
    small: SliceStack
    right: Array | None
    norms2: np.ndarray
    lost2: float = 0.0
    discarded2: float = 0.0
    passes: int = 0
    sweeps: int = 0
    history: tuple[float, ...] = ()
    converged: bool = True

    @property
    def norm2(self) -> float:
        """Σ_k ‖ΔW_k‖²."""
        return float(self.norms2.sum())

    def expand(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Return Q U and P V: bases of the small problem as bases of the stack."""
        return (
            left if self.left is None else as_accumulator(self.left) @ left,
            right if self.right is None else as_accumulator(self.right) @ right,
        )

    def inside(self, left: Array | None, right: Array | None) -> Reduction:
        """The reduction of left · stack_k · rightᵀ where this is one of stack_k."""
        outer = replace(self, left=left, right=right)
        if self.left is None or self.right is None:
            return outer
        left, right = outer.expand(self.left, self.right)
        return replace(self, left=left, right=right)


def exact_flops(stack: SliceStack) -> float:
    """Estimated cost of the exact method.

    Thin factors: two QRs of m × ρ and n × ρ (4 m ρ² with Q) and the SVDs and sweeps of the
    ρ × ρ problem. Whole slices: the SVDs of the m × Kn and n × Km unfoldings.
    """
    slices, m, n = stack.shape
    a, b = stack.max_rank
    if isinstance(stack, LowRankStack):
        return thin_flops(m, n, sum(stack.ranks))
    return 8.0 * slices * m * n * (a + b) + 20.0 * (a**3 + b**3)


def thin_flops(m: int, n: int, rho: int) -> float:
    """`exact_flops` of thin factors of m × n slices whose ranks sum to ``rho``."""
    a, b = min(m, rho), min(n, rho)
    return 4.0 * (m * a + n * b) * rho + 60.0 * (a * a + b * b) * rho


def reduce_stack(
    stack: SliceStack | Tucker2,
    rank: tuple[int, int] | None = None,
    *,
    kind: Literal["auto", "exact", "matrix-free"] = "auto",
    final: bool = False,
    tolerance: float = 0.0,
    seed: int = 0,
    max_passes: int | None = None,
) -> Reduction:
    """Return an equal or nearly equal small problem.

    ``auto`` is exact while `exact_flops` stays below `EXACT_FLOPS`, but never for slices that are
    read on demand. The matrix-free block is somewhat wider than the rank wanted. If that rank is
    ``final``, so that no other will be asked for, and the slices are in memory, the block is then
    refined at exactly that rank. Without a rank, the block is doubled until the error outside is
    below half of ``tolerance``; its cores hold K b c numbers, at most as many as the slices. A
    Tucker2 is reduced to its cores between orthonormal factors, which are reduced further if they
    are large.
    """
    if isinstance(stack, Tucker2):
        whole = stack.orthogonalised()
        options: dict[str, Any] = {"kind": kind, "final": final, "tolerance": tolerance}
        limits: dict[str, Any] = {"seed": seed, "max_passes": max_passes}
        inner = reduce_stack(DenseStack(whole.core), rank, **options, **limits)
        return inner.inside(whole.left, whole.right)
    if kind == "auto":
        affordable = not stack.lazy and exact_flops(stack) <= tuning.EXACT_FLOPS
        kind = "exact" if affordable else "matrix-free"
    if kind == "exact":
        left, small, right = stack.reduce()
        return Reduction("exact", left, small, right, to_numpy(small.norms2()))
    iteration: dict[str, Any] = {
        "rtol": tuning.LAZY_RTOL if stack.lazy else tuning.FACTOR_RTOL,
        "max_passes": max_passes or (tuning.LAZY_PASSES if stack.lazy else tuning.FACTOR_PASSES),
        "seed": seed,
    }
    if rank is None:
        return _wide_enough(stack, tolerance, iteration)
    rank = min(rank[0], stack.max_rank[0]), min(rank[1], stack.max_rank[1])
    found = block_iteration(stack, _columns(stack, rank), rank, **iteration)
    # A difference of norms is accurate enough here: the error that is reported is measured.
    lost2 = max(found.norm2 - found.core_norm2, 0.0)
    reduction = _reduction(found, lost2, discarded_energy(stack, rank), len(found.captured))
    if final and not stack.lazy and found.norm2 > 0.0:
        return _refined(stack, rank, reduction, iteration)
    return reduction


def reduce_between(stack: LowRankStack, left: Array, right: Array) -> Reduction:
    """Small problem of ``stack`` inside the spaces of ``left`` (m × a) and ``right`` (n × b).

    What lies outside is counted as error, so that errors are those of the whole stack. The
    discarded energies of the part inside are at most those of the whole: the bounds stay valid, but
    are less sharp.
    """
    left, right = orthonormal_basis(left), orthonormal_basis(right)
    factors = [stack.factors(k) for k in range(stack.shape[0])]
    small = LowRankStack(
        [as_accumulator(left.T @ b) for b, _ in factors],
        [as_accumulator(a @ right) for _, a in factors],
    )
    norms2 = to_numpy(stack.norms2())
    lost2 = max(float(norms2.sum() - to_numpy(small.norms2()).sum()), 0.0)
    return Reduction("projected", left, small, right, norms2, lost2)


def _wide_enough(stack: SliceStack, tolerance: float, options: dict[str, Any]) -> Reduction:
    """The small problem of blocks so wide that at most half of ``tolerance`` is lost outside."""
    columns, passes = (tuning.FIRST_COLUMNS, tuning.FIRST_COLUMNS), 0
    start: tuple[Array, Array] | None = None
    while True:
        found = block_iteration(stack, _columns(stack, columns), start=start, **options)
        lost2 = float(to_numpy(stack.residual_norms2(found.left, found.right)).sum())
        passes += len(found.captured) + 1
        if lost2 <= (tolerance / 2) ** 2 * found.norm2 or columns[0] >= max(stack.max_rank):
            return _reduction(found, lost2, 0.0, passes)
        start, columns = (found.left, found.right), (2 * columns[0], 2 * columns[1])


def _refined(
    stack: SliceStack, rank: tuple[int, int], wide: Reduction, options: dict[str, Any]
) -> Reduction:
    """The problem at just ``rank``, refined from the wider one; its bounds are kept."""
    left, right = wide.left, wide.right
    rounds = (options["max_passes"] - wide.passes - 1) // 2
    if left is None or right is None or rounds < 1:
        return wide
    # Blocks as wide as the stack hold all of it: the small problem is equal to it, and is solved to
    # the end, where a refinement would stop at `REFINEMENT_RTOL`.
    if (left.shape[1], right.shape[1]) in (rank, stack.max_rank):
        return wide
    full = hosvd(wide.small)
    xp = namespace(left)
    start = tuple(
        block @ xp.astype(turn[:, :r], block.dtype)
        for block, turn, r in zip((left, right), (full.left, full.right), rank, strict=True)
    )
    found = refine(
        stack,
        (left, right),
        (start[0], start[1]),
        start2=(1.0 - wide.history[-1] ** 2) * wide.norm2,
        norm2=wide.norm2,
        rtol=tuning.REFINEMENT_RTOL,
        max_rounds=rounds,
    )
    return replace(
        wide,
        left=found.left,
        small=DenseStack(as_accumulator(found.core)),
        right=found.right,
        lost2=max(wide.norm2 - found.captured[-1], 0.0),
        discarded2=max(wide.discarded2, float(full.lower_bound2(rank))),
        passes=wide.passes + found.passes,
        sweeps=len(found.captured),
        history=wide.history
        + tuple(SquaredError(wide.norm2 - c, wide.norm2).relative for c in found.captured),
        converged=wide.converged and found.converged,
    )


def _columns(stack: SliceStack, rank: tuple[int, int]) -> tuple[int, int]:
    """Columns of the blocks for ``rank``: more than it, which speeds convergence.

    A quarter more; twice as many where every pass reads the slices, which costs more than columns.
    """

    def columns(own: int, most: int) -> int:
        return min(own + max(tuning.OVERSAMPLE, own if stack.lazy else own // 4), most)

    return columns(rank[0], stack.max_rank[0]), columns(rank[1], stack.max_rank[1])


def _reduction(found: Iteration, lost2: float, discarded2: float, passes: int) -> Reduction:
    return Reduction(
        kind="matrix-free",
        left=found.left,
        small=DenseStack(found.core),
        right=found.right,
        norms2=found.norms2,
        lost2=lost2,
        discarded2=discarded2,
        passes=passes,
        history=tuple(SquaredError(found.norm2 - c, found.norm2).relative for c in found.captured),
        converged=found.converged,
    )
