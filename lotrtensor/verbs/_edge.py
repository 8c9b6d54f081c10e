"""Where a function of the step crosses zero, by as few values as may be: each one takes long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

NEAREST = 1e-5
"""Steps nearer than this share are one."""

CLOSE = 2e-4
"""How far below zero is as good as zero: a fiftieth of a hundredth of a size or an error."""


def edge(function: Callable[[float], float], marks: Sequence[float]) -> float:
    """Return a step as far along ``marks`` as may be at which a function is at most zero.

    Parameters
    ----------
    function : callable
        It rises along the marks, with jumps where it likes.
    marks : sequence of float
        Positive steps, rising or falling; which of them the step is between is found first, so that
        a function that keeps its values is asked for few that it has not.

    Returns
    -------
    float
        A step at which the function is at most zero: between ``-CLOSE`` and 0, or within
        ``NEAREST`` of one at which it is above. The last mark where it is at most zero even there,
        the first where it is so nowhere.

    Notes
    -----
    Between two marks the rule of false position with the halving of Illinois (Dowell and Jarratt,
    BIT 11 (1971)), in the logarithm of the step, and the middle where two steps did not halve what
    is between.
    """
    first, last = 0, len(marks) - 1
    low, high = function(marks[first]), function(marks[last])
    if high <= 0.0:
        return marks[last]
    if low > 0.0:
        return marks[first]
    while last - first > 1:
        middle = (first + last) // 2
        found = function(marks[middle])
        if found <= 0.0:
            first, low = middle, found
        else:
            last, high = middle, found
    return _between(function, (marks[first], low), (marks[last], high))


def _between(
    function: Callable[[float], float], inside: tuple[float, float], outside: tuple[float, float]
) -> float:
    """`edge` between two steps with their values, of which the first is at most zero."""
    (start, low), (end, high) = inside, outside
    below, above, before, slow = low, high, 0.0, 0
    while abs(span := math.log(end / start)) > NEAREST and low < -CLOSE:
        step = start * math.exp(span * (0.5 if slow > 1 else below / (below - above)))
        found = function(step)
        # The value at an end that stays while the other one moves twice counts half.
        if found <= 0.0:
            start, low, below, above = step, found, found, above / 2 if before < 0.0 else above
        else:
            end, above, below = step, found, below / 2 if before > 0.0 else below
        # A bracket that does not halve twice has a jump in it, which no line meets.
        slow = slow + 1 if slow < 2 and abs(math.log(end / start)) > abs(span) / 2 else 0
        before = -1.0 if found <= 0.0 else 1.0
    return start


def over(value: float, limit: float) -> float:
    """How far a size or an error is above a limit, on a scale on which steps are about straight."""
    if value <= 0.0 or limit <= 0.0:
        return 1.0 if value > limit else -1.0
    return math.log(value) - math.log(limit)
