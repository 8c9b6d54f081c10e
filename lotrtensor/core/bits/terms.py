"""One slice in bits: rank-1 terms of its singular value decomposition on a grid.

With ΔW = Σ_i σ_i u_i v_iᵀ the columns σ_i u_i and σ_i v_i are rounded to one grid of step Δ. An
error of one entry of either costs just its square, whatever the term: the other column has norm 1.
So one step serves all columns of all slices, and a term is worth keeping where it saves more than

    λ · bits,   λ = 2 ln 2 · Δ² / 12,

λ being the squared error that one more bit takes off a column on a fine grid, −dD/dR: at one slope
for all that is kept and dropped no exchange of bits gains (Shoham and Gersho, IEEE Trans. ASSP 36
(1988)). Dropping a term is the case of no bits: rank truncation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.bits.gauge import equalising_rotation
from lotrtensor.core.bits.grid import column_cost, round_to_grid, round_to_width
from lotrtensor.core.slice_svd import SliceSvd

TERM_BITS = 32
"""Bits of a term beside its codes: the kinds of two columns and a scale of 16 bits."""

HALF = (1e-2, 6e4)
"""Between these half precision holds values to a relative 5e-4."""


@dataclass(frozen=True, eq=False)
class QuantisedTerms:
    """Rank-1 terms: integer ``left`` (m × c) and ``right`` (n × c), and a value (c) each.

    ΔW ≈ P diag(values) Qᵀ, P and Q being the columns of codes brought to norm 1.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 64, 4))
    >>> adapter = lt.LoraAdapter((lt.LoraModule("layers.0.q", B, A.T),), {}, np.dtype("float32"))
    >>> terms = lt.compress(adapter, tolerance=0.1, form="lora").groups[0].stack.private[0]
    >>> terms.rank, terms.left.dtype.kind
    (4, 'i')
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray

    @classmethod
    def empty(cls, m: int, n: int) -> QuantisedTerms:
        """No terms of an m × n slice."""
        return cls(np.zeros((m, 0), np.int16), np.zeros(0), np.zeros((n, 0), np.int16))

    @property
    def rank(self) -> int:
        """Number of terms c."""
        return len(self.values)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return B (m × c) and A (c × n) in float64, the values shared evenly."""
        root = np.sqrt(np.abs(self.values))
        left = unit_columns(self.left) * (np.sign(self.values) * root)
        return left, (unit_columns(self.right) * root).T

    def rounded(self, dtype: np.dtype) -> QuantisedTerms:
        """Return the terms with the values that ``dtype`` holds."""
        return QuantisedTerms(self.left, self.values.astype(dtype).astype(np.float64), self.right)


def unit_columns(codes: np.ndarray) -> np.ndarray:
    """The columns of codes, brought to norm 1, in float64."""
    wide = codes.astype(np.float64)
    found: np.ndarray = wide / np.linalg.norm(wide, axis=0)
    return found


def slope(step: float) -> float:
    """Squared error that a bit more takes off on a grid of this step: 2 ln 2 · step² / 12."""
    return 2.0 * math.log(2.0) * step**2 / 12.0


def predict_terms(
    values: np.ndarray, sides: np.ndarray, step: float, width: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which terms are worth keeping, and what all of them would cost and save.

    Parameters
    ----------
    values : ndarray (c,)
        Singular values σ of terms of any slices.
    sides : ndarray (c, 2)
        Shape (m, n) of the slice of each.
    step : float
        Δ.
    width : int, optional
        Bits of every code, where all have one width; the step then says what a bit is worth alone.

    Returns
    -------
    keep : ndarray (c,) of bool
        Whether rounding saves more of σ² than λ · ``bits``.
    bits : ndarray (c,)
        Bits of both columns if their entries are normal, and `TERM_BITS`.
    lost2 : ndarray (c,)
        Squared error that the rounded term leaves of σ².
    """
    values = np.asarray(values, dtype=np.float64)
    cost = column_cost(values[:, None] / (np.sqrt(sides) * step), width)
    bits = np.sum(sides * cost.bits, axis=1) + TERM_BITS
    first, second = cost.distortion.T
    # 1 − (1 − d)(1 − d') without the difference: small errors are told as such.
    lost2 = values**2 * (first + second - first * second)
    return values**2 - lost2 > slope(step) * bits, bits, lost2


