"""Matrix-free block iteration: U and V from a few passes over the slices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from array_api_compat import device

from lotrtensor.core.arrays import Array, as_accumulator, namespace, to_numpy
from lotrtensor.core.fit.convergence import still_to_come
from lotrtensor.core.linalg import leading_eigenvectors, orthonormal_basis
from lotrtensor.core.stacks.protocol import SliceStack


class Iteration(NamedTuple):
    """Orthonormal blocks and the small problem between them.

    ``left`` (m × b), ``right`` (n × c) and ``core`` UᵀΔW_k V (K × b × c, float64 where the library
    has it); ``norms2`` are ‖ΔW_k‖² (K), ``captured`` the energy that the wanted ranks hold of the
    core after every pass over the slices, and ``converged`` whether it had stalled.
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

    @property
    def core_norm2(self) -> float:
        """Energy ‖core‖² of the whole blocks."""
        return float(namespace(self.core).sum(self.core * self.core))


def block_iteration(
    stack: SliceStack,
    columns: tuple[int, int],
    rank: tuple[int, int] | None = None,
    *,
    rtol: float = 1e-4,
    max_passes: int = 30,
    seed: int = 0,
    start: tuple[Array, Array] | None = None,
) -> Iteration:
    """Find blocks U (m × b) and V (n × c) that capture nearly the most energy Σ_k ‖UᵀΔW_k V‖².

    From a random start, every pass takes both blocks one step of subspace iteration on the Gram
    matrix that the other one projects,

        U ← orth(Σ_k (ΔW_k V)(ΔW_k V)ᵀ U),   V ← orth(Σ_k (ΔW_kᵀ U)(ΔW_kᵀ U)ᵀ V),

    and returns the core between the blocks that it started from, by which convergence is judged.

    Parameters
    ----------
    stack : SliceStack
        Any stack; only `SliceStack.sweep` is asked for.
    columns : (int, int)
        Columns of the blocks (b, c): the ranks wanted and some more, which speeds convergence.
    rank : (int, int), optional
        Ranks (p, q) whose captured energy decides when to stop, by default all of the block's.
        Columns beyond them need not have converged.
    rtol : float
        Stop when further passes, extrapolated from the last two gains, would lower the squared
        error by less than this share of it.
    max_passes : int
        Stop here in any case.
    seed : int
        Of the random start; the same seed gives the same result.
    start : (array, array), optional
        Narrower blocks to start from, beside random columns.

    Notes
    -----
    Cost of a pass: about 4 ρ (m + n) b flops for thin factors, 4 K m n b for whole slices.
    Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithm 4.4, on both sides at once.
    """
    _, m, n = stack.shape
    rng = np.random.default_rng(seed)
    left = _random_block(stack, rng, m, columns[0], start and start[0])
    right = _random_block(stack, rng, n, columns[1], start and start[1])
    captured: list[float] = []
    while True:
        left, right = orthonormal_basis(left), orthonormal_basis(right)
        sweep = stack.sweep(left, right)
        core = as_accumulator(sweep.core)
        captured.append(_leading_energy(core, rank or columns))
        norms2 = to_numpy(sweep.norms2)
        floor = float(namespace(left).finfo(left.dtype).eps) * float(norms2.sum())
        done = stalled(captured, float(norms2.sum()), rtol, floor)
        if done or len(captured) == max_passes:
            return Iteration(left, right, core, norms2, tuple(captured), done)
        left, right = sweep.left, sweep.right


def _leading_energy(core: Array, rank: tuple[int, int]) -> float:
    """Energy that ranks (p, q) hold of the core: left eigenvectors first, then right ones."""
    xp, (_, b, c), (p, q) = namespace(core), core.shape, rank
    if p < b:
        gram = xp.sum(core @ xp.matrix_transpose(core), axis=0)
        core = leading_eigenvectors(gram, p).T @ core
    if q < c:
        gram = xp.sum(xp.matrix_transpose(core) @ core, axis=0)
        return float(xp.sum(xp.linalg.eigvalsh(gram)[c - q :]))
    return float(xp.sum(core * core))


def stalled(captured: list[float], norm2: float, rtol: float, floor: float) -> bool:
    """Whether further passes would gain less than ``rtol`` of the error, or less than rounding."""
    if len(captured) < 3:  # the first gain is from a random start, and a rate needs two
        return False
    before, gain = np.diff(captured[-3:]).tolist()
    error2 = max(norm2 - captured[-1], 0.0)
    # The larger of two: on a flat spectrum gains go up and down.
    promise = max(before, gain) * still_to_come(before, gain)
    return bool(gain <= floor or promise <= rtol * error2)


def _random_block(
    stack: SliceStack, rng: np.random.Generator, rows: int, columns: int, start: Array | None
) -> Array:
    like = stack.empty()
    xp = namespace(like)
    drawn = np.float64 if like.dtype == xp.float64 else np.float32
    missing = columns - (0 if start is None else start.shape[1])
    block = rng.standard_normal((rows, missing), dtype=drawn)
    random = xp.asarray(block, dtype=like.dtype, device=device(like))
    return random if start is None else xp.concat([start, random], axis=1)
