"""Matrix-free block iteration: U and V from a few passes over the slices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from array_api_compat import device

from lotrtensor.core.linalg import Array, as_accumulator, namespace, orthonormal_basis, to_numpy
from lotrtensor.core.stacks import SliceStack


class Iteration(NamedTuple):
    """Orthonormal blocks and the small problem between them.

    ``left`` (m × b), ``right`` (n × c) and ``core`` UᵀΔW_k V (K × b × c, float64 where the library
    has it); ``norms2`` are ‖ΔW_k‖² (K), ``captured`` the energy ‖core‖² of every pass over the
    slices, and ``converged`` whether it had stalled.
    """

    left: Array
    right: Array
    core: Array
    norms2: np.ndarray
    captured: tuple[float, ...]
    converged: bool

    @property
    def norm2(self) -> float:
        """Σ_k ‖ΔW_k‖²."""
        return float(self.norms2.sum())


def block_iteration(
    stack: SliceStack,
    width: tuple[int, int],
    *,
    rtol: float = 1e-4,
    max_passes: int = 30,
    seed: int = 0,
) -> Iteration:
    """Find blocks U (m × b) and V (n × c) that capture nearly the most energy Σ_k ‖UᵀΔW_k V‖².

    From a random start, every pass takes both blocks one step of subspace iteration on the Gram
    matrix that the other one projects,

        U ← orth(Σ_k (ΔW_k V)(ΔW_k V)ᵀ U),   V ← orth(Σ_k (ΔW_kᵀ U)(ΔW_kᵀ U)ᵀ V),

    and yields the core between the blocks it started with, which the next pass can be judged by.

    Parameters
    ----------
    stack : SliceStack
        Any stack; only `SliceStack.sweep` is asked for.
    width : (int, int)
        Block widths (b, c): the ranks wanted and some more, which speeds convergence.
    rtol : float
        Stop when a pass lowers the squared error by less than this share of it.
    max_passes : int
        Stop here in any case.
    seed : int
        Of the random start; the same seed gives the same result.

    Notes
    -----
    Cost of a pass: about 4 ρ (m + n) b flops for thin factors, 4 K m n b for whole slices.
    Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithm 4.4, on both sides at once.
    """
    _, m, n = stack.shape
    rng = np.random.default_rng(seed)
    left = _random_block(stack, rng, m, width[0])
    right = _random_block(stack, rng, n, width[1])
    captured: list[float] = []
    while True:
        left, right = orthonormal_basis(left), orthonormal_basis(right)
        sweep = stack.sweep(left, right)
        core = as_accumulator(sweep.core)
        captured.append(float(namespace(core).sum(core * core)))
        norms2 = to_numpy(sweep.norms2)
        stalled = len(captured) > 2 and _stalled(captured, float(norms2.sum()), rtol)
        if stalled or len(captured) == max_passes:
            return Iteration(left, right, core, norms2, tuple(captured), stalled)
        left, right = sweep.left, sweep.right


def _stalled(captured: list[float], norm2: float, rtol: float) -> bool:
    # A float32 core does not show gains below 1e-7 of the whole; float64 has converged by then.
    return captured[-1] - captured[-2] <= max(rtol * (norm2 - captured[-1]), 1e-7 * norm2)


def _random_block(stack: SliceStack, rng: np.random.Generator, rows: int, columns: int) -> Array:
    like = stack.empty()
    xp = namespace(like)
    block = rng.standard_normal((rows, columns))
    return xp.asarray(block, dtype=like.dtype, device=device(like))
