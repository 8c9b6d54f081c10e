"""HOSVD: singular bases of the two unfoldings, and the certificate that they give."""

from __future__ import annotations

from typing import NamedTuple

from lotrtensor.core.arrays import Array, as_accumulator, namespace
from lotrtensor.core.linalg import leading_left
from lotrtensor.core.stacks.protocol import SliceStack


class Hosvd(NamedTuple):
    """All mode singular vectors and values of a stack, by descending value.

    ``left`` (m × a) and ``right`` (n × b) are the left singular vectors of the unfoldings
    [ΔW_1 … ΔW_K] (m × Kn) and [ΔW_1ᵀ … ΔW_Kᵀ] (n × Km); ``left_values`` (a) and
    ``right_values`` (b) their singular values.

    Examples
    --------
    >>> import numpy as np
    >>> from lotrtensor.core import hosvd
    >>> float(hosvd(np.ones((3, 4, 5))).lower_bound2((1, 1)).round(9))  # nothing beyond rank 1
    0.0
    """

    left: Array
    left_values: Array
    right: Array
    right_values: Array

    def lower_bound2(self, rank: tuple[int, int]) -> Array:
        """Squared error that no Tucker-2 of ranks (p, q) can be below.

        The larger of the two discarded energies Σ_{i>p} σ_i² and Σ_{j>q} τ_j²: a Tucker-2 has
        unfoldings of ranks p and q, and Eckart–Young bounds each. The truncated HOSVD is within
        √2 of it (De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. 21 (2000), property 10).
        """
        xp = namespace(self.left_values)
        tails = [
            xp.sum(values[rank_:] ** 2)
            for values, rank_ in zip((self.left_values, self.right_values), rank, strict=True)
        ]
        return xp.maximum(tails[0], tails[1])


def hosvd(stack: SliceStack) -> Hosvd:
    """Return all mode singular vectors and values of ``stack``.

    Each unfolding is replaced by a factor with the same Gram matrix, whose singular value
    decomposition finds a σ of 1e-10 beside one of 1, which a Gram matrix would lose.
    """
    p, q = stack.max_rank
    left, left_values = leading_left(as_accumulator(stack.left_factor()), p, squared=False)
    right, right_values = leading_left(as_accumulator(stack.right_factor()), q, squared=False)
    return Hosvd(left, left_values, right, right_values)
