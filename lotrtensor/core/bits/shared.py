"""A Tucker-2 in bits: U, V and the cores on one grid, the ranks from what their bits save.

ΔW_k ≈ U G_k Vᵀ with e_i = Σ_kj G_kij² and f_j = Σ_ki G_kij², the energies of the columns. An error
of an entry of √e_i u_i, of √f_j v_j or of G_kij costs just its square, so that one step Δ serves
them all, as it serves the terms of single slices (`lotrtensor.core.bits.terms`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lotrtensor.core.bits.gauge import equalising_rotation
from lotrtensor.core.bits.grid import column_cost, round_to_grid, round_to_width
from lotrtensor.core.bits.terms import slope, unit_columns


@dataclass(frozen=True, eq=False)
class QuantisedTucker2:
    """Integer ``left`` (m × p), ``right`` (n × q) and ``core`` (K × p × q), and the ``step``.

    U and V are the columns of codes brought to norm 1, and G_k = step · core_k: no scale is stored.
    """

    left: np.ndarray
    core: np.ndarray
    right: np.ndarray
    step: float

    @property
    def rank(self) -> tuple[int, int]:
        """Left and right rank (p, q)."""
        return self.left.shape[1], self.right.shape[1]

    def factors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return U (m × p), G (K × p × q) and V (n × q) in float64."""
        return unit_columns(self.left), self.step * self.core, unit_columns(self.right)


def core_kinds(left: np.ndarray, right: np.ndarray, slices: int) -> np.ndarray:
    """Kind of the K codes of every place of the cores (p × q), told by the factors' codes alone.

    The squared norms of the columns of codes are e_i / Δ² and f_j / Δ². The cores' entries at
    (i, j) have about the mean square e_i f_j / (K Σ e), as if rows and columns were independent;
    a kind is the logarithm of that (see `lotrtensor.core.bits.stream.kinds_of`).
    """
    left2 = np.sum(np.square(left, dtype=np.float64), axis=0)
    right2 = np.sum(np.square(right, dtype=np.float64), axis=0)
    squares = np.outer(left2, right2) / (slices * max(float(left2.sum()), 1.0))
    with np.errstate(divide="ignore"):
        return np.clip(np.round(np.log2(squares)), -8, 60).astype(np.int8)


def best_ranks(
    core: np.ndarray, sides: tuple[int, int], step: float, width: int | None = None
) -> tuple[int, int]:
    """Ranks (p, q) of the least ‖error‖² + λ · bits on a grid, among all corners of the cores.

    Parameters
    ----------
    core : ndarray (K, a, b)
        Cores between orthonormal factors whose columns come by falling energy: the HOSVD's.
    sides : (int, int)
        Shape (m, n) of a slice.
    step : float
        Δ.
    width : int, optional
        Bits of every code, where all have one width; see `predict_terms`.

    Returns
    -------
    (int, int)
        (0, 0) where sharing is not worth its bits.
    """
    bits, saved2 = _corners(core, sides, step, width)
    gain = saved2 - slope(step) * bits
    place = int(np.argmax(gain))
    if gain.flat[place] <= 0.0:
        return 0, 0
    p, q = np.unravel_index(place, gain.shape)
    return int(p) + 1, int(q) + 1


def predict_tucker2(
    core: np.ndarray,
    sides: tuple[int, int],
    ranks: tuple[int, int],
    step: float,
    width: int | None = None,
) -> tuple[float, float]:
    """Return the bits of ranks (p, q) on a grid, and the squared norm that they keep.

    Parameters
    ----------
    core : ndarray (K, a, b)
        As for `best_ranks`.
    sides : (int, int)
        Shape (m, n) of a slice.
    ranks : (int, int)
        Ranks (p, q), or (0, 0).
    step : float
        Step Δ.
    width : int, optional
        As for `best_ranks`.
    """
    if not min(ranks):
        return 0.0, 0.0
    bits, saved2 = _corners(core, sides, step, width)
    place = ranks[0] - 1, ranks[1] - 1
    return float(bits[place]), float(saved2[place])


def _corners(
    core: np.ndarray, sides: tuple[int, int], step: float, width: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Bits and squared norm kept (a × b) of every corner (p, q) of the cores, at [p − 1, q − 1]."""
    entries2 = np.sum(core**2, axis=0)
    left, right = np.sqrt(entries2.sum(axis=1)), np.sqrt(entries2.sum(axis=0))
    (m, n), slices = sides, core.shape[0]
    costs = [
        column_cost(x / (math.sqrt(side) * step), width) for x, side in ((left, m), (right, n))
    ]
    inside = column_cost(np.sqrt(entries2 / slices) / step, width)
    kept = (1 - costs[0].distortion)[:, None] * (1 - costs[1].distortion) * (1 - inside.distortion)
    saved2 = np.cumsum(np.cumsum(entries2 * kept, axis=0), axis=1)
    bits = slices * np.cumsum(np.cumsum(inside.bits, axis=0), axis=1)
    bits += np.cumsum(m * costs[0].bits + _KIND)[:, None] + np.cumsum(n * costs[1].bits + _KIND)
    return bits, saved2


_KIND = 8
"""Bits of a column beside its codes."""


def quantise_tucker2(
    left: np.ndarray, core: np.ndarray, right: np.ndarray, step: float, width: int | None = None
) -> QuantisedTucker2 | None:
    """Round a Tucker-2 with orthonormal factors; None where nothing is left of it.

    The cores are solved for anew between the rounded factors, G_k = U⁺ ΔW_k (Vᵀ)⁺, before they are
    rounded themselves.

    Parameters
    ----------
    left, core, right : ndarray (m, p), (K, p, q), (n, q)
        U, G and V, the columns by falling energy.
    step : float
        Δ of the grid.
    width : int, optional
        Bits of every code instead; the columns are then turned so that all have one energy.
    """
    left2, right2 = np.sum(core**2, axis=(0, 2)), np.sum(core**2, axis=(0, 1))
    if width is None:
        first = round_to_grid(left * np.sqrt(left2), step)
        second = round_to_grid(right * np.sqrt(right2), step)
    else:
        first = round_to_width(left @ equalising_rotation(left2), width)
        second = round_to_width(right @ equalising_rotation(right2), width)
    kept, also = first.any(axis=0), second.any(axis=0)
    if not kept.any() or not also.any():
        return None
    first, second = first[:, kept], second[:, also]
    inverse, other = np.linalg.pinv(unit_columns(first)), np.linalg.pinv(unit_columns(second))
    solved = (inverse @ left) @ core @ (other @ right).T
    if width is None:
        codes = round_to_grid(solved, step)
    else:
        codes = round_to_width(solved.reshape(-1, 1), width).reshape(solved.shape)
        step = float(np.sum(codes * solved) / np.sum(codes * codes))
    return QuantisedTucker2(
        first.astype(np.int16), codes.astype(np.int16), second.astype(np.int16), step
    )
