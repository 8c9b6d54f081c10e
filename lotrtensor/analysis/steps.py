"""The slider's stops: LoTR by type at one rank, from 1 up to the size of the adapter itself."""

from __future__ import annotations

from collections.abc import Sequence

from lotrtensor.analysis.representations import Lotr, Representation
from lotrtensor.analysis.rows import Step

STOPS = 40
"""Ranks of the slider, at most."""


def steps(lotr: Lotr, others: Sequence[Representation], source_parameters: int) -> tuple[Step, ...]:
    """One step per rank, with the same size shared out by energy and the alternatives at it."""
    ranks = _ranks(lotr, source_parameters)
    one_rank = [[group.nearest((rank, rank)) for group in lotr.groups] for rank in ranks]
    sizes = [lotr.point(pairs).parameters for pairs in one_rank]
    shared = [lotr.pairs_within(size) or pairs for size, pairs in zip(sizes, one_rank, strict=True)]
    found = []
    points = zip(
        ranks, sizes, lotr.adapter_points(one_rank), lotr.adapter_points(shared), strict=True
    )
    for rank, size, same, best in points:
        reached = [(other.name, other.within(size)) for other in others]
        errors = {name: point.relative_error for name, point in reached if point}
        found.append(Step(rank, same, best, errors))
    return tuple(found)


def _ranks(lotr: Lotr, source_parameters: int) -> list[int]:
    """Ranks that make the adapter no larger, and few enough to choose from."""
    largest = max(max(group.largest) for group in lotr.groups)
    useful = [1]
    for rank in _round_numbers(largest):
        pairs = [group.nearest((rank, rank)) for group in lotr.groups]
        if rank > 1 and lotr.point(pairs).parameters <= source_parameters:
            useful.append(rank)
    if len(useful) <= STOPS:
        return useful
    last = len(useful) - 1
    return [useful[round(i * last / (STOPS - 1))] for i in range(STOPS)]


def _round_numbers(largest: int) -> list[int]:
    """1, 2, …, 32, then 40, 48, 56, 64, 80, …: eight to a doubling from there on."""
    found, step = list(range(1, min(largest, 32) + 1)), 4
    while found[-1] < largest:
        step = max(4, 2 ** (found[-1].bit_length() - 1) // 8)
        found.append(min(found[-1] + step, largest))
    return found
