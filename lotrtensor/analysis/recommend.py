"""One sentence from the numbers, which never hides a better alternative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lotrtensor.analysis.rows import Choice

ENOUGH = 0.5
"""Largest relative error that is recommended: three quarters of the squared norm are kept."""


class Advice(NamedTuple):
    """The sentence, and the choice that it names first; None where no size keeps enough."""

    text: str
    choice: Choice | None


def recommend(choices: Sequence[Choice], source_bytes: int) -> Advice:
    """Name the best choice at the smallest size that keeps enough, and the best of the other kind.

    The best is the representation with the smallest error there, whichever it is; the other kind
    is LoTR where that is truncated LoRA, and truncated LoRA where it is LoTR. What was measured
    counts for what was predicted.

    Parameters
    ----------
    choices : sequence of Choice
        All representations at some sizes.
    source_bytes : int
        Bytes of the adapter.
    """
    size = recommended_size(choices)
    if size is None:
        return Advice(
            "no size tried keeps three quarters of the squared norm: this adapter is not "
            "redundant in the Frobenius norm; measure the task before shrinking it",
            None,
        )
    # A measured row comes after the predicted one of its representation, and replaces it.
    best = {choice.kind: choice for choice in choices if choice.budget == size}
    rows = sorted(best.values(), key=lambda choice: choice.relative_error)
    return Advice(_sentence(rows, source_bytes), rows[0])


def recommended_size(choices: Sequence[Choice]) -> float | None:
    """The smallest share of the bytes at which some representation keeps enough."""
    return min((c.budget for c in choices if c.relative_error <= ENOUGH), default=None)


def _sentence(rows: Sequence[Choice], source_bytes: int) -> str:
    best = rows[0]
    ratio = source_bytes / best.bytes
    text = f"{best.representation}: {ratio:.1f} × smaller, error {best.relative_error:.2g}"
    other = next((row for row in rows if row.kind.shares_factors != best.kind.shares_factors), None)
    if other is None:
        kind = "truncated LoRA" if best.kind.shares_factors else "LoTR"
        return f"{text}; {kind} does not get down to that size"
    return f"{text}; {other.representation} reaches {other.relative_error:.2g} at that size"
