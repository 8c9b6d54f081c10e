"""A lower bound on the error at given ranks that does not need the exact small problem."""

from __future__ import annotations

import math

import numpy as np

from lotrtensor.core.arrays import Array, as_accumulator, constant, namespace, to_numpy
from lotrtensor.core.fit import tuning
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack


def discarded_energy(stack: SliceStack, rank: tuple[int, int]) -> float:
    """Lower bound of the squared error of any Tucker-2 of ranks (p, q) of ``stack``.

    The larger of Σ_{i>p} σ_i² and Σ_{j>q} τ_j² over the two unfoldings (see `Hosvd.lower_bound2`),
    from the Gram matrices of their thin factors, less what rounding can have added.

    Parameters
    ----------
    stack : SliceStack
        Any stack.
    rank : (int, int)
        Left and right rank (p, q).

    Returns
    -------
    float
        0, which is always true, unless the slices are thin factors with Σ_k r_k ≤ `GRAM_SIDE`.

    Notes
    -----
    Cost 2 (m + n) ρ² flops and the eigenvalues of two ρ × ρ matrices. A tail is computed as the
    trace minus the leading eigenvalues. This cancels for relative errors below 1e-6, which are left
    to the small problem: it measures them without cancellation.
    """
    if not isinstance(stack, LowRankStack) or sum(stack.ranks) > tuning.GRAM_SIDE:
        return 0.0
    factors = (stack.left_factor(), stack.right_factor())
    return max(_tail2(factor, r) for factor, r in zip(factors, rank, strict=True))


def _tail2(factor: Array, rank: int) -> float:
    """Σ_{i>rank} σ_i² of ``factor`` (a × c), less its rounding."""
    xp = namespace(factor)
    wide = constant(as_accumulator(factor))
    tall = wide.shape[0] >= wide.shape[1]
    gram = to_numpy(wide.T @ wide if tall else wide @ wide.T)
    side = len(gram)
    if rank >= side:
        return 0.0
    leading = np.linalg.eigvalsh(gram)[side - rank :]
    whole2 = float(np.trace(gram))
    tail = math.sqrt(max(whole2 * (1 - 1e-13) - float(leading.sum()), 0.0))
    # Singular values move by no more than the norm of the factor's rounding (Mirsky).
    margin = 4 * float(xp.finfo(factor.dtype).eps) * math.sqrt(whole2)
    return max(tail - margin, 0.0) ** 2
