"""Many cases in one process."""

from __future__ import annotations

from collections import Counter

from tests.fuzz.seeds import seeds
from tests.fuzz.target import Failure, one, workplace

USED = 20
"""One case of so many is not read alone, but inspected, compared, converted and written as well."""


def structured(first: int, runs: int) -> tuple[Counter[str], list[str]]:
    """Run cases ``first`` to ``first + runs − 1`` in this process."""
    counts: Counter[str] = Counter()
    failures = []
    known = seeds()
    with workplace() as folder:
        for number in range(first, first + runs):
            try:
                result = one(number, known, folder, use=number % USED == 0)
                counts["results" if result else "refusals"] += 1
            except Failure as failure:
                counts["failures"] += 1
                failures.append(f"{number}: {failure}")
    return counts, failures


def share(part: tuple[int, int]) -> tuple[Counter[str], list[str]]:
    """Run the cases of one process: the first number, and how many."""
    return structured(*part)
