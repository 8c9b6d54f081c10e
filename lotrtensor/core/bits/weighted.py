"""A stack in bits under metrics: terms that keep what a model's outputs are made of.

Inputs x of a layer have the second moment S = E x xᵀ, and gradients g of the outputs with respect
to what the layer gives C = E g gᵀ. An error E of its update then costs, to second order and for x
and g that do not depend on each other,

    E (gᵀ E x)² = tr(Eᵀ C E S)

(Martens and Grosse, "K-FAC", arXiv 1503.05671), where the plain norm has C = S = I. The terms
σ p qᵀ of an update that are orthogonal in this metric are the SVD of C^½ ΔW S^½, taken back; a term
is kept where it takes more off than its bits do elsewhere, as in `lotrtensor.core.bits.terms`, and
both its columns are rounded with error feedback (`lotrtensor.core.bits.feedback`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.bits.feedback import Feedback
from lotrtensor.core.bits.grid import column_cost
from lotrtensor.core.bits.metric import Metric
from lotrtensor.core.bits.stack import (
    FLOAT16,
    FLOAT32,
    Parts,
    Prediction,
    QuantisedStack,
    StackInBits,
)
from lotrtensor.core.bits.terms import (
    HALF,
    TERM_BITS,
    QuantisedTerms,
    independent,
    lost2,
    slope,
    unit_columns,
)
from lotrtensor.core.stacks.low_rank import LowRankStack


class Metrics(NamedTuple):
    """C and S of one slice: ``outputs`` on its columns (m), ``inputs`` on its rows (n)."""

    outputs: Metric
    inputs: Metric

    def norm2(self, b: np.ndarray, a: np.ndarray) -> float:
        """Squared norm tr((BA)ᵀ C (BA) S) of thin factors B (m × c) and A (c × n)."""
        return float(np.sum((self.outputs.root(b) @ self.inputs.root(a.T).T) ** 2))


class _Slice(NamedTuple):
    """A slice B A in terms that are orthogonal in its metrics.

    ``left`` and ``right`` are the columns as they are rounded, for a step of one size for all;
    ``values`` the singular values in the metrics; ``gain`` is that of the metric on ``right``.
    """

    b: np.ndarray
    a: np.ndarray
    metrics: Metrics
    left: np.ndarray
    values: np.ndarray
    right: np.ndarray
    gain: float

    @classmethod
    def of(
        cls, b: np.ndarray, a: np.ndarray, metrics: Metrics, gains: tuple[float, float]
    ) -> _Slice:
        """Turn the factors into terms p_j σ_j q_jᵀ with pᵀCp = qᵀSq = 1."""
        first, second = metrics.outputs.root(b), metrics.inputs.root(a.T)
        u, values, vt = np.linalg.svd(first @ second.T, full_matrices=False)
        # B A = (B T⁻¹) (T T'ᵀ) (T'⁻ᵀ A) for the triangles T and T'.
        p, q = b @ np.linalg.pinv(first) @ u, a.T @ np.linalg.pinv(second) @ vt.T
        left, right = (np.sqrt(gain) * values for gain in gains)
        return cls(b, a, metrics, p * left, values, q * right, gains[1])

    def kept(self, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which terms are worth keeping, the bits of all, and the error² that each leaves."""
        sides = np.array([len(self.b), self.a.shape[1]], dtype=float)
        squares = [np.mean(side**2, axis=0) for side in (self.left, self.right)]
        deviations = np.sqrt(np.stack(squares, axis=1))
        cost = column_cost(deviations / step, None)
        bits = np.sum(sides * cost.bits, axis=1) + TERM_BITS
        left2 = np.sum(sides * cost.distortion * deviations**2, axis=1)
        lost = np.minimum(left2, self.values**2)
        return self.values**2 - lost > slope(step) * bits, bits, lost

    def solved(self, codes: np.ndarray) -> np.ndarray:
        """Right columns that go best with left ones in codes, for the same step."""
        if not codes.shape[1]:
            return np.zeros((self.a.shape[1], 0))
        weighted = self.metrics.outputs.times(codes)
        gram = codes.T @ weighted
        # Y = ΔWᵀ C P (PᵀCP)⁻¹, whatever S is.
        found = np.linalg.lstsq(gram, (weighted.T @ self.b) @ self.a, rcond=None)[0].T
        scaled: np.ndarray = found * np.sqrt(np.diag(gram) * self.gain)
        return scaled

    def terms(self, codes: np.ndarray, turned: np.ndarray) -> QuantisedTerms:
        """The terms of left and right columns in codes, with values of the least error."""
        some = turned.any(axis=0)
        if not some.any():
            return QuantisedTerms.empty(len(self.b), self.a.shape[1])
        first, second = codes[:, some].astype(np.int16), turned[:, some].astype(np.int16)
        return QuantisedTerms(first, self._fitted(first, second), second)

    def _fitted(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The t of the least error of P diag(t) Qᵀ: one linear system of size c."""
        p, q = unit_columns(first), unit_columns(second)
        left, right = self.metrics.outputs.times(p), self.metrics.inputs.times(q)
        inner = np.sum((left.T @ self.b) * (self.a @ right).T, axis=1)
        found: np.ndarray = np.linalg.lstsq((p.T @ left) * (q.T @ right), inner, rcond=None)[0]
        return found

    def lost2(self, terms: QuantisedTerms) -> float:
        """Squared error in the metrics."""
        b, a = terms.factors()
        return self.metrics.norm2(np.hstack([self.b, -b]), np.vstack([self.a, a]))


class WeightedStackInBits(StackInBits):
    """A stack of thin factors, decomposed once for all steps under the metrics of its slices.

    Parameters
    ----------
    stack : LowRankStack
        K slices ΔW_k.
    metrics : sequence of Metrics
        Of every slice.
    """

    def __init__(self, stack: LowRankStack, metrics: Sequence[Metrics]) -> None:
        super().__init__(stack, "private")
        pairs = [
            [to_numpy(x).astype(np.float64) for x in stack.factors(k)] for k in range(len(metrics))
        ]
        self._outputs = Feedback([own.outputs for own in metrics])
        self._inputs = Feedback([own.inputs for own in metrics])
        gains = zip(self._outputs.gains.tolist(), self._inputs.gains.tolist(), strict=True)
        self._slices = [
            _Slice.of(b, a, own, both)
            for (b, a), own, both in zip(pairs, metrics, gains, strict=True)
        ]

    @property
    def reach(self) -> float:
        """Largest norm of a column that is rounded."""
        sides = [side for own in self._slices for side in (own.left, own.right)]
        return max(float(np.max(np.linalg.norm(side, axis=0))) for side in sides)

    @property
    def weighted_norm2(self) -> float:
        """Squared norm of all slices in their metrics."""
        return float(sum(np.sum(own.values**2) for own in self._slices))

    def weighted_lost2(self, found: QuantisedStack) -> float:
        """Squared error of a stack in the metrics."""
        return sum(own.lost2(t) for own, t in zip(self._slices, found.private, strict=True))

    def _predicted(self, step: float) -> dict[Parts, Prediction]:
        bits, lost = 0.0, 0.0
        for own in self._slices:
            keep, every, left = own.kept(step)
            bits += float(every[keep].sum())
            lost += float(np.where(keep, left, own.values**2).sum())
        return {"private": Prediction(bits, lost, (0, 0))}

    def quantise(
        self, step: float, value_dtype: np.dtype = FLOAT16
    ) -> tuple[QuantisedStack, float]:
        """Return the stack on a grid of this step, and its plain ‖error‖².

        Left columns are rounded, then right ones solved for anew, then the values of the terms.
        """
        lefts = [own.left[:, own.kept(step)[0]] for own in self._slices]
        codes = [independent(left) for left in self._outputs.round(lefts, step)]
        rights = [own.solved(left) for own, left in zip(self._slices, codes, strict=True)]
        turned = self._inputs.round(rights, step)
        found = [
            own.terms(first, second)
            for own, first, second in zip(self._slices, codes, turned, strict=True)
        ]
        # Terms that are orthogonal in the metric have larger values than singular ones.
        values = np.abs(np.concatenate([terms.values for terms in found]))
        if values.size and not HALF[0] < values.min() <= values.max() < HALF[1]:
            value_dtype = FLOAT32
        private = tuple(terms.rounded(value_dtype) for terms in found)
        lost = sum(lost2(svd, terms) for svd, terms in zip(self.svds, private, strict=True))
        return QuantisedStack(None, private, value_dtype), lost
