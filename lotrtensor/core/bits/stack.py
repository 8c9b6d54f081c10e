"""A stack in bits: a shared part, a private part, or both, whichever saves more for its bits.

    ΔW_k ≈ U G_k Vᵀ + P_k Q_kᵀ

The shared part is a Tucker-2 (`lotrtensor.core.bits.shared`), the private one a few rank-1 terms a
slice of what the shared part leaves (`lotrtensor.core.bits.terms`); either may be empty. With one
step Δ for both, and the slope λ that belongs to it, the choice is the least ‖error‖² + λ · bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.bits.common import common_spaces, part_between
from lotrtensor.core.bits.shared import (
    CoreSquares,
    Corner,
    QuantisedTucker2,
    best_corner,
    corner,
    quantise_tucker2,
)
from lotrtensor.core.bits.terms import (
    QuantisedTerms,
    lost2,
    predict_terms,
    predicted_total,
    quantise_slice,
    slope,
)
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import Reduction, reduce_stack
from lotrtensor.core.slice_svd import SliceSvd, SvdsOnDemand, slice_svds
from lotrtensor.core.stacks.low_rank import LowRankStack

FLOAT16, FLOAT32 = np.dtype("float16"), np.dtype("float32")

Parts = Literal["shared", "private", "both"]
"""What a stack may be made of; with ``"both"`` either part may turn out empty."""


@dataclass(frozen=True, eq=False)
class QuantisedStack:
    """K slices in bits.

    Attributes
    ----------
    shared : QuantisedTucker2 or None
        U, V and the cores.
    private : tuple of QuantisedTerms
        Terms of every slice; of rank 0 where there are none.
    value_dtype : dtype
        Type that the values of the terms are stored in; they are rounded to it.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 64, 4))
    >>> adapter = lt.LoraAdapter((lt.LoraModule("layers.0.q", B, A.T),), {}, np.dtype("float32"))
    >>> stack = lt.compress(adapter, tolerance=0.1, form="lora").groups[0].stack
    >>> stack.shared_ranks, [factor.shape for factor in stack.factors(0)]
    ((0, 0), [(64, 4), (4, 64)])
    """

    shared: QuantisedTucker2 | None
    private: tuple[QuantisedTerms, ...]
    value_dtype: np.dtype = FLOAT16

    @property
    def shared_ranks(self) -> tuple[int, int]:
        """Ranks (p, q) of the shared part; (0, 0) where there is none."""
        return self.shared.rank if self.shared else (0, 0)

    def factors(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return B (m × c) and A (c × n) of slice ``k`` in float64; c may be 0."""
        b, a = self.private[k].factors()
        if self.shared is None:
            return b, a
        left, right = self.shared.slice_factors(k)
        return np.hstack([left, b]), np.vstack([right, a])


class Prediction(NamedTuple):
    """What a stack costs and loses at a step: bits, squared error, ranks of the shared part."""

    bits: float
    lost2: float
    ranks: tuple[int, int]


