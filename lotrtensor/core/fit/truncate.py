"""truncate_tucker2: a Tucker-2 decomposition rounded to lower ranks."""

from __future__ import annotations

from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import reduce_stack
from lotrtensor.core.fit.tucker2_fit import fit_goal
from lotrtensor.core.options import check_flag
from lotrtensor.core.ranks.goal import Goal, Rank, make_goal
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import DataError


def truncate_tucker2(
    tucker2: Tucker2,
    rank: Rank | None = None,
    *,
    tolerance: float | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    refine: bool = True,
) -> Tucker2:
    """Round to lower ranks: orthogonalise, HOSVD of the cores, HOOI.

    Parameters
    ----------
    tucker2 : Tucker2
        The decomposition.
    rank, tolerance, energy, parameters : optional
        How far; exactly one of them, as for `lotrtensor.tucker2`. Tolerance and energy hold for
        what is returned, its type included.
    refine : bool
        Refine the truncated HOSVD by HOOI.

    Returns
    -------
    Tucker2
        In the same dtype, with orthonormal factors.

    Raises
    ------
    RankError
        If the goal is out of range or not exactly one is given, or rounding to the dtype alone
        exceeds the tolerance.

    Notes
    -----
    With QRs U = Q_U T_U and V = Q_V T_V the cores T_U G_k T_Vᵀ are an equal K × p × q problem, so
    that m and n cost two QRs each time.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> from lotrtensor.core import truncate_tucker2
    >>> truncate_tucker2(lt.tucker2(list(zip(B, A)), rank=8).tucker2, (3, 4)).rank
    (3, 4)
    """
    if not isinstance(tucker2, Tucker2):
        raise DataError(f"expected a Tucker2, found a {type(tucker2).__name__}")
    refine = check_flag(refine, "refine")
    goal = make_goal(rank, tolerance, energy, parameters, largest=tucker2.max_rank)
    return truncate_to_goal(tucker2, goal, refine=refine)


def truncate_to_goal(tucker2: Tucker2, goal: Goal, *, refine: bool = True) -> Tucker2:
    """`truncate_tucker2` where the goal is built."""
    reduction = reduce_stack(tucker2)
    reduced = ReducedStack(tucker2, reduction, solver="hooi" if refine else "hosvd")
    return fit_goal(reduced, goal, tucker2.core.dtype).tucker2
