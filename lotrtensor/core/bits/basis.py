"""A basis that many stacks of slices share, in bits, and single slices on it.

    ΔW_k ≈ U (w_k Ḡ + G_k) Vᵀ + P_k Q_kᵀ

U, V and the mean core Ḡ are stored once; a slice has its own core G_k, its weight w_k, and private
terms of what the basis leaves of it. A slice is coded with nothing but the basis at hand, so that
others can be added later. The mean alone, U Ḡ Vᵀ, is the slice whose codes are all zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lotrtensor.core.bits.grid import round_to_grid
from lotrtensor.core.bits.shared import core_kinds
from lotrtensor.core.bits.stream import LARGEST_CODE
from lotrtensor.core.bits.terms import QuantisedTerms, lost2, quantise_slice, unit_columns
from lotrtensor.core.slice_svd import slice_svds
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import RankError


@dataclass(frozen=True, eq=False)
class QuantisedBasis:
    """Integer ``left`` (m × p), ``right`` (n × q) and ``mean`` (p × q), and the ``step``.

    U and V are the columns of codes brought to norm 1, and Ḡ = step / √slices · mean, ``slices``
    being the number of slices that the basis was made of: an error of Ḡ is one of all of them.

    Examples
    --------
    >>> import numpy as np
    >>> codes = np.array([[3], [4]], dtype=np.int16)
    >>> basis = QuantisedBasis(codes, codes[:1], np.array([[2]], dtype=np.int16), 0.5, 4)
    >>> basis.rank, basis.mean_core.tolist(), basis.factors[0].ravel().round(3).tolist()
    ((1, 1), [[0.5]], [0.6, 0.8])
    """

    left: np.ndarray
    right: np.ndarray
    mean: np.ndarray
    step: float
    slices: int

    @property
    def rank(self) -> tuple[int, int]:
        """Left and right rank (p, q)."""
        return self.left.shape[1], self.right.shape[1]

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """U (m × p) and V (n × q) in float64."""
        return unit_columns(self.left), unit_columns(self.right)

    @cached_property
    def mean_core(self) -> np.ndarray:
        """Ḡ (p × q) in float64."""
        found: np.ndarray = self.step / math.sqrt(self.slices) * self.mean.astype(np.float64)
        return found

    @cached_property
    def kinds(self) -> np.ndarray:
        """Kind of every place of a core (p × q), told by the columns' codes."""
        return core_kinds(self.left, self.right, self.slices)

    @cached_property
    def _inverses(self) -> tuple[np.ndarray, np.ndarray]:
        left, right = self.factors
        return np.linalg.pinv(left), np.linalg.pinv(right)

    def solve(self, b: np.ndarray, a: np.ndarray) -> np.ndarray:
        """The core U⁺ B A (Vᵀ)⁺ (p × q) of the least ‖B A − U core Vᵀ‖."""
        inverse, other = self._inverses
        found: np.ndarray = (inverse @ b) @ (a @ other.T)
        return found

    def core(self, codes: np.ndarray, step: float, weight: float) -> np.ndarray:
        """The whole core w Ḡ + step · codes (p × q) of a slice."""
        found: np.ndarray = weight * self.mean_core + step * codes
        return found

    def slice_factors(self, core: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return B (m × c) and A (c × n) of U · core · Vᵀ, c the smaller of p and q."""
        left, right = self.factors
        if left.shape[1] <= right.shape[1]:
            return left, core @ right.T
        return left @ core, right.T


class CodedSlice(NamedTuple):
    """A slice on a basis: its core's codes (p × q), private terms, and the squared error left."""

    codes: np.ndarray
    private: QuantisedTerms
    lost2: float


def code_slice(
    basis: QuantisedBasis,
    b: np.ndarray,
    a: np.ndarray,
    step: float,
    *,
    weight: float = 1.0,
    value_dtype: np.dtype | None = None,
    private: bool = True,
) -> CodedSlice:
    """Code a slice B A on a basis: its core on a grid, then terms of what is left.

    Parameters
    ----------
    basis : QuantisedBasis
        U, V and Ḡ.
    b, a : ndarray (m, r), (r, n)
        Thin factors of the slice; only their product matters.
    step : float
        Δ of the core and of the private columns.
    weight : float
        Weight w of the mean core: the size of the slice beside that of the slices that the basis
        was made of.
    value_dtype : dtype, optional
        Type that the terms' values are stored in; float64 if not given.
    private : bool
        False leaves the terms out.

    Returns
    -------
    CodedSlice
        Its ``lost2`` is ‖B A − U (w Ḡ + Δ codes) Vᵀ − P Qᵀ‖² of what is stored.

    Raises
    ------
    RankError
        If the step is so fine that a code does not fit into 16 bits.
    """
    b, a = b.astype(np.float64), a.astype(np.float64)
    rounded = round_to_grid(basis.solve(b, a) - weight * basis.mean_core, step)
    if float(np.max(np.abs(rounded))) > LARGEST_CODE:
        raise RankError(
            f"a step of {step:.3g} is too fine for codes of 16 bits; expected a larger one"
        )
    codes = rounded.astype(np.int16)
    left, right = basis.slice_factors(basis.core(codes, step, weight))
    rest = LowRankStack.of_constants([np.hstack([b, left])], [np.vstack([a, -right])])
    svd = slice_svds(rest)[0]
    terms = quantise_slice(svd, step) if private else QuantisedTerms.empty(*rest.shape[1:])
    if value_dtype is not None:
        terms = terms.rounded(value_dtype)
    return CodedSlice(codes, terms, lost2(svd, terms))
