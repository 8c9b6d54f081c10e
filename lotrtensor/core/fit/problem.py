"""A stack gone over to its small problem: solved at any ranks, measured once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from lotrtensor.core.arrays import as_accumulator, namespace, to_numpy
from lotrtensor.core.fit.frontier import frontier
from lotrtensor.core.fit.hosvd import hosvd
from lotrtensor.core.fit.reduction import Reduction
from lotrtensor.core.fit.residual import error_norms2, relate_errors
from lotrtensor.core.fit.solve import Solution, solve
from lotrtensor.core.ranks.curve import Frontier, cheapest_within, pair_at
from lotrtensor.core.ranks.tolerance import settle
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.core.tucker2 import Tucker2


@dataclass(frozen=True, eq=False)
class Tucker2Fit:
    """A decomposition with its certificate.

    Attributes
    ----------
    tucker2 : Tucker2
        The decomposition; U and V orthonormal, columns by descending captured energy.
    relative_error : float
        √(Σ_k ‖ΔW_k − U G_k Vᵀ‖² / Σ_k ‖ΔW_k‖²), from residuals, of what is returned.
    lower_bound : float
        No Tucker-2 of these ranks has a smaller ``weighted_error``.
    slice_errors : ndarray (K,)
        ‖ΔW_k − U G_k Vᵀ‖ / ‖ΔW_k‖ of each slice; 0 for a zero slice kept exactly.
    method : str
        The algorithm that ran: exact, matrix-free, hosvd or st-hosvd.
    iterations : int
        HOOI sweeps, over the small problem or, two passes each, over the slices.
    passes : int
        Passes over the slices that the reduction took; 0 for the exact one.
    history : tuple of float
        Relative (weighted) error after each pass of block iteration, then after each sweep, as
        estimated from the captured energy.
    converged : bool
        Whether the stopping rules were met; if not, `tucker2` also warned.
    weighted_error : float
        √(Σ_k w_k² ‖ΔW_k − U G_k Vᵀ‖² / Σ_k w_k² ‖ΔW_k‖²), which was minimised; equal to
        ``relative_error`` where no weights were given.
    """

    tucker2: Tucker2
    relative_error: float
    lower_bound: float
    slice_errors: np.ndarray
    method: str
    iterations: int
    history: tuple[float, ...]
    converged: bool
    passes: int = 0
    weighted_error: float = 0.0


class Problem:
    """A stack gone over to its small problem, ready to be solved at any ranks.

    Parameters
    ----------
    stack : SliceStack
        The slices ΔW_k.
    scales : ndarray (K,) or None
        Slice weights.
    reduction : Reduction
        The small problem of the weighted slices.
    dtype : dtype
        Type of what is returned.
    """

    def __init__(
        self, stack: SliceStack, scales: np.ndarray | None, reduction: Reduction, dtype: Any
    ) -> None:
        self.stack, self.scales, self.reduction, self.dtype = stack, scales, reduction, dtype
        self.full = hosvd(reduction.small)

    def curve(self, slice_ranks: Sequence[int] | None = None) -> Frontier:
        """Efficient rank pairs, from the one HOSVD; for ``slice_ranks`` see `frontier`."""
        return frontier(
            self.reduction.small,
            self.full,
            self.stack.shape,
            lost2=self.reduction.lost2,
            slice_ranks=slice_ranks,
        )

    def lower_bound(self, rank: tuple[int, int]) -> float:
        """Relative (weighted) error that no decomposition of ``rank`` goes below."""
        norm2 = self.reduction.norm2
        lost2 = max(float(self.full.lower_bound2(rank)), self.reduction.discarded2)
        return math.sqrt(lost2 / norm2) if norm2 else 0.0

    def solve(self, rank: tuple[int, int]) -> Solution:
        """Decompose the small problem at ``rank``."""
        reduction = self.reduction
        return solve(
            reduction.small, self.full, rank, norm2=reduction.norm2, method=reduction.method
        )

    def error2(self, solution: Solution) -> float:
        """Squared (weighted) error of ``solution`` against the whole stack."""
        found = Tucker2(solution.left, solution.core, solution.right)
        inside = float(to_numpy(error_norms2(self.reduction.small, found)).sum())
        return inside + self.reduction.lost2

    def finish(self, solution: Solution) -> Tucker2Fit:
        """Expand ``solution``, round it to the type wanted, and measure what is returned."""
        found = self._rounded(solution)
        errors2 = to_numpy(error_norms2(self.stack, found))
        weights2 = np.ones(len(errors2)) if self.scales is None else self.scales**2
        weighted_norms2 = self.reduction.norms2
        relative_error, slice_errors = relate_errors(errors2, weighted_norms2 / weights2)
        weighted_error, _ = relate_errors(errors2 * weights2, weighted_norms2)
        return Tucker2Fit(
            tucker2=found,
            relative_error=relative_error,
            # A bound that rounding has put above an error that was reached is that error.
            lower_bound=min(self.lower_bound(found.rank), weighted_error),
            slice_errors=slice_errors,
            method=self.reduction.method,
            iterations=self.reduction.sweeps + solution.sweeps,
            history=self.reduction.history + solution.history,
            converged=solution.converged and self.reduction.converged,
            passes=self.reduction.passes,
            weighted_error=weighted_error,
        )

    def fit_within(self, tolerance: float) -> Tucker2Fit:
        """Decompose with the fewest parameters found whose error is at most ``tolerance``.

        The HOSVD's curve gives a pair that holds, and its bounds the pairs that cannot; between
        them HOOI decides, by bisection along the curve.

        Raises
        ------
        RankError
            If no pair holds, or rounding to the storage type alone exceeds the tolerance.
        """
        curve = self.curve()
        norm2, last = self.reduction.norm2, len(curve.parameters) - 1

        def attempt(target2: float) -> tuple[Tucker2Fit, float, float, bool]:
            index, solution = self._cheapest(curve, target2)
            fit = self.finish(solution)
            return fit, self.error2(solution), fit.weighted_error**2 * norm2, index == last

        return settle(tolerance, norm2, self.dtype, attempt)

    def _cheapest(self, curve: Frontier, target2: float) -> tuple[int, Solution]:
        """Index and solution of the smallest pair found within ``target2``; else the full ranks."""
        high = cheapest_within(curve, target2)
        best = self.solve(pair_at(curve, high))
        low = -1 if curve.error2[high] <= target2 else high - 1
        while high - low > 1:
            middle = (low + high) // 2
            found, pair = None, pair_at(curve, middle)
            if self.lower_bound(pair) ** 2 * self.reduction.norm2 <= target2:
                found = self.solve(pair)
            if found is not None and self.error2(found) <= target2:
                high, best = middle, found
            else:
                low = middle
        return high, best

    def _rounded(self, small: Solution) -> Tucker2:
        left, right, core = self.reduction.left, self.reduction.right, small.core
        if self.scales is not None:
            core = (
                core
                * namespace(core).asarray(1.0 / self.scales, dtype=core.dtype, device=device(core))[
                    :, None, None
                ]
            )
        return Tucker2(
            small.left if left is None else as_accumulator(left) @ small.left,
            core,
            small.right if right is None else as_accumulator(right) @ small.right,
        ).astype(self.dtype)