class StackInBits:
    """A stack of thin factors, decomposed once for all steps.

    Parameters
    ----------
    stack : LowRankStack or SvdsOnDemand
        K slices ΔW_k; those that are read on demand for private parts alone.
    parts : str
        ``"shared"``, ``"private"`` or ``"both"``.
    width : int, optional
        Bits of every code; by default each column takes what its entropy asks for.
    """

    def __init__(
        self, stack: LowRankStack | SvdsOnDemand, parts: Parts, width: int | None = None
    ) -> None:
        self.shape, self.parts, self.width = stack.shape, parts, width
        self._predictions: dict[float, dict[Parts, Prediction]] = {}
        if isinstance(stack, SvdsOnDemand):
            self.svds: Sequence[SliceSvd] = stack
            self.spectra = stack.spectra
        else:
            self.stack, self.svds = stack, slice_svds(stack)
            self.spectra = [svd.values for svd in self.svds]
        self.norm2 = float(sum(np.sum(values**2) for values in self.spectra))
        if parts != "private":
            # The bases take long; they are needed only where a shared part is tried.
            reduced = self._reduced if parts == "shared" else _without_bases(self.stack)
            self.squares = CoreSquares.of(reduced.core_sums2, self.shape[0])

    def restricted(self, parts: Parts) -> StackInBits:
        """The same stack, decomposed already, of one of the parts that it may have here."""
        found = copy.copy(self)
        found.parts, found._predictions = parts, {}
        return found

    @cached_property
    def _reduced(self) -> ReducedStack:
        return ReducedStack(self.stack, reduce_stack(self.stack, kind="exact"))

    @property
    def sides(self) -> tuple[int, int]:
        """M and n."""
        return self.shape[1], self.shape[2]

    @property
    def reach(self) -> float:
        """Largest norm of a column that is rounded."""
        return max(float(values[0]) for values in self.spectra)

    def predict(self, step: float) -> Prediction:
        """Return what the better of a shared and a private part costs and loses."""
        return self.predictions(step)[self.parts]

    def predictions(self, step: float) -> dict[Parts, Prediction]:
        """Return what a shared part, a private one, and the better of them cost and lose.

        Only what the stack may be made of is there. A search for a size comes by the same steps as
        the one before it, so that what was predicted is kept.
        """
        if step not in self._predictions:
            self._predictions[step] = self._predicted(step)
        return self._predictions[step]

    def _predicted(self, step: float) -> dict[Parts, Prediction]:
        found: dict[Parts, Prediction] = {}
        if self.parts != "shared":
            sides = [self.sides] * len(self.spectra)
            bits, lost = predicted_total(self.spectra, sides, step, self.width)
            found["private"] = Prediction(bits, lost, (0, 0))
        if self.parts != "private":
            ranks, bits, lost = best_corner(self.squares, self.sides, step, self.width)
            found["shared"] = Prediction(bits, lost, ranks)
        if self.parts == "both":
            found["both"] = min(found.values(), key=lambda p: p.lost2 + slope(step) * p.bits)
        return found

    def private_slices(self, step: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the squared error (K) that private terms leave in each slice, and their number."""
        lost, kept = [], []
        for values in self.spectra:
            sides = np.broadcast_to(np.array(self.sides, dtype=float), (len(values), 2))
            keep, _, error2 = predict_terms(values, sides, step, self.width)
            lost.append(float(np.where(keep, error2, values**2).sum()))
            kept.append(int(keep.sum()))
        return np.array(lost), np.array(kept)

    def lower_bound2(self, found: QuantisedStack) -> float:
        """Lower bound on the squared error of any parts of the ranks that ``found`` has.

        With ranks (p, q) and c_k terms, slice k has rank min(p, q) + c_k at most, and the
        unfoldings [ΔW_1 … ΔW_K] and [ΔW_1ᵀ … ΔW_Kᵀ] have ranks p + Σ c_k and q + Σ c_k: what their
        leading singular values leave is out of reach (Eckart and Young, Psychometrika 1 (1936)).
        Bits are not counted: rounding is what the error has beside it.
        """
        (p, q), terms = found.shared_ranks, [own.rank for own in found.private]
        slices = zip(self.spectra, terms, strict=True)
        bounds2 = [float(sum(np.sum(values[min(p, q) + c :] ** 2) for values, c in slices))]
        if self.parts != "private":
            for axis, rank in ((1, p), (0, q)):
                # Cores between the bases of the HOSVD have the squared singular values as sums.
                bounds2.append(float(self.squares.sums2.sum(axis)[rank + sum(terms) :].sum()))
        return max(bounds2)

    def quantise(
        self, step: float, value_dtype: np.dtype = FLOAT16
    ) -> tuple[QuantisedStack, float]:
        """Return the stack on a grid of this step, and ‖error‖².

        Where both parts are allowed and a shared part alone comes near to private terms, it is
        tried at the ranks that suit it alone and at half of them, and, from the other end, between
        the directions that most slices have; the private terms are then those of what it leaves.
        """
        candidates = {(0, 0)} if self.parts != "shared" else set()
        if self.parts != "private":
            best = best_corner(self.squares, self.sides, step, self.width)
            p, q = best.ranks
            if self.parts == "shared" or self._near(step, best):
                candidates.add((p, q))
            if len(candidates) > 1:
                candidates.add((-(-p // 2), -(-q // 2)))
        found = [self._at(ranks, step, value_dtype) for ranks in sorted(candidates)]
        if self.parts == "both" and self._common is not None:
            found.append(self._between_common(step, value_dtype))
        least = min(found, key=lambda item: item[1] + slope(step) * item[2])
        return least[0], least[1]

    def of_ranks(self, ranks: tuple[int, int]) -> tuple[QuantisedStack, float]:
        """Return a shared part of these ranks in one width, and ‖error‖²."""
        found, error2, _ = self._at(ranks, 1.0, FLOAT16)  # a step is for columns without a width
        return found, error2

    def _near(self, step: float, shared: Corner) -> bool:
        """Whether this shared part may be worth its bits beside private terms."""
        alone = shared.lost2 + slope(step) * shared.bits
        best = self.predict(step)
        return alone <= NEAR * (best.lost2 + slope(step) * best.bits)

    def _at(
        self, ranks: tuple[int, int], step: float, value_dtype: np.dtype
    ) -> tuple[QuantisedStack, float, float]:
        """The stack with a shared part of these ranks, ‖error‖², and its bits as predicted."""
        shared, bits = None, 0.0
        if min(ranks):
            fit = self._reduced.tucker2(ranks, self._reduced.hosvd.left.dtype)
            left, core, right = (to_numpy(x) for x in (fit.left, fit.core, fit.right))
            shared = quantise_tucker2(left, core, right, step, self.width)
            bits = corner(self.squares, self.sides, ranks, step, self.width).bits
        return self._beside(shared, bits, step, value_dtype)

    @cached_property
    def _common(self) -> tuple[np.ndarray, np.ndarray] | None:
        return common_spaces(self.svds)

    def _between_common(
        self, step: float, value_dtype: np.dtype
    ) -> tuple[QuantisedStack, float, float]:
        """The stack with a shared part between directions that most slices have; see `_at`.

        The large terms of the slices reach into these directions too: their own part is taken off
        before the cores are solved for again.
        """
        spaces = self._common
        assert spaces is not None
        part = part_between(spaces, self.svds)
        rest = slice_svds(self._less(part.left, part.core, part.right))
        part = part_between(spaces, self.svds, [self._kept(svd, step) for svd in rest])
        squares = CoreSquares.of(np.sum(part.core**2, axis=0), len(self.svds))
        (p, q), bits, _ = best_corner(squares, self.sides, step, self.width)
        if not min(p, q):
            return self._beside(None, 0.0, step, value_dtype)
        shared = quantise_tucker2(
            part.left[:, :p], part.core[:, :p, :q], part.right[:, :q], step, self.width
        )
        return self._beside(shared, bits, step, value_dtype)

    def _kept(self, svd: SliceSvd, step: float) -> SliceSvd:
        """The terms of a slice that are worth their bits."""
        keep = self._keep(svd.values, step)
        return SliceSvd(to_numpy(svd.left)[:, keep], svd.values[keep], to_numpy(svd.right)[:, keep])

    def _keep(self, values: np.ndarray, step: float) -> np.ndarray:
        """Which terms are worth their bits, by their singular values."""
        sides = np.broadcast_to(np.array(self.sides, dtype=float), (len(values), 2))
        return predict_terms(values, sides, step, self.width)[0]

    def _less(self, left: np.ndarray, core: np.ndarray, right: np.ndarray) -> LowRankStack:
        """What a Tucker-2 leaves of the slices."""
        pairs = [self.stack.factors(k) for k in range(self.stack.shape[0])]
        return LowRankStack.of_constants(
            [np.hstack([to_numpy(b), left]) for b, _ in pairs],
            [np.vstack([to_numpy(a), -core[k] @ right.T]) for k, (_, a) in enumerate(pairs)],
        )

    def _beside(
        self, shared: QuantisedTucker2 | None, bits: float, step: float, value_dtype: np.dtype
    ) -> tuple[QuantisedStack, float, float]:
        """A shared part of so many bits, and private terms of what it leaves; see `_at`."""
        if self.parts == "shared":
            residual = self.stack if shared is None else self._less(*shared.factors())
            empty = QuantisedTerms.empty(*self.sides)
            return (
                QuantisedStack(shared, (empty,) * self.shape[0], value_dtype),
                float(to_numpy(residual.norms2()).sum()),
                bits,
            )
        svds, spectra = self.svds, self.spectra
        if shared is not None:
            svds = slice_svds(self._less(*shared.factors()))
            spectra = [svd.values for svd in svds]
        private, lost = [], 0.0
        for k, values in enumerate(spectra):
            if isinstance(svds, SvdsOnDemand) and not self._keep(values, step).any():
                private.append(QuantisedTerms.empty(*self.sides))
                lost += float(np.sum(values**2))
                continue
            svd = svds[k]
            private.append(quantise_slice(svd, step, self.width).rounded(value_dtype))
            lost += lost2(svd, private[-1])
        bits += predicted_total(spectra, [self.sides] * len(spectra), step, self.width)[0]
        return QuantisedStack(shared, tuple(private), value_dtype), lost, bits


def _without_bases(stack: LowRankStack) -> ReducedStack:
    small = stack.reduce_without_bases()
    return ReducedStack(small, Reduction("exact", None, small, None, to_numpy(small.norms2())))


NEAR = 1.03
"""Ratio of the two parts' ‖error‖² + λ · bits up to which the dearer one is tried. Predictions are
within 2 % of what is reached; a wider net cost forty times the time on the bundled adapter, and
found nothing."""
