"""What a verb is asked for: checks the ranks and turns a budget into a number of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lotrtensor.adapters.sizes import budget_parameters
from lotrtensor.core.options import check_choice, shown
from lotrtensor.core.ranks.goal import UNLIMITED, Goal, Rank, make_goal
from lotrtensor.errors import OptionError, RankError
from lotrtensor.verbs._sources import SourceGroup

Allocation = Literal["optimal", "uniform"]


@dataclass(frozen=True)
class Asked:
    """What the user gave; see `convert`."""

    rank: Rank | None = None
    tolerance: float | None = None
    energy: float | None = None
    budget: int | str | None = None

    @property
    def nothing(self) -> bool:
        """Whether no goal is given."""
        return all(x is None for x in (self.rank, self.tolerance, self.energy, self.budget))

    def goal(
        self, itemsize: int, source_bytes: int, smallest: int, largest: tuple[int, int]
    ) -> Goal:
        """Return the one goal given, a budget as parameters.

        Parameters
        ----------
        itemsize : int
            Bytes of a number as it will be stored.
        source_bytes : int
            Bytes of what a share refers to.
        smallest : int
            Parameters of the smallest result possible.
        largest : (int, int)
            Ranks that are not exceeded.
        """
        parameters = None
        if self.budget is not None:
            parameters = budget_parameters(self.budget, itemsize, source_bytes, smallest)
        return make_goal(
            self.rank, self.tolerance, self.energy, parameters, largest=largest, size="budget"
        )


def groups_goal(asked: Asked, sources: Sequence[SourceGroup], dtype: np.dtype) -> Goal:
    """Return the goal for groups that share it.

    Raises
    ------
    RankError
        If it is out of range, or a rank is more than any group can need.
    """
    smallest = sum(source.smallest for source in sources)
    goal = asked.goal(dtype.itemsize, sum(source.bytes for source in sources), smallest, UNLIMITED)
    limits = [source.max_rank for source in sources]
    largest = max(p for p, _ in limits), max(q for _, q in limits)
    # One number stands for both sides, of which a group may need less on one.
    limit = largest if isinstance(asked.rank, Sequence) else (max(largest), max(largest))
    if goal.rank and (goal.rank[0] > limit[0] or goal.rank[1] > limit[1]):
        raise RankError(
            f"rank is {shown(asked.rank)}; no group needs more than (p, q) = {largest}: choose no "
            "more than that"
        )
    return goal


def lora_goal(
    asked: Asked,
    shapes: Sequence[tuple[int, int]],
    largest: Mapping[str, int],
    dtype: np.dtype,
    source_bytes: int,
) -> Goal:
    """Return the goal for a LoRA.

    Parameters
    ----------
    asked : Asked
        What the user gave.
    shapes : sequence of (int, int)
        (m, n) of every module: at rank 1 it needs m + n numbers.
    largest : mapping of str to int
        The rank that each module can have.
    dtype, source_bytes
        See `Asked.goal`.

    Raises
    ------
    RankError
        If it is out of range; if the rank is a pair, or more than any module can have.
    """
    rank = asked.rank
    if rank is not None and (not isinstance(rank, int | np.integer) or isinstance(rank, bool)):
        raise RankError(
            f"rank is {shown(rank)}; expected one integer, for a LoRA has one rank per module"
        )
    name, most = max(largest.items(), key=lambda item: item[1])
    if rank is not None and rank > most:
        raise RankError(
            f"rank is {shown(rank)}; the largest that a module can have is {most}, {name}'s: "
            "choose no more than that"
        )
    return asked.goal(dtype.itemsize, source_bytes, sum(map(sum, shapes)), (most, most))


def check_allocation(allocation: str, *, lora: bool) -> None:
    """Refuse an allocation that is unknown, or that is not for what is made.

    Raises
    ------
    OptionError
        If it is neither ``"optimal"`` nor ``"uniform"``, or ``"uniform"`` for a LoTR.
    """
    check_choice(allocation, "allocation", ("optimal", "uniform"))
    if allocation == "uniform" and not lora:
        raise OptionError("allocation is 'uniform', which a LoRA can have; expected 'optimal'")
