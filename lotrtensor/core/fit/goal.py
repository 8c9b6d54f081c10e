"""What a caller may ask for: a rank pair, a tolerance, an energy or a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lotrtensor.errors import RankError

Rank = int | tuple[int, int]


@dataclass(frozen=True)
class Goal:
    """What was asked for: a rank pair, a tolerance or a budget, the others None."""

    rank: tuple[int, int] | None = None
    tolerance: float | None = None
    budget: int | None = None


def check_goal(
    rank: Rank | None,
    tolerance: float | None,
    energy: float | None,
    budget: int | None,
    largest: tuple[int, int],
) -> Goal:
    """Return the one goal given.

    Raises
    ------
    RankError
        If none or more than one is given, or it is out of range.
    """
    options = {"rank": rank, "tolerance": tolerance, "energy": energy, "budget": budget}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise RankError(
            f"{' and '.join(given) or 'nothing'} given; expected exactly one of "
            "rank, tolerance, energy, budget"
        )
    if rank is not None:
        return Goal(rank=check_rank(rank, largest))
    name, value = given[0], options[given[0]]
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise RankError(f"{name} is {value!r}; expected a number")
    if math.isnan(value):
        raise RankError(f"{name} is not a number")
    for name, value in (("tolerance", tolerance), ("energy", energy)):
        if value is not None and not 0.0 < value < 1.0:
            raise RankError(f"{name} is {value}; expected a number between 0 and 1")
    if energy is not None:
        return Goal(tolerance=math.sqrt(1.0 - energy))
    return Goal(tolerance=tolerance, budget=budget)


def check_rank(rank: Rank, largest: tuple[int, int]) -> tuple[int, int]:
    """Return ``rank`` as a pair (p, q).

    Raises
    ------
    RankError
        If it is no pair of integers between 1 and ``largest``.
    """
    pair = (rank, rank) if not isinstance(rank, Sequence) else tuple(rank)
    integers = all(isinstance(r, int | np.integer) and not isinstance(r, bool) for r in pair)
    if len(pair) != 2 or not integers:
        raise RankError(f"rank is {rank!r}; expected an integer or a pair (p, q)")
    if min(pair) < 1:
        raise RankError(f"rank is {rank}; expected at least 1")
    if pair[0] > largest[0] or pair[1] > largest[1]:
        raise RankError(
            f"rank is (p, q) = ({pair[0]}, {pair[1]}); this stack has at most "
            f"({largest[0]}, {largest[1]}) independent directions: choose no more than that"
        )
    return int(pair[0]), int(pair[1])
