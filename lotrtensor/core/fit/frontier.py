"""The efficient rank pairs of a stack, from one HOSVD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lotrtensor.core.arrays import as_accumulator, namespace, to_numpy
from lotrtensor.core.fit.hosvd import Hosvd
from lotrtensor.core.ranks.curve import Frontier, efficient_pairs, energies_outside
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack


def frontier(
    stack: SliceStack,
    full: Hosvd,
    shape: tuple[int, int, int],
    *,
    lost2: float = 0.0,
    slice_ranks: Sequence[int] | None = None,
) -> Frontier:
    """Efficient rank pairs of ``stack``, from one HOSVD.

    Parameters
    ----------
    stack : SliceStack
        The small stack that ``full`` belongs to.
    full : Hosvd
        All its mode singular vectors.
    shape : (int, int, int)
        (K, m, n) of the stack that parameters are counted for.
    lost2 : float
        Squared error already made by going over to the small stack.
    slice_ranks : sequence of int, optional
        Ranks r_k; see `tucker2_parameters`.
    """
    energy = core_energy(stack, full)
    error2 = energies_outside(energy) + lost2
    return efficient_pairs(error2, float(energy.sum()) + lost2, shape, slice_ranks)


def core_energy(stack: SliceStack, full: Hosvd) -> np.ndarray:
    """Σ_k of the squared entries of the cores UᵀΔW_kV (a × b), U and V those of ``full``.

    Thin factors give one core at a time: all K of them can be larger than the factors by far.
    """
    parts = [stack]
    if isinstance(stack, LowRankStack):
        parts = [stack.take([k]) for k in range(stack.shape[0])]
    energy = np.zeros((full.left.shape[1], full.right.shape[1]))
    for part in parts:
        core = as_accumulator(part.core(full.left, full.right))
        energy += to_numpy(namespace(core).sum(core * core, axis=0))
    return energy
