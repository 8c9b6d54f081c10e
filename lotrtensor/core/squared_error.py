"""SquaredError: what was lost and of how much, in squares, which add up over slices and groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SquaredError:
    """A squared error beside the squared norm that it is a part of.

    Squares of disjoint parts add up, relative errors do not: sum the squares, divide once.

    Attributes
    ----------
    lost2 : float
        ‖ΔW − Δ̃W‖².
    norm2 : float
        ‖ΔW‖².

    Examples
    --------
    >>> whole = SquaredError(1.0, 4.0) + SquaredError(0.0, 12.0)
    >>> whole.relative, SquaredError(0.0, 0.0).relative
    (0.25, 0.0)
    """

    lost2: float = 0.0
    norm2: float = 0.0

    def __add__(self, other: SquaredError) -> SquaredError:
        """The error of both parts together."""
        return SquaredError(self.lost2 + other.lost2, self.norm2 + other.norm2)

    @property
    def relative(self) -> float:
        """√(lost² / norm²): 0 where nothing is lost, infinite where something is lost of nothing.

        A square that rounding has put below 0 is 0.
        """
        return float(relative_errors(self.lost2, self.norm2))


def relative_errors(lost2: np.ndarray | float, norm2: np.ndarray | float) -> np.ndarray:
    """`SquaredError.relative` of every entry of two arrays that broadcast.

    Parameters
    ----------
    lost2, norm2 : ndarray or float
        Squared errors and squared norms.
    """
    parts, wholes = np.maximum(lost2, 0.0), np.asarray(norm2)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = np.where(parts == 0.0, 0.0, np.sqrt(parts / wholes))
    return found
