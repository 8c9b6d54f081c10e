"""Stopping rule: what further steps can still gain, estimated from the last two gains."""

from __future__ import annotations

FASTEST, SLOWEST = 0.5, 0.99
"""Limits of the estimated rate: two gains are too few to show a faster or a slower one."""


def still_to_come(before: float, gain: float) -> float:
    """Estimate the sum of all further gains, as a multiple of the last one.

    The gains of a linearly convergent iteration fall like a geometric series. If ρ is the ratio of
    the last two, all later gains together are ρ / (1 − ρ) times the last. A small gain alone does
    not show convergence: very many more may follow.

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
