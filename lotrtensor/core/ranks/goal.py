"""What a caller may ask for: a rank pair, a tolerance or a size, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lotrtensor.core.options import shown
from lotrtensor.errors import RankError

Rank = int | tuple[int, int]

UNLIMITED = (2**63 - 1, 2**63 - 1)
"""Largest rank pair where every group has a limit of its own."""


@dataclass(frozen=True)
class Goal:
    """What was asked for; exactly one of the three is given, the others are None.

    Attributes
    ----------
    rank : (int, int) or None
        Left and right rank (p, q).
    tolerance : float or None
        Relative error, in (0, 1), that what is stored does not exceed.
    parameters : int or None
        Stored numbers at most.
    """

    rank: tuple[int, int] | None = None
    tolerance: float | None = None
    parameters: int | None = None


def make_goal(
    rank: Rank | None = None,
    tolerance: float | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    *,
    largest: tuple[int, int] = UNLIMITED,
    size: str = "parameters",
) -> Goal:
    """Return the one goal given.

    Parameters
    ----------
    rank, tolerance, energy, parameters : optional
        What the user gave. An energy e, the share of the squared norm to keep, is a tolerance of
        √(1 − e).
    largest : (int, int)
        Ranks that are not exceeded.
    size : str
        What the user calls the argument that ``parameters`` come from.

    Raises
    ------
    RankError
        If none or more than one is given, or it is out of range.
    """
    options = {"rank": rank, "tolerance": tolerance, "energy": energy, size: parameters}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise RankError(
            f"{' and '.join(given) or 'nothing'} given; expected exactly one of "
            f"{', '.join(options)}"
        )
    if rank is not None:
        return Goal(rank=check_rank(rank, largest))
    name, value = given[0], options[given[0]]
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise RankError(f"{name} is {shown(value)}; expected a number")
    if isinstance(value, float | np.floating) and math.isnan(value):
        raise RankError(f"{name} is not a number")
    if parameters is not None:
        return Goal(parameters=parameters)
    if not 0.0 < value < 1.0:
        raise RankError(f"{name} is {shown(value)}; expected a number between 0 and 1")
    return Goal(tolerance=float(value if energy is None else math.sqrt(1.0 - energy)))


def check_rank(rank: Rank, largest: tuple[int, int] = UNLIMITED) -> tuple[int, int]:
    """Return ``rank`` as a pair (p, q).

    Raises
    ------
    RankError
        If it is no pair of integers between 1 and ``largest``.
    """
    pair = (rank, rank) if not isinstance(rank, Sequence) else tuple(rank)
    integers = all(isinstance(r, int | np.integer) and not isinstance(r, bool) for r in pair)
    if len(pair) != 2 or not integers:
        raise RankError(f"rank is {shown(rank)}; expected an integer or a pair (p, q)")
    if min(pair) < 1:
        raise RankError(f"rank is {shown(rank)}; expected at least 1")
    if pair[0] > largest[0] or pair[1] > largest[1]:
        raise RankError(
            f"rank is (p, q) = {shown(pair)}; this stack has at most "
            f"({largest[0]}, {largest[1]}) independent directions: choose no more than that"
        )
    return int(pair[0]), int(pair[1])
