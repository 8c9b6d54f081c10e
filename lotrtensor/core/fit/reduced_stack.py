"""ReducedStack: a stack with its small problem, which can be solved at any ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import device

from lotrtensor.core.arrays import Array, as_accumulator, namespace, to_numpy
from lotrtensor.core.fit.hosvd import Hosvd, hosvd
from lotrtensor.core.fit.reduction import Reduction, reduce_stack
from lotrtensor.core.fit.residual import error_norms2
from lotrtensor.core.fit.solve import Solution, Solver, solve
from lotrtensor.core.ranks.curve import (
    Frontier,
    efficient_pairs,
    outside2,
    pair_at,
    tucker2_parameters,
)
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.core.tucker2 import Tucker2

Pair = tuple[int, int]


class ReducedStack:
    """A stack, its reduction and the HOSVD of the small problem: errors at every pair of ranks.

    Parameters
    ----------
    stack : SliceStack or Tucker2
        K slices ΔW_k.
    reduction : Reduction
        The small problem of the slices, weighted where there are weights.
    weights : ndarray (K,), optional
        One number w_k per slice; all errors except those of a `Tucker2Fit` refer to w_k ΔW_k.
    slice_ranks : sequence of int, optional
        Ranks r_k of the slices: a core then costs min(p q, r_k (p + q)), as it is stored.
    solver : str
        See `solve`.

    Attributes
    ----------
    shape : (int, int, int)
        Number of slices and the shape of one: (K, m, n).
    dtype : dtype
        Type that a decomposition of the stack comes back in; the widest one for a Tucker2.
    """

    def __init__(
        self,
        stack: SliceStack | Tucker2,
        reduction: Reduction,
        *,
        weights: np.ndarray | None = None,
        slice_ranks: Sequence[int] | None = None,
        solver: Solver = "hooi",
    ) -> None:
        self._stack: SliceStack | Tucker2 | None = stack
        self.shape: tuple[int, int, int] = stack.shape
        self.dtype: Any = (reduction.small if isinstance(stack, Tucker2) else stack).dtype
        self.reduction, self.weights = reduction, weights
        self.slice_ranks, self.solver = slice_ranks, solver
        self._solutions: dict[Pair, Solution] = {}
        self._errors2: dict[Pair, float] = {}

    @property
    def stack(self) -> SliceStack | Tucker2:
        """The slices."""
        if self._stack is None:
            raise TypeError("the slices have been let go of")
        return self._stack

    def drop_slices(self) -> None:
        """Let go of the slices, which nothing but certificates and parts ask for."""
        self._stack = None

    @property
    def norms2(self) -> np.ndarray:
        """‖ΔW_k‖² (K)."""
        return self.reduction.norms2

    @property
    def norm2(self) -> float:
        """Σ_k ‖ΔW_k‖²."""
        return self.reduction.norm2

    @property
    def exact(self) -> bool:
        """Whether the small problem is equal to the stack, so that the curve goes down to 0."""
        return self.reduction.kind == "exact"

    @cached_property
    def hosvd(self) -> Hosvd:
        """All mode singular vectors and values of the small problem."""
        return hosvd(self.reduction.small)

    @cached_property
    def core_sums2(self) -> np.ndarray:
        """Σ_k G_kij² (a × b) of the cores between the bases of the HOSVD."""
        found: np.ndarray = sum(self._cores2(), np.zeros(()))
        return found

    @cached_property
    def truncated2(self) -> np.ndarray:
        """Squared error of the truncated HOSVD of ranks (p, q) at [p − 1, q − 1] (a × b)."""
        return outside2(self.core_sums2) + self.reduction.lost2

    @cached_property
    def curve(self) -> Frontier:
        """Efficient rank pairs, with the errors of the truncated HOSVD; HOOI only lowers them."""
        return efficient_pairs(self.truncated2, self.norm2, self.shape, self.slice_ranks)

    @property
    def full(self) -> Pair:
        """The ranks of the smallest error in reach."""
        return pair_at(self.curve, -1)

    def parameters(self, pair: Pair) -> int:
        """Stored numbers of a Tucker-2 of ranks ``pair``."""
        return int(tucker2_parameters(self.shape, *pair, self.slice_ranks))

    @property
    def largest(self) -> Pair:
        """Largest left and right rank of the small problem."""
        return self.hosvd.left.shape[1], self.hosvd.right.shape[1]

    def nearest(self, pair: Pair) -> Pair:
        """Ranks ``pair``, limited to the largest that the small problem has."""
        return min(pair[0], self.largest[0]), min(pair[1], self.largest[1])

    def lower_bound2(self, pair: Pair) -> float:
        """Lower bound on the squared error of any decomposition of ranks ``pair``."""
        return max(float(self.hosvd.lower_bound2(pair)), self.reduction.discarded2)

    def lower_bounds2(self) -> np.ndarray:
        """`lower_bound2` at every point of the curve."""
        values = (self.hosvd.left_values, self.hosvd.right_values)
        tails = [np.cumsum(np.append(to_numpy(v), 0.0)[::-1] ** 2)[::-1] for v in values]
        p, q = self.curve.ranks.T
        discarded2 = self.reduction.discarded2
        bounds2: np.ndarray = np.maximum(np.maximum(tails[0][p], tails[1][q]), discarded2)
        return bounds2

    def truncated(self, pair: Pair) -> tuple[SquaredError, SquaredError]:
        """Error of the truncated HOSVD of ranks ``pair``, and what no fit goes below."""
        error2 = float(self.truncated2[pair[0] - 1, pair[1] - 1])
        bound2 = min(self.lower_bound2(pair), error2)
        return SquaredError(error2, self.norm2), SquaredError(bound2, self.norm2)

    def slices_truncated2(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Squared error of every slice of the truncated HOSVD at every pair, (len(pairs), K)."""
        found = np.empty((len(pairs), self.shape[0]))
        rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T - 1
        for k, core2 in enumerate(self._cores2()):
            # Only the exact reduction holds all of a slice.
            beyond2 = max(float(self.norms2[k] - core2.sum()), 0.0)
            lost2 = beyond2 if self.reduction.lost2 else 0.0
            found[:, k] = outside2(core2)[rows, columns] + lost2
        return found

    def solve(self, pair: Pair) -> Solution:
        """Decompose the small problem at ``pair``, once."""
        if pair not in self._solutions:
            small, norm2 = self.reduction.small, self.norm2
            found = solve(small, self.hosvd, pair, norm2=norm2, solver=self.solver)
            self._solutions[pair] = found
        return self._solutions[pair]

    def error2(self, pair: Pair) -> float:
        """Squared error at ``pair``, solved, against the whole stack."""
        if pair not in self._errors2:
            found = self.solve(pair)
            tucker2 = Tucker2(found.left, found.core, found.right)
            inside2 = float(to_numpy(error_norms2(self.reduction.small, tucker2)).sum())
            self._errors2[pair] = inside2 + self.reduction.lost2
        return self._errors2[pair]

    def converged(self, pair: Pair) -> bool:
        """Whether the iterations that lead to ``pair`` met their stopping rules."""
        return self.reduction.converged and self.solve(pair).converged

    def tucker2(self, pair: Pair, dtype: Any) -> Tucker2:
        """The decomposition of the stack at ``pair``, rounded to ``dtype``."""
        solution = self.solve(pair)
        left, right = self.reduction.expand(solution.left, solution.right)
        core = solution.core
        if self.weights is not None:
            place = {"dtype": core.dtype, "device": device(core)}
            core = core * namespace(core).asarray(1.0 / self.weights, **place)[:, None, None]
        return Tucker2(left, core, right).astype(dtype)

    def directions(self, count: int) -> tuple[Array, Array]:
        """The leading ``count`` left (m × c) and right (n × c) singular vectors of the stack."""
        a, b = self.nearest((count, count))
        return self.reduction.expand(self.hosvd.left[:, :a], self.hosvd.right[:, :b])

    def part(self, members: Sequence[int], widest: Pair) -> ReducedStack:
        """The slices ``members`` of a stack of thin factors, as a reduced stack of their own.

        It is derived from the small problem of all slices, which must be exact. If it is too large
        for an exact one of its own, its ranks end at ``widest``.
        """
        stack, small = self.stack, self.reduction.small
        if not (self.exact and isinstance(stack, LowRankStack) and isinstance(small, LowRankStack)):
            raise TypeError("only an exact small problem of thin factors has parts")
        inner = reduce_stack(small.take(members), widest)
        reduction = inner.inside(self.reduction.left, self.reduction.right)
        ranks = None if self.slice_ranks is None else [self.slice_ranks[k] for k in members]
        return ReducedStack(stack.take(members), reduction, slice_ranks=ranks, solver=self.solver)

    def _cores2(self) -> Iterator[np.ndarray]:
        """Squared entries of the cores UᵀΔW_kV (a × b), U and V those of the HOSVD.

        One core at a time: all K together can take far more memory than the thin factors.
        """
        small, (left, _, right, _) = self.reduction.small, self.hosvd
        for k in range(self.shape[0]):
            if isinstance(small, LowRankStack):
                core = small.take([k]).core(left, right)[0, :, :]
            else:
                core = left.T @ small.slice(k) @ right
            yield to_numpy(as_accumulator(core)) ** 2
