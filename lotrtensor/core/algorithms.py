"""HOSVD, ST-HOSVD and HOOI by themselves, of anything that stands for a stack.

`lotrtensor.tucker2` chooses among them and certifies what it returns. All three first replace the
stack by the small problem of the exact reduction, which has the same errors, so that thin factors
stay thin.
"""

from __future__ import annotations

from lotrtensor.core.fit import hooi as _hooi
from lotrtensor.core.fit.hooi import Hooi
from lotrtensor.core.fit.hosvd import Hosvd
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import reduce_stack
from lotrtensor.core.fit.solve import Solver
from lotrtensor.core.operands import Operand, as_stack
from lotrtensor.core.options import check_integer, check_number
from lotrtensor.core.ranks.goal import Rank, check_rank
from lotrtensor.core.tucker2 import Tucker2


def hosvd(stack: Operand) -> Hosvd:
    """Return all mode singular vectors and values of a stack.

    Parameters
    ----------
    stack : SliceStack, Tucker2, array (K, m, n) or list of pairs (B_k, A_k)
        K slices ΔW_k.

    Returns
    -------
    Hosvd
        ``left`` (m × a), ``left_values`` (a), ``right`` (n × b) and ``right_values`` (b), by
        falling value; a and b are the largest ranks that the stack can need.

    Examples
    --------
    >>> import numpy as np
    >>> from lotrtensor.core import hosvd
    >>> found = hosvd(np.ones((3, 4, 5)))
    >>> found.left.shape, found.right.shape, float(round(found.left_values[0] ** 2))
    ((4, 4), (5, 5), 60.0)
    """
    reduced = _exactly_reduced(stack)
    left, right = reduced.directions(max(reduced.largest))
    return reduced.hosvd._replace(left=left, right=right)


def st_hosvd(stack: Operand, rank: Rank) -> Tucker2:
    """Return the sequentially truncated HOSVD: V from the slices that U has projected.

    Parameters
    ----------
    stack : SliceStack, Tucker2, array (K, m, n) or list of pairs (B_k, A_k)
        K slices ΔW_k.
    rank : int or (int, int)
        Left and right rank (p, q).

    Returns
    -------
    Tucker2
        U (m × p), cores (K × p × q) and V (n × q), columns by falling captured energy.

    Raises
    ------
    RankError
        If a rank is below 1 or larger than the stack can need.

    Examples
    --------
    >>> import numpy as np
    >>> from lotrtensor.core import st_hosvd
    >>> st_hosvd(np.ones((3, 4, 5)), (1, 2)).rank
    (1, 2)
    """
    reduced = _exactly_reduced(stack, "st-hosvd")
    pair = check_rank(rank, reduced.largest)
    return reduced.tucker2(pair, reduced.dtype)


def hooi(stack: Operand, rank: Rank, *, rtol: float = 1e-6, max_sweeps: int = 500) -> Hooi:
    """Return U and V of higher-order orthogonal iteration, started from the HOSVD.

    Parameters
    ----------
    stack : SliceStack, Tucker2, array (K, m, n) or list of pairs (B_k, A_k)
        K slices ΔW_k.
    rank : int or (int, int)
        Left and right rank (p, q).
    rtol : float
        Stop when further sweeps are expected to lower the squared error by less than this share of
        it.
    max_sweeps : int
        Stop here in any case.

    Returns
    -------
    Hooi
        ``left`` (m × p) and ``right`` (n × q), orthonormal; ``sweeps``, ``history`` of squared
        errors relative to Σ_k ‖ΔW_k‖², and whether it ``converged``.

    Raises
    ------
    RankError
        If a rank is below 1 or larger than the stack can need.

    Examples
    --------
    >>> import numpy as np
    >>> from lotrtensor.core import hooi
    >>> found = hooi(np.random.default_rng(0).normal(size=(3, 4, 5)), (2, 2))
    >>> found.left.shape, found.right.shape, found.converged
    ((4, 2), (5, 2), True)
    """
    rtol = check_number(rtol, "rtol")
    max_sweeps = check_integer(max_sweeps, "max_sweeps", 1)
    reduced = _exactly_reduced(stack)
    pair = check_rank(rank, reduced.largest)
    if reduced.norm2 == 0.0:
        left, right = reduced.directions(max(pair))
        return Hooi(left[:, : pair[0]], right[:, : pair[1]], 0, (), True)
    found = _hooi.hooi(
        reduced.reduction.small,
        reduced.hosvd.right[:, : pair[1]],
        pair,
        norm2=reduced.norm2,
        squared=False,
        rtol=rtol,
        max_sweeps=max_sweeps,
    )
    left, right = reduced.reduction.expand(found.left, found.right)
    return found._replace(left=left, right=right)


def _exactly_reduced(stack: Operand, solver: Solver = "hooi") -> ReducedStack:
    slices = as_stack(stack)
    return ReducedStack(slices, reduce_stack(slices, kind="exact"), solver=solver)