def quantise_slice(svd: SliceSvd, step: float, width: int | None = None) -> QuantisedTerms:
    """Round a slice to a grid, or its columns to one width.

    The left columns are rounded first; the right ones are then solved for anew, so that they make
    good what the left ones lost, and the values of the terms last:

        Y = ΔWᵀ P (PᵀP)⁻¹,   min_t ‖ΔW − P diag(t) Qᵀ‖,

    P and Q being the unit columns of the codes of the left columns and of Y. So errors do not add
    up.

    Parameters
    ----------
    svd : SliceSvd
        The slice, ΔW = U diag(σ) Vᵀ.
    step : float
        Δ.
    width : int, optional
        Bits of every code; the columns are turned to one norm first, which suits that best
        (`lotrtensor.core.bits.gauge`).

    Returns
    -------
    QuantisedTerms
        Of rank 0 where no term is worth its bits.
    """
    left, right, values = to_numpy(svd.left), to_numpy(svd.right), svd.values
    (m, _), (n, _) = left.shape, right.shape
    sides = np.array([[m, n]] * len(values)).reshape(-1, 2)
    keep, _, _ = predict_terms(values, sides, step, width)
    if width is None:
        codes = round_to_grid(left[:, keep] * values[keep], step)
    else:
        turned = (left[:, keep] * np.sqrt(values[keep])) @ equalising_rotation(values[keep])
        codes = round_to_width(turned, width)
    codes = independent(codes)
    if not codes.shape[1]:
        return QuantisedTerms.empty(m, n)
    # Weighted by what an error of an entry costs: the norm of the column that it meets.
    solved = _solve(codes, left, values, right) * np.linalg.norm(codes, axis=0)
    turned = round_to_grid(solved, step) if width is None else round_to_width(solved, width)
    kept = turned.any(axis=0)
    first, second = codes[:, kept].astype(np.int16), turned[:, kept].astype(np.int16)
    if not kept.any():
        return QuantisedTerms.empty(m, n)
    fitted = _values(unit_columns(first), unit_columns(second), left, values, right)
    return QuantisedTerms(first, fitted, second)


def independent(codes: np.ndarray) -> np.ndarray:
    """The columns without those that are zero, or copies of others up to their sign."""
    codes = codes[:, codes.any(axis=0)]
    gram = codes.T @ codes
    kept: list[int] = []
    for i in range(codes.shape[1]):
        twins = (gram[i, j] ** 2 >= (1 - 1e-12) * gram[i, i] * gram[j, j] for j in kept)
        if not any(twins):
            kept.append(i)
    return codes[:, kept]


def _solve(
    codes: np.ndarray, left: np.ndarray, values: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Y (n × c) of the least ‖ΔW − codes · Yᵀ‖."""
    solved = np.linalg.lstsq(codes.T @ codes, codes.T @ left, rcond=None)[0]
    found: np.ndarray = right @ (solved * values).T
    return found


def _values(
    first: np.ndarray,
    second: np.ndarray,
    left: np.ndarray,
    values: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:
    """The t of the least ‖ΔW − first · diag(t) · secondᵀ‖: one linear system of size c."""
    gram = (first.T @ first) * (second.T @ second)
    inner = np.sum((first.T @ left) * values * (second.T @ right), axis=1)
    found: np.ndarray = np.linalg.lstsq(gram, inner, rcond=None)[0]
    return found


def lost2(svd: SliceSvd, terms: QuantisedTerms) -> float:
    """‖ΔW − P diag(values) Qᵀ‖², from the products of the factors alone.

    With ΔW = U Σ Vᵀ: the parts outside the spaces of U and V, and inside them the difference.
    """
    left, right = to_numpy(svd.left), to_numpy(svd.right)
    first, second = unit_columns(terms.left) * terms.values, unit_columns(terms.right)
    inside_left, inside_right = left.T @ first, right.T @ second
    outside = first - left @ inside_left
    outside_right = second - right @ inside_right
    inner = inside_left @ inside_right.T
    inner[np.diag_indices(len(svd.values))] -= svd.values
    gram = inside_left.T @ inside_left
    lost = np.sum((outside.T @ outside) * (second.T @ second))
    return float(lost + np.sum(gram * (outside_right.T @ outside_right)) + np.sum(inner**2))


def predicted_total(
    spectra: Sequence[np.ndarray],
    sides: Sequence[tuple[int, int]],
    step: float,
    width: int | None = None,
) -> tuple[float, float]:
    """Bits of all slices on a grid of this step, and the squared error that they leave."""
    values = np.concatenate(list(spectra)).astype(np.float64)
    every = np.repeat(np.array(sides, dtype=float), [len(s) for s in spectra], axis=0)
    keep, bits, lost2_ = predict_terms(values, every, step, width)
    return float(bits[keep].sum()), float(np.where(keep, lost2_, values**2).sum())
