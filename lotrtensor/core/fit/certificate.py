"""Tucker2Fit: a decomposition with its certificate, measured as it is returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.residual import error_norms2
from lotrtensor.core.squared_error import SquaredError, relative_errors
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

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> fit = lt.tucker2(lt.LowRankStack(B, A), rank=4)
    >>> fit.method, fit.converged, fit.lower_bound <= fit.relative_error
    ('exact', True, True)
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


def certify(reduced: ReducedStack, pair: tuple[int, int], dtype: Any) -> Tucker2Fit:
    """Decompose at ``pair``, round to ``dtype``, and measure what is returned against the stack."""
    found, reduction = reduced.tucker2(pair, dtype), reduced.reduction
    solution = reduced.solve(pair)
    errors2 = to_numpy(error_norms2(reduced.stack, found))
    weights2 = np.ones(len(errors2)) if reduced.weights is None else reduced.weights**2
    norms2 = reduced.norms2 / weights2
    weighted = SquaredError(float((errors2 * weights2).sum()), reduced.norm2).relative
    bound = SquaredError(reduced.lower_bound2(found.rank), reduced.norm2).relative
    return Tucker2Fit(
        tucker2=found,
        relative_error=SquaredError(float(errors2.sum()), float(norms2.sum())).relative,
        # A bound that rounding has put above an error that was reached is that error.
        lower_bound=min(bound, weighted),
        slice_errors=relative_errors(errors2, norms2),
        method=reduction.kind if reduced.solver == "hooi" else reduced.solver,
        iterations=reduction.sweeps + solution.sweeps,
        history=reduction.history + solution.history,
        converged=reduced.converged(pair),
        passes=reduction.passes,
        weighted_error=weighted,
    )
