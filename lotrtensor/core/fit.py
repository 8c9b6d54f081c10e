"""tucker2: the door to the decomposition. Validation, choice of method, certificate."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from lotrtensor.core.hooi import hooi
from lotrtensor.core.hosvd import hosvd
from lotrtensor.core.linalg import Array, as_accumulator, leading_left
from lotrtensor.core.residual import error_norms2
from lotrtensor.core.stacks import LowRankStack
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import LotrWarning, RankError

Rank = int | tuple[int, int]


@dataclass(frozen=True, eq=False)
class Tucker2Fit:
    """A decomposition with its certificate.

    Attributes
    ----------
    tucker2 : Tucker2
        The decomposition; U and V orthonormal, columns by descending captured energy.
    relative_error : float
        √(Σ_k ‖ΔW_k − U G_k Vᵀ‖² / Σ_k ‖ΔW_k‖²), from residuals.
    lower_bound : float
        No Tucker-2 of these ranks has a smaller relative error.
    slice_errors : ndarray (K,)
        ‖ΔW_k − U G_k Vᵀ‖ / ‖ΔW_k‖ of each slice; 0 for a zero slice kept exactly.
    method : str
        The algorithm that ran.
    iterations : int
        HOOI sweeps.
    history : tuple of float
        Relative error after each sweep, as estimated from the captured energy.
    converged : bool
        Whether the stopping rule was met; if not, `tucker2` also warned.
    """

    tucker2: Tucker2
    relative_error: float
    lower_bound: float
    slice_errors: np.ndarray
    method: str
    iterations: int
    history: tuple[float, ...]
    converged: bool


def tucker2(stack: LowRankStack, rank: Rank) -> Tucker2Fit:
    """Decompose ``stack`` as ΔW_k ≈ U · G_k · Vᵀ with U and V shared by all slices.

    Parameters
    ----------
    stack : LowRankStack
        K slices ΔW_k of shape m × n.
    rank : int or (int, int)
        Left and right rank (p, q); one number stands for both.

    Returns
    -------
    Tucker2Fit
        The decomposition in the stack's own dtype, its relative Frobenius error and a lower
        bound on the error of any decomposition of these ranks.

    Raises
    ------
    RankError
        If a rank is below 1 or larger than the stack can need.

    Warns
    -----
    LotrWarning
        If the iteration stopped before it converged.

    Notes
    -----
    QR of the factors side by side gives an equal problem of size ρ × K × ρ, ρ = Σ r_k; there HOSVD
    starts HOOI and its discarded energies bound the error from below. The dense ΔW is never built.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> fit = lt.tucker2(lt.LowRankStack(B, A), rank=(8, 8))
    >>> fit.tucker2.rank, bool(fit.relative_error < 1e-12)
    ((8, 8), True)
    """
    pair = check_rank(rank, stack.max_rank)
    basis_left, small, basis_right = stack.reduce()
    norms2 = small.norms2()
    norm2 = float(small.xp.sum(norms2))
    if norm2 == 0.0:
        return _zero_fit(stack, pair)
    full = hosvd(small)
    bound2 = float(full.lower_bound2(pair))
    fit = hooi(
        small,
        full.right[:, : pair[1]],
        pair,
        norm2=norm2,
        # Eigenvectors of a Gram matrix lose energies of 1e-16 of the whole: far below this error.
        squared=bound2 > 1e-8 * norm2,
    )
    if not fit.converged:
        warnings.warn(
            f"HOOI did not converge in {fit.sweeps} sweeps; the reported error is exact "
            "for the factors found, which may be improved",
            LotrWarning,
            stacklevel=2,
        )
    small_tucker2 = order_columns(Tucker2(fit.left, small.core(fit.left, fit.right), fit.right))
    found = Tucker2(
        as_accumulator(basis_left) @ small_tucker2.left,
        small_tucker2.core,
        as_accumulator(basis_right) @ small_tucker2.right,
    ).astype(stack.dtype)
    relative_error, slice_errors = relative_errors(stack, found)
    return Tucker2Fit(
        tucker2=found,
        relative_error=relative_error,
        # A bound that rounding has put above an error that was reached is that error.
        lower_bound=min(math.sqrt(bound2 / norm2), relative_error),
        slice_errors=slice_errors,
        method="exact",
        iterations=fit.sweeps,
        history=tuple(math.sqrt(e) for e in fit.history),
        converged=fit.converged,
    )


def check_rank(rank: Rank, largest: tuple[int, int]) -> tuple[int, int]:
    """Return ``rank`` as a pair (p, q).

    Raises
    ------
    RankError
        If it is no pair of integers between 1 and ``largest``.
    """
    pair = (rank, rank) if isinstance(rank, int) else tuple(rank)
    if len(pair) != 2 or not all(isinstance(r, int | np.integer) for r in pair):
        raise RankError(f"rank is {rank!r}; expected an integer or a pair (p, q)")
    if min(pair) < 1:
        raise RankError(f"rank is {rank}; expected at least 1")
    if pair[0] > largest[0] or pair[1] > largest[1]:
        raise RankError(
            f"rank is (p, q) = ({pair[0]}, {pair[1]}); this stack has at most "
            f"({largest[0]}, {largest[1]}) independent directions: choose no more than that"
        )
    return int(pair[0]), int(pair[1])


def relative_errors(stack: LowRankStack, found: Tucker2) -> tuple[float, np.ndarray]:
    """Relative Frobenius error of the whole stack and of each slice (K).

    A zero slice counts 0 where it is reproduced exactly and infinity where it is not.
    """
    errors2 = to_numpy(error_norms2(stack, found))
    norms2 = to_numpy(stack.norms2())
    total2 = float(norms2.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        slice_errors = np.where(errors2 == 0, 0.0, np.sqrt(errors2 / norms2))
    whole = math.sqrt(float(errors2.sum()) / total2) if total2 else float(errors2.any())
    return whole, slice_errors


def order_columns(found: Tucker2) -> Tucker2:
    """Rotate U and V so that their columns come by descending captured energy.

    The cores' mode Gram matrices become diagonal: the leading columns are then good factors of
    every smaller rank, and Σ_k G_k² summed over (p, q) is the energy captured there.
    """
    xp = found.xp
    slices, p, q = found.core.shape
    rows = xp.reshape(xp.permute_dims(found.core, (1, 0, 2)), (p, slices * q))
    columns = xp.reshape(xp.permute_dims(found.core, (2, 0, 1)), (q, slices * p))
    left, _ = leading_left(rows, p, squared=False)
    right, _ = leading_left(columns, q, squared=False)
    return Tucker2(found.left @ left, left.T @ found.core @ right, found.right @ right)


def to_numpy(x: Array) -> np.ndarray:
    """Return a small real array as NumPy float64."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    return np.asarray(x, dtype=np.float64)


def _zero_fit(stack: LowRankStack, pair: tuple[int, int]) -> Tucker2Fit:
    """The decomposition of a stack of zeros: any orthonormal factors, zero cores."""
    basis_left, small, basis_right = stack.reduce()
    left, right = basis_left[:, : pair[0]], basis_right[:, : pair[1]]
    core = small.xp.zeros((stack.shape[0], *pair), dtype=left.dtype)
    return Tucker2Fit(
        tucker2=Tucker2(left, core, right).astype(stack.dtype),
        relative_error=0.0,
        lower_bound=0.0,
        slice_errors=np.zeros(stack.shape[0]),
        method="exact",
        iterations=0,
        history=(),
        converged=True,
    )
