"""The small problem at given ranks: factors, cores and how they were reached."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from lotrtensor.core.arrays import Array, namespace
from lotrtensor.core.fit import tuning
from lotrtensor.core.fit.hooi import Hooi, hooi
from lotrtensor.core.fit.hosvd import Hosvd
from lotrtensor.core.linalg import leading_left
from lotrtensor.core.stacks.protocol import SliceStack

Solver = Literal["hooi", "hosvd", "st-hosvd"]


class Solution(NamedTuple):
    """Orthonormal U (m × p), V (n × q) and cores (K × p × q) of a small stack.

    Columns come by descending captured energy. ``history`` holds the relative error after each of
    the ``sweeps``, as estimated from the captured energy.
    """

    left: Array
    core: Array
    right: Array
    sweeps: int
    history: tuple[float, ...]
    converged: bool


def solve(
    small: SliceStack,
    full: Hosvd,
    rank: tuple[int, int],
    *,
    norm2: float,
    solver: Solver = "hooi",
) -> Solution:
    """Decompose ``small`` at ``rank``.

    Parameters
    ----------
    small : SliceStack
        The small stack.
    full : Hosvd
        All its mode singular vectors.
    rank : (int, int)
        (p, q).
    norm2 : float
        Σ_k ‖ΔW_k‖².
    solver : str
        ``"hosvd"`` truncates both bases, ``"st-hosvd"`` takes the right one after the left has
        projected (Vannieuwenhoven, Vandebril, Meerbergen, SIAM J. Sci. Comput. 34 (2012)),
        ``"hooi"`` refines the HOSVD by HOOI.
    """
    left, right = full.left[:, : rank[0]], full.right[:, : rank[1]]
    sweeps, converged = 0, True
    history: tuple[float, ...] = ()
    if solver == "st-hosvd":
        right, _ = leading_left(small.right_factor(left), rank[1], squared=False)
    elif solver == "hooi" and norm2 > 0.0 and not rank == small.shape[1:] == small.max_rank:
        # A Gram matrix loses energies below 1e-16 of the whole, which are far below this error.
        squared = float(full.lower_bound2(rank)) > 1e-8 * norm2
        found = _refine(small, left, right, rank, norm2, squared)
        left, right, sweeps, converged = found.left, found.right, found.sweeps, found.converged
        history = tuple(math.sqrt(e) for e in found.history)
    left, core, right = order_columns(left, small.core(left, right), right)
    return Solution(left, core, right, sweeps, history, converged)


def _refine(
    small: SliceStack,
    left: Array,
    right: Array,
    rank: tuple[int, int],
    norm2: float,
    squared: bool,
) -> Hooi:
    """HOOI from the HOSVD's V; where sweeps are cheap, to a tighter tolerance and from U as well.

    The better of the two results is kept, so that transposing the stack changes nothing.
    """
    if max(small.shape[1:]) > tuning.CHEAP:
        return hooi(small, right, rank, norm2=norm2, squared=squared)
    options: dict[str, Any] = {"norm2": norm2, "squared": squared, "rtol": tuning.CHEAP_RTOL}
    from_right = hooi(small, right, rank, **options)
    turned = hooi(_Transposed(small), left, (rank[1], rank[0]), **options)
    if turned.history[-1] < from_right.history[-1]:
        return turned._replace(left=turned.right, right=turned.left)
    return from_right


class _Transposed:
    """A stack with left and right exchanged, as far as HOOI asks."""

    def __init__(self, stack: SliceStack) -> None:
        self._stack = stack

    def left_factor(self, right: Array | None = None) -> Array:
        return self._stack.right_factor(right)

    def right_factor(self, left: Array | None = None) -> Array:
        return self._stack.left_factor(left)

    def residual_norms2(self, left: Array, right: Array) -> Array:
        return self._stack.residual_norms2(right, left)


def order_columns(left: Array, core: Array, right: Array) -> tuple[Array, Array, Array]:
    """Rotate U and V so that their columns come by descending captured energy.

    The cores' mode Gram matrices become diagonal: the leading columns are then good factors of
    every smaller rank, and Σ_k G_k² summed over (p, q) is the energy captured there.
    """
    xp = namespace(core)
    slices, p, q = core.shape
    rows = xp.reshape(xp.permute_dims(core, (1, 0, 2)), (p, slices * q))
    columns = xp.reshape(xp.permute_dims(core, (2, 0, 1)), (q, slices * p))
    turn_left, _ = leading_left(rows, p, squared=False)
    turn_right, _ = leading_left(columns, q, squared=False)
    return left @ turn_left, turn_left.T @ core @ turn_right, right @ turn_right
