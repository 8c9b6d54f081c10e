"""One sentence from the numbers, which never hides a better alternative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lotrtensor.analysis.rows import Choice, Kind

ENOUGH = 0.3
"""Largest relative error that is recommended: nine tenths of the squared norm are kept."""


class Advice(NamedTuple):
    """The sentence, and the choice that it names first; None where no size keeps enough."""

    text: str
    choice: Choice | None


def recommend(choices: Sequence[Choice], source_bytes: int) -> Advice:
    """Name the best choice at the smallest size that keeps enough, and the best of other families.

    The best is the representation with the smallest error there, whichever it is; beside it stand
    the best LoTR and the best truncated LoRA. What was measured counts for what was predicted.

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
            "no size tried keeps nine tenths of the squared norm: this adapter is not "
            "redundant in the Frobenius norm; measure the task before shrinking it",
            None,
        )
    # A measured row comes after the predicted one of its representation, and replaces it. Of the
    # forms in bits the compressed one is made of the others, and is the one that is measured.
    parts = (Kind.TERMS_IN_BITS, Kind.SHARED_IN_BITS)
    best = {c.kind: c for c in choices if c.budget == size and c.kind not in parts}
    rows = sorted(best.values(), key=lambda choice: choice.relative_error)
    return Advice(_sentence(rows, source_bytes), rows[0])


def recommended_size(choices: Sequence[Choice]) -> float | None:
    """The smallest share of the bytes at which some representation keeps enough."""
    return min((c.budget for c in choices if c.relative_error <= ENOUGH), default=None)


def _sentence(rows: Sequence[Choice], source_bytes: int) -> str:
    best = rows[0]
    ratio = source_bytes / best.bytes
    parts = [f"{best.representation}: {ratio:.1f} × smaller, error {best.relative_error:.2g}"]
    for family in ("truncated LoRA", "LoTR"):
        if family == best.kind.family:
            continue
        other = next((row for row in rows if row.kind.family == family), None)
        if other is None:
            parts.append(f"{family} does not get down to that size")
        else:
            error = f"{other.relative_error:.2g}"
            parts.append(f"{other.representation} reaches {error} at that size")
    return "; ".join(parts)
