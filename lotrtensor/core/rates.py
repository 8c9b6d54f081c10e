"""What every size would cost and keep: rate–distortion curves and spectra, as frozen rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.fit.hosvd import hosvd
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import reduce_stack
from lotrtensor.core.fit.tucker2_fit import Method, check_method
from lotrtensor.core.linalg import singular_values
from lotrtensor.core.operands import Operand, as_stack
from lotrtensor.core.options import check_integer, check_number, shown
from lotrtensor.core.ranks.curve import pair_at
from lotrtensor.core.ranks.terms import rank_one_terms, truncation_error, uniform_ranks
from lotrtensor.core.slice_svd import slice_spectra
from lotrtensor.core.squared_error import relative_errors
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.errors import OptionError


class RatePoint(NamedTuple):
    """One efficient pair of ranks.

    ``parameters`` are stored numbers, m p + n q + K p q. ``relative_error`` is that of the
    truncated HOSVD; a fit at these ranks lies between ``lower_bound`` and it.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.rate_distortion(np.ones((3, 4, 5)))[0].parameters  # p = q = 1
    12
    """

    p: int
    q: int
    parameters: int
    relative_error: float
    lower_bound: float


class SizePoint(NamedTuple):
    """A representation without ranks of its own: stored numbers and relative Frobenius error."""

    parameters: int
    relative_error: float


class Spectra(NamedTuple):
    """Singular values of a stack's two unfoldings (falling), and norm of every slice (K)."""

    left: np.ndarray
    right: np.ndarray
    norms: np.ndarray


def rate_distortion(
    stack: Operand,
    *,
    slice_ranks: Sequence[int] | None = None,
    tolerance: float = 0.01,
    method: Method = "auto",
) -> tuple[RatePoint, ...]:
    """Return the efficient frontier of ``stack``: size against error, from one decomposition.

    Parameters
    ----------
    stack : SliceStack, Tucker2, array (K, m, n) or list of pairs (B_k, A_k)
        K slices ΔW_k.
    slice_ranks : sequence of int, optional
        Ranks r_k of the slices: a core then costs min(p q, r_k (p + q)), as it is stored.
    tolerance : float
        Where the matrix-free method runs, the smallest relative error that matters.
    method : str
        As for `tucker2`.

    Returns
    -------
    tuple of RatePoint
        By rising parameters and falling error; no pair of ranks beats one of them in both.

    Notes
    -----
    In the bases of the HOSVD the energy that ranks (p, q) keep is the sum of Σ_k G_k² over the
    p × q corner, so that cumulative sums price all pairs at once.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> curve = lt.rate_distortion(lt.LowRankStack(B, A))
    >>> curve[0][:3], curve[-1][:3]
    ((1, 1, 54), (8, 8, 656))
    """
    stack = as_stack(stack)
    kind, _ = check_method(method)
    tolerance = check_number(tolerance, "tolerance")
    if slice_ranks is not None:
        slice_ranks = _check_slice_ranks(slice_ranks, stack.shape[0])
    reduction = reduce_stack(stack, kind=kind, tolerance=tolerance)
    reduced = ReducedStack(stack, reduction, slice_ranks=slice_ranks)
    return rate_points(reduced, range(len(reduced.curve.parameters)))


def _check_slice_ranks(slice_ranks: Sequence[int], slices: int) -> list[int]:
    if not isinstance(slice_ranks, Sequence) or len(slice_ranks) != slices:
        raise OptionError(f"slice_ranks is {shown(slice_ranks)}; expected {slices}, one per slice")
    return [check_integer(r, f"rank of slice {k}", 1) for k, r in enumerate(slice_ranks)]


def rate_points(reduced: ReducedStack, points: Iterable[int]) -> tuple[RatePoint, ...]:
    """Rows of a curve at ``points`` of it."""
    pairs = [pair_at(reduced.curve, point) for point in points]
    return tuple(
        RatePoint(*pair, reduced.parameters(pair), *(e.relative for e in reduced.truncated(pair)))
        for pair in pairs
    )


def truncated_lora_curve(stacks: Sequence[LowRankStack], *, optimal: bool) -> tuple[SizePoint, ...]:
    """Size against error of per-slice truncated LoRA, the alternative to sharing factors.

    Parameters
    ----------
    stacks : sequence of LowRankStack
        All groups of an adapter.
    optimal : bool
        Ranks by energy per parameter over all slices; else one rank for all.

    Returns
    -------
    tuple of SizePoint
        By rising parameters. Uniform: one point per rank. Optimal: one per rank-1 term, from rank 1
        everywhere on.
    """
    spectra = [values for stack in stacks for values in slice_spectra(stack)]
    costs = [stack.shape[1] + stack.shape[2] for stack in stacks for _ in range(stack.shape[0])]
    return truncation_curve(spectra, costs, optimal=optimal)


def truncation_curve(
    spectra: Sequence[np.ndarray], costs: Sequence[int], *, optimal: bool
) -> tuple[SizePoint, ...]:
    """`truncated_lora_curve` from the slices' singular values and the cost m + n of a term each."""
    if not optimal:
        most = max(len(values) for values in spectra)
        points = []
        for rank in range(1, most + 1):
            ranks = uniform_ranks(spectra, rank)
            parameters = sum(c * r for c, r in zip(costs, ranks, strict=True))
            points.append(SizePoint(parameters, truncation_error(spectra, ranks)))
        return tuple(points)
    terms = rank_one_terms(spectra, costs)
    sizes = np.cumsum([sum(costs)] + [costs[k] for k, _ in terms])
    lost2 = np.concatenate([np.cumsum([value2 for _, value2 in terms][::-1])[::-1], [0.0]])
    norm2 = sum(float(np.sum(values**2)) for values in spectra)
    return tuple(
        SizePoint(int(size), float(error))
        for size, error in zip(sizes, relative_errors(lost2, norm2), strict=True)
    )


def spectra_flops(stack: LowRankStack) -> float:
    """Estimated cost of `spectra`: Gram matrices of the joined factors, and their eigenvalues."""
    _, m, n = stack.shape
    return joined_flops(m, n, sum(stack.ranks))


def joined_flops(m: int, n: int, rho: int) -> float:
    """`spectra_flops` of thin factors of m × n slices whose ranks sum to ``rho``."""
    return sum(2.0 * side * rho * min(side, rho) + 2.0 * min(side, rho) ** 3 for side in (m, n))


def spectra(stack: SliceStack) -> Spectra:
    """Singular values of both unfoldings and norms of the slices: how much there is to share."""
    if isinstance(stack, LowRankStack):
        factors = (stack.left_factor(), stack.right_factor())
        left, right = (to_numpy(singular_values(factor)) for factor in factors)
        return Spectra(left, right, np.sqrt(to_numpy(stack.norms2())))
    _, small, _ = stack.reduce()
    found = hosvd(small)
    left, right = to_numpy(found.left_values), to_numpy(found.right_values)
    return Spectra(left, right, np.sqrt(to_numpy(small.norms2())))
