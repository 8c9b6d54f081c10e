"""When an iteration has converged: what further steps promise, from the last two gains."""

from __future__ import annotations

FASTEST, SLOWEST = 0.5, 0.99
"""Rates of the gains that are believed: two gains are too few to tell of faster or slower ones."""


def still_to_come(before: float, gain: float) -> float:
    """Sum of all further gains over the last one.

    Gains of a linearly convergent iteration fall like a geometric series. With the rate ρ that the
    last two tell, what remains is ρ / (1 − ρ) times the last: a small gain alone may be one of
    very many.

    Parameters
    ----------
    before, gain : float
        The last two gains.

    Returns
    -------
    float
        The quotient ρ / (1 − ρ) with ρ = gain / before, kept between `FASTEST` and `SLOWEST`.
    """
    rate = min(max(gain / before, FASTEST), SLOWEST) if before > 0 else FASTEST
    return rate / (1 - rate)
