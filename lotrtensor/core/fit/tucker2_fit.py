"""tucker2: checks its arguments, chooses method and ranks, decomposes and certifies."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lotrtensor.core.arrays import as_dtype, to_numpy
from lotrtensor.core.fit.certificate import Tucker2Fit, certify
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import reduce_stack
from lotrtensor.core.fit.solve import Solver
from lotrtensor.core.operands import Operand, as_stack
from lotrtensor.core.options import check_integer, shown
from lotrtensor.core.ranks.allocation import allocate_parameters
from lotrtensor.core.ranks.curve import pair_at
from lotrtensor.core.ranks.goal import Goal, Rank, make_goal
from lotrtensor.core.ranks.tolerance import fit_within
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.errors import DataError, LotrWarning, OptionError

Weights = Sequence[float] | Literal["equal"]


def tucker2(
    stack: Operand,
    rank: Rank | None = None,
    *,
    tolerance: float | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    weights: Weights | None = None,
    method: Method = "auto",
    dtype: Any = None,
    seed: int = 0,
    max_passes: int | None = None,
) -> Tucker2Fit:
    """Decompose ``stack`` as ΔW_k ≈ U · G_k · Vᵀ with U and V shared by all slices.

    Exactly one of ``rank``, ``tolerance``, ``energy`` and ``parameters`` says how far.

    Parameters
    ----------
    stack : SliceStack, Tucker2, array (K, m, n) or list of pairs (B_k, A_k)
        K slices ΔW_k of shape m × n; see `as_stack`.
    rank : int or (int, int), optional
        Left and right rank (p, q); one number stands for both.
    tolerance : float, optional
        Relative error, in (0, 1), that the result does not exceed; the smallest parameter count
        found is returned.
    energy : float, optional
        Share of Σ_k ‖ΔW_k‖², in (0, 1), to keep: a tolerance of √(1 − energy).
    parameters : int, optional
        Stored numbers m p + n q + K p q at most.
    weights : sequence of float, or "equal", optional
        One positive number w_k a slice: w_k ΔW_k is approximated, ``"equal"`` brings every slice
        to norm 1. Ranks chosen by tolerance, energy or parameters refer to the weighted error then.
    method : str
        ``"exact"``: an equal small problem, then HOOI from the HOSVD. ``"matrix-free"``: the small
        problem from a few passes of block iteration. ``"hosvd"``, ``"st-hosvd"``: no refinement.
        ``"auto"``: exact while that is cheap, else matrix-free.
    dtype : dtype, optional
        Type to return, and to measure the error in; the stack's own if not given.
    seed : int
        Of the random start of the matrix-free method.
    max_passes : int, optional
        Passes of the matrix-free method at most: 30 over thin factors, 5 over slices read on
        demand, for every number of columns that a tolerance tries. The error takes one more.

    Returns
    -------
    Tucker2Fit
        The decomposition, its relative Frobenius error and a lower bound on the error of any
        decomposition of these ranks.

    Raises
    ------
    RankError
        If a rank is below 1 or larger than the stack can need, a tolerance or energy lies outside
        (0, 1) or is out of reach, ``parameters`` are below the smallest decomposition, or none or
        more than one of them is given.
    OptionError
        If the weights are not K positive finite numbers, or the method, dtype, seed or max_passes
        are none.

    Warns
    -----
    LotrWarning
        If an iteration stopped before it converged.

    Notes
    -----
    Exact, for thin factors: QR of the factors side by side gives an equal problem of size
    ρ × K × ρ, ρ = Σ r_k; there HOSVD starts HOOI and its discarded energies bound the error from
    below (De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. 21 (2000)). Matrix-free, blocks
    come from subspace iteration (Halko, Martinsson, Tropp, SIAM Review 53 (2011)). Slices in memory
    are then refined at the very ranks wanted; those read on demand keep the best directions inside
    the blocks, which costs a per cent where the spectrum is flat. The bound is the exact one where
    ρ ≤ 512; else it comes from the energies that the blocks captured beyond the ranks wanted, which
    are no larger than the discarded ones: valid, and less sharp.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> fit = lt.tucker2(lt.LowRankStack(B, A), rank=(8, 8))
    >>> fit.tucker2.rank, bool(fit.relative_error < 1e-12)
    ((8, 8), True)
    """
    stack = as_stack(stack)
    if dtype is not None:
        as_dtype(stack.empty(), dtype)  # refused here, before any work
    seed = check_integer(seed, "seed", 0)
    goal = make_goal(rank, tolerance, energy, parameters, largest=stack.max_rank)
    kind, solver = check_method(method)
    if max_passes is not None:
        max_passes = check_integer(max_passes, "max_passes", 1)
    size = stack.magnitude()
    if size and not 1e-60 < size < 1e60:
        if not 1e-300 < size < 1e300:
            raise DataError(
                f"the slices have entries of about {size:.3g}, at the end of the range of their "
                "type; multiply or divide them by a number"
            )
        # Squares would leave the range of float64: fit the stack brought to size 1.
        goals: dict[str, Any] = {"tolerance": tolerance, "energy": energy}
        options: dict[str, Any] = {"weights": weights, "method": method, "dtype": dtype}
        limits: dict[str, Any] = {"seed": seed, "max_passes": max_passes}
        unit_stack = stack.scaled([1.0 / size] * stack.shape[0])
        unit = tucker2(unit_stack, rank, parameters=parameters, **goals, **options, **limits)
        return replace(unit, tucker2=unit.tucker2 * size)
    scales = slice_weights(stack, weights)
    target = stack if scales is None else stack.scaled(list(scales))
    reduction = reduce_stack(
        target,
        goal.rank,
        kind=kind,
        final=True,
        tolerance=goal.tolerance or 0.0,
        seed=seed,
        max_passes=max_passes,
    )
    reduced = ReducedStack(stack, reduction, weights=scales, solver=solver)
    fit = fit_goal(reduced, goal, dtype or stack.dtype)
    if not fit.converged:
        warnings.warn(
            f"the fit did not converge in {fit.passes} passes and {fit.iterations} sweeps; the "
            "reported error holds for the factors found, which more passes may improve",
            LotrWarning,
            stacklevel=2,
        )
    return fit


def fit_goal(reduced: ReducedStack, goal: Goal, dtype: Any) -> Tucker2Fit:
    """Decompose at the ranks that ``goal`` asks for, rounded to ``dtype`` and measured.

    Raises
    ------
    RankError
        If the goal is out of reach.
    """
    if goal.rank is not None:
        return certify(reduced, goal.rank, dtype)
    if goal.parameters is not None:
        (point,) = allocate_parameters([reduced.curve], goal.parameters)
        return certify(reduced, pair_at(reduced.curve, point), dtype)

    def store(pairs: list[tuple[int, int]]) -> tuple[Tucker2Fit, float]:
        fit = certify(reduced, pairs[0], dtype)
        return fit, fit.weighted_error**2 * reduced.norm2

    return fit_within([reduced], goal.tolerance or 0.0, reduced.norm2, dtype, store)


Kind = Literal["auto", "exact", "matrix-free"]

METHODS: dict[str, tuple[Kind, Solver]] = {
    "auto": ("auto", "hooi"),
    "exact": ("exact", "hooi"),
    "matrix-free": ("matrix-free", "hooi"),
    "hosvd": ("exact", "hosvd"),
    "st-hosvd": ("exact", "st-hosvd"),
}
"""What users call a method, and the two choices that it stands for: reduction and solver."""

Method = Literal["auto", "exact", "matrix-free", "hosvd", "st-hosvd"]


def check_method(method: str) -> tuple[Kind, Solver]:
    """Return the reduction and the solver of a method.

    Raises
    ------
    OptionError
        If there is no such method.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise OptionError(f"method is {shown(method)}; expected one of {', '.join(METHODS)}")
    return METHODS[method]


def slice_weights(stack: SliceStack, weights: Weights | None) -> np.ndarray | None:
    """Return one positive number per slice, or None.

    Raises
    ------
    OptionError
        If ``weights`` are not K positive finite numbers.
    """
    if weights is None:
        return None
    slices = stack.shape[0]
    if isinstance(weights, str):
        if weights != "equal":
            raise OptionError(f"weights is {shown(weights)}; expected numbers or 'equal'")
        norms = np.sqrt(to_numpy(stack.norms2()))
        return 1.0 / np.where(norms > 0, norms, 1.0)
    try:
        scales = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"weights are {shown(weights)}; expected {slices} numbers or 'equal'"
        ) from error
    if scales.shape != (slices,) or not (np.isfinite(scales).all() and (scales > 0).all()):
        raise OptionError(
            f"weights are {shown(weights)}; expected {slices} positive finite numbers"
        )
    if not (scales.min() > 1e-100 and scales.max() < 1e100):
        raise OptionError(
            "weights are outside 1e-100 … 1e100, where their squares lose their range"
        )
    return scales
