"""A Tucker-2 in bits: U, V and the cores on one grid, the ranks from what their bits save.

ΔW_k ≈ U G_k Vᵀ with e_i = Σ_kj G_kij² and f_j = Σ_ki G_kij², the energies of the columns. An error
of an entry of √e_i u_i, of √f_j v_j or of G_kij costs just its square, so that one step Δ serves
them all, as it serves the terms of single slices (`lotrtensor.core.bits.terms`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lotrtensor.core.bits.gauge import equalising_rotation
from lotrtensor.core.bits.grid import column_cost, round_to_grid, round_to_width
from lotrtensor.core.bits.stream import LARGEST_CODE
from lotrtensor.core.bits.terms import slope, unit_columns
from lotrtensor.core.ranks.curve import outside2


@dataclass(frozen=True, eq=False)
class QuantisedTucker2:
    """Integer ``left`` (m × p), ``right`` (n × q) and ``core`` (K × p × q), and the ``step``.

    U and V are the columns of codes brought to norm 1, and G_k = step · core_k: no scale is stored.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 64, 4))
    >>> adapter = lt.LoraAdapter((lt.LoraModule("layers.0.q", B, A.T),), {}, np.dtype("float32"))
    >>> lt.compress(adapter, tolerance=0.1, form="lotr").groups[0].stack.shared is None
    False
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

    def slice_factors(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return B (m × c) and A (c × n) of slice ``k`` in float64, c the smaller of p and q."""
        left, right = unit_columns(self.left), unit_columns(self.right)
        core = self.step * self.core[k]
        if left.shape[1] <= right.shape[1]:
            return left, core @ right.T
        return left @ core, right.T


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


class CoreSquares(NamedTuple):
    """What prices need of K cores: Σ_k G_kij² at every place, and K.

    ``sums2`` (a × b) holds the sums, ``outside2`` what lies outside the corner that ends there.
    """

    sums2: np.ndarray
    outside2: np.ndarray
    slices: int

    @classmethod
    def of(cls, sums2: np.ndarray, slices: int) -> CoreSquares:
        """From the sums alone."""
        sums2 = np.asarray(sums2, dtype=np.float64)
        return cls(sums2, outside2(sums2), slices)

    @property
    def nothing(self) -> Corner:
        """No shared part."""
        return Corner((0, 0), 0.0, float(self.sums2.sum()))


class Corner(NamedTuple):
    """A Tucker-2 of ``ranks`` (p, q) as predicted: its bits, and the squared error it leaves."""

    ranks: tuple[int, int]
    bits: float
    lost2: float


def best_corner(
    squares: CoreSquares, sides: tuple[int, int], step: float, width: int | None = None
) -> Corner:
    """The ranks (p, q) of the least ‖error‖² + λ · bits on a grid, among all corners of the cores.

    Parameters
    ----------
    squares : CoreSquares
        Of cores between orthonormal factors whose columns come by falling energy: the HOSVD's.
    sides : (int, int)
        Shape (m, n) of a slice.
    step : float
        Δ.
    width : int, optional
        Bits of every code, where all have one width; see `predict_terms`.

    Returns
    -------
    Corner
        Of ranks (0, 0) where sharing is not worth its bits.
    """
    bits, lost2 = _corners(squares, sides, step, width)
    price = lost2 + slope(step) * bits
    if not price.size or price.min() >= squares.nothing.lost2:
        return squares.nothing
    p, q = np.unravel_index(int(np.argmin(price)), price.shape)
    return Corner((int(p) + 1, int(q) + 1), float(bits[p, q]), float(lost2[p, q]))


def corner(
    squares: CoreSquares,
    sides: tuple[int, int],
    ranks: tuple[int, int],
    step: float,
    width: int | None = None,
) -> Corner:
    """What ranks (p, q) cost and lose on a grid.

    Parameters
    ----------
    squares : CoreSquares
        As for `best_corner`.
    sides : (int, int)
        Shape (m, n) of a slice.
    ranks : (int, int)
        Ranks (p, q), or (0, 0).
    step : float
        Step Δ.
    width : int, optional
        As for `best_corner`.
    """
    p, q = ranks
    bits, lost2 = _corners(squares, sides, step, width)
    if not min(p, q) or not bits.size:
        return squares.nothing
    # Columns beyond those looked at are too small for any code, and cost next to nothing.
    place = min(p, bits.shape[0]) - 1, min(q, bits.shape[1]) - 1
    return Corner(ranks, float(bits[place]), float(lost2[place]))


def _corners(
    squares: CoreSquares, sides: tuple[int, int], step: float, width: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Bits and squared error of every corner (p, q) of the cores, at [p − 1, q − 1].

    Corners end where the columns' codes would all be zero.
    """
    sums2, beyond2, slices = squares
    norms = np.sqrt(sums2.sum(axis=1)), np.sqrt(sums2.sum(axis=0))
    deviations = [x / (math.sqrt(side) * step) for x, side in zip(norms, sides, strict=True)]
    costs = [column_cost(deviation, width) for deviation in deviations]
    p, q = (int(np.count_nonzero(cost.distortion < 1.0)) for cost in costs)
    sums2 = sums2[:p, :q]
    inside = column_cost(np.sqrt(sums2 / slices) / step, width)
    kept = np.outer(1 - costs[0].distortion[:p], 1 - costs[1].distortion[:q])
    # Sums of what is lost, not differences from what is kept: nothing cancels.
    lost2 = corner_sums(sums2 * (1 - kept * (1 - inside.distortion)))
    lost2 += beyond2[:p, :q]
    bits = slices * corner_sums(inside.bits)
    bits += np.cumsum(sides[0] * costs[0].bits[:p] + _KIND)[:, None]
    bits += np.cumsum(sides[1] * costs[1].bits[:q] + _KIND)
    return bits, lost2


def corner_sums(x: np.ndarray) -> np.ndarray:
    """Sums of the leading corner of ``x`` (a × b) at every place, with that place in it."""
    found = np.empty_like(x)
    found[:1] = x[:1]
    # Row by row: NumPy's own cumsum down the columns takes eight times as long.
    for row in range(1, x.shape[0]):
        np.add(found[row - 1], x[row], out=found[row])
    return np.cumsum(found, axis=1)


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
        first = _column_codes(left * np.sqrt(left2), step)
        second = _column_codes(right * np.sqrt(right2), step)
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
        codes = np.clip(round_to_grid(solved, step), -LARGEST_CODE, LARGEST_CODE)
    else:
        codes = round_to_width(solved.reshape(-1, 1), width).reshape(solved.shape)
        step = float(np.sum(codes * solved) / np.sum(codes * codes))
    return QuantisedTucker2(
        first.astype(np.int16), codes.astype(np.int16), second.astype(np.int16), step
    )


def _column_codes(columns: np.ndarray, step: float) -> np.ndarray:
    """Columns on a grid; those that would go beyond 16 bits on a coarser one.

    All that is kept of a column is its direction. Those of K slices reach to √K times what those of
    one do, by which the finest step is chosen.
    """
    reach = np.max(np.abs(columns), axis=0, initial=0.0) / (LARGEST_CODE * step)
    found: np.ndarray = round_to_grid(columns / np.maximum(reach, 1.0), step)
    return found
