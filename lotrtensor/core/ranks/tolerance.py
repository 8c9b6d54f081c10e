"""The fit that meets a tolerance once it is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from lotrtensor.errors import RankError

Fit = TypeVar("Fit")


def settle(
    tolerance: float,
    norm2: float,
    dtype: Any,
    attempt: Callable[[float], tuple[Fit, float, float, bool]],
) -> Fit:
    """Return the first fit whose relative error as stored is at most ``tolerance``.

    What is stored is rounded, which takes its share of the error; ranks have to make room for it.

    Parameters
    ----------
    tolerance : float
        Relative error that is not exceeded.
    norm2 : float
        Squared norm that it refers to.
    dtype : dtype
        Type of what is stored, for the message.
    attempt : callable
        ``attempt(target2)`` fits within the squared error ``target2``, at full ranks where that is
        out of reach, and returns the fit, its squared error before and after rounding, and
        whether its ranks are full.

    Raises
    ------
    RankError
        If even full ranks exceed the tolerance once they are stored.
    """
    limit2 = target2 = tolerance**2 * norm2
    while True:
        fit, fitted2, stored2, full = attempt(target2)
        if stored2 <= limit2:
            return fit
        if full:
            raise RankError(
                f"tolerance is {tolerance}; the smallest error in reach is "
                f"{float(np.sqrt(stored2 / norm2)):.3g} as stored in "
                f"{getattr(dtype, '__name__', dtype)}: choose a wider dtype or a larger tolerance"
            )
        # Rounding costs about as much again next time; where it does not, go on down all the same.
        target2 = max(0.0, min(limit2 - (stored2 - fitted2), 0.8 * fitted2))
