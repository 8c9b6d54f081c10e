"""A stack seen from its HOSVD: error and bound at every pair of ranks, slice by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lotrtensor.core.arrays import Array, as_accumulator, to_numpy
from lotrtensor.core.fit.frontier import core_energy
from lotrtensor.core.fit.problem import Problem
from lotrtensor.core.fit.reduction import Method, Reduction, reduce_stack
from lotrtensor.core.linalg import orthonormal_basis
from lotrtensor.core.ranks.curve import (
    Frontier,
    efficient_pairs,
    energies_outside,
    tucker2_parameters,
)
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack


class Profile:
    """Everything that one decomposition tells of all sizes.

    Parameters
    ----------
    stack : SliceStack
        K slices ΔW_k.
    reduction : Reduction
        Their small problem.
    slice_ranks : sequence of int, optional
        Ranks r_k of the slices: a core then costs min(p q, r_k (p + q)), as it is stored.
    sides : (int, int), optional
        Sides m and n that parameters are counted for, where ``stack`` is the small problem of
        another.

    Attributes
    ----------
    shape : (int, int, int)
        (K, m, n).
    norms2 : ndarray (K,)
        ‖ΔW_k‖².
    left_values, right_values : ndarray
        Singular values of the two unfoldings, falling.
    error2 : ndarray (a, b)
        Squared error of the truncated HOSVD of ranks (p, q) at [p − 1, q − 1]; HOOI goes below.
    curve : Frontier
        The efficient pairs.
    """

    def __init__(
        self,
        stack: SliceStack,
        reduction: Reduction,
        *,
        slice_ranks: Sequence[int] | None = None,
        sides: tuple[int, int] | None = None,
    ) -> None:
        slices, m, n = stack.shape
        self.shape, self.slice_ranks = (slices, *(sides or (m, n))), slice_ranks
        self.problem = Problem(stack, None, reduction, stack.dtype)
        self.norms2 = reduction.norms2
        self.left_values = to_numpy(self.problem.full.left_values)
        self.right_values = to_numpy(self.problem.full.right_values)
        energy = core_energy(reduction.small, self.problem.full)
        self.error2 = energies_outside(energy) + reduction.lost2
        norm2 = float(energy.sum()) + reduction.lost2
        self.curve: Frontier = efficient_pairs(self.error2, norm2, self.shape, slice_ranks)

    @property
    def norm2(self) -> float:
        """Σ_k ‖ΔW_k‖²."""
        return self.curve.norm2

    def parameters(self, pair: tuple[int, int]) -> int:
        """Stored numbers of a Tucker-2 of ranks ``pair``."""
        return int(tucker2_parameters(self.shape, *pair, self.slice_ranks))

    def pair(self, rank: int) -> tuple[int, int]:
        """Ranks (``rank``, ``rank``), or as many as there are."""
        a, b = self.error2.shape
        return min(rank, a), min(rank, b)

    def squares(self, pair: tuple[int, int]) -> tuple[float, float]:
        """Squared error of the truncated HOSVD, and the square that no fit goes below."""
        error2 = float(self.error2[pair[0] - 1, pair[1] - 1])
        return error2, min(float(self.problem.full.lower_bound2(pair)), error2)

    def errors(self, pair: tuple[int, int]) -> tuple[float, float]:
        """Relative error of the truncated HOSVD of ranks ``pair``, and the lower bound."""
        error2, bound2 = self.squares(pair)
        return relative(error2, self.norm2), relative(bound2, self.norm2)

    def slice_errors2(self, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Squared error of every slice at every pair, (len(pairs), K)."""
        small, full = self.problem.reduction.small, self.problem.full
        found = np.empty((len(pairs), self.shape[0]))
        rows, columns = (np.array([pair[side] - 1 for pair in pairs]) for side in (0, 1))
        for k in range(self.shape[0]):
            if isinstance(small, LowRankStack):
                core = small.take([k]).core(full.left, full.right)[0, :, :]
            else:
                core = full.left.T @ small.slice(k) @ full.right
            energy = to_numpy(as_accumulator(core)) ** 2
            # The matrix-free method does not see all of a slice; the exact one does.
            lost2 = max(float(self.norms2[k] - energy.sum()), 0.0) if self._partial else 0.0
            found[:, k] = energies_outside(energy)[rows, columns] + lost2
        return found

    def directions(self, count: int) -> tuple[Array, Array]:
        """The leading ``count`` left (m × c) and right (n × c) singular vectors of the stack."""
        reduction, full = self.problem.reduction, self.problem.full
        left, right = full.left[:, :count], full.right[:, :count]
        return (
            left if reduction.left is None else reduction.left @ left,
            right if reduction.right is None else reduction.right @ right,
        )

    @property
    def exact(self) -> bool:
        """Whether the curve goes down to 0."""
        return self.problem.reduction.method == "exact"

    @property
    def _partial(self) -> bool:
        return self.problem.reduction.lost2 > 0.0


def profile(
    stack: SliceStack,
    *,
    slice_ranks: Sequence[int] | None = None,
    sides: tuple[int, int] | None = None,
    widest: int | None = None,
    tolerance: float = 0.01,
    method: Method = "auto",
) -> Profile:
    """Decompose ``stack`` once.

    Parameters
    ----------
    stack : SliceStack
        K slices ΔW_k.
    slice_ranks : sequence of int, optional
        See `Profile`.
    sides : (int, int), optional
        See `Profile`.
    widest : int, optional
        Directions a side that are looked at where the exact problem is too large; the curve ends
        there. All of them if not given.
    tolerance : float
        Where the matrix-free method runs unlimited, the smallest relative error that matters.
    method : str
        As for `tucker2`.

    Returns
    -------
    Profile
        Of all sizes; of those up to ``widest`` where the exact problem is too large.
    """
    limit = None
    if widest is not None:
        p, q = stack.max_rank
        limit = min(widest, p), min(widest, q)
    reduction = reduce_stack(stack, limit, method=method, tolerance=tolerance)
    return Profile(stack, reduction, slice_ranks=slice_ranks, sides=sides)


def profile_between(
    stack: LowRankStack, left: Array, right: Array, *, slice_ranks: Sequence[int] | None = None
) -> Profile:
    """Profile of ``stack`` inside the spaces of ``left`` (m × a) and ``right`` (n × b).

    What lies outside counts as error, so that the curve stays what factors reach. The discarded
    energies of the part inside are no larger than the whole's: the bound is valid, and less sharp.
    """
    left, right = orthonormal_basis(left), orthonormal_basis(right)
    factors = [stack.factors(k) for k in range(stack.shape[0])]
    small = LowRankStack(
        [as_accumulator(left.T @ b) for b, _ in factors],
        [as_accumulator(a @ right) for _, a in factors],
    )
    norms2 = to_numpy(stack.norms2())
    lost2 = max(float(norms2.sum() - to_numpy(small.norms2()).sum()), 0.0)
    reduction = Reduction("projected", left, small, right, norms2, lost2)
    return Profile(stack, reduction, slice_ranks=slice_ranks)


def relative(part2: float, whole2: float) -> float:
    """√(part² / whole²); 0 where there is nothing."""
    return math.sqrt(max(part2, 0.0) / whole2) if whole2 else 0.0
