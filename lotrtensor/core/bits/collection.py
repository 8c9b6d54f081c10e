"""Many slices in bits: mean, shared and private parts under one slope, and what they would cost.

    ΔW_k ≈ U (Ḡ + G_k) Vᵀ + P_k Q_kᵀ

U and V come from the HOSVD of the stack. The ranks (p, q) are those of the least
‖error‖² + λ · bits among a few pairs from (0, 0), nothing shared, to the full ones; for each, the
private terms are those of what the pair leaves of the slices, so that a basis may hold little more
than the mean and leave the rest to the slices, or hold all.

The cores at a place have the energy K ḡ² + Σ_k (g_k − ḡ)². The mean ḡ is rounded once, on a grid
finer by √K, since its error is that of K slices; its distortion is then that of an entry √K ḡ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.bits.basis import QuantisedBasis
from lotrtensor.core.bits.grid import column_cost, round_to_grid
from lotrtensor.core.bits.stream import LARGEST_CODE
from lotrtensor.core.bits.terms import predict_terms, slope, unit_columns
from lotrtensor.core.fit import tuning
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import reduce_stack
from lotrtensor.core.ranks.curve import outside2
from lotrtensor.core.slice_svd import slice_svds
from lotrtensor.core.stacks.low_rank import LowRankStack

MOST_CORES = 2**25
"""Entries that the cores of all slices between the bases hold at most, 256 MiB: beyond, the bases
are cut to fewer columns, from a matrix-free block iteration."""

SAMPLE = 48
"""Slices whose residuals stand for those of all when ranks are priced."""

COLUMN_BITS = 8
"""Bits of a column beside its codes: its kind."""


class Share(NamedTuple):
    """What ranks (p, q) cost and lose: bits of all slices together, and squared error."""

    ranks: tuple[int, int]
    bits: float
    lost2: float

    def price(self, step: float) -> float:
        """‖error‖² + λ · bits."""
        return self.lost2 + slope(step) * self.bits


class CollectionInBits:
    """A stack of slices that may share a basis, decomposed once for all steps.

    Parameters
    ----------
    stack : LowRankStack
        K slices ΔW_k, all weighing the same: bring them to one size first.
    widest : (int, int), optional
        Ranks that no basis exceeds, where they are known: decomposing a stack to few columns takes
        a small part of the time.
    """

    def __init__(self, stack: LowRankStack, widest: tuple[int, int] | None = None) -> None:
        self.stack, self.widest = stack, widest
        self.spectra = [svd.values for svd in slice_svds(stack)]
        self.norm2 = float(sum(np.sum(values**2) for values in self.spectra))
        self._residuals: dict[tuple[int, int], list[np.ndarray]] = {}

    @property
    def sides(self) -> tuple[int, int]:
        """M and n."""
        return self.stack.shape[1], self.stack.shape[2]

    @property
    def slices(self) -> int:
        """Number of slices K."""
        return self.stack.shape[0]

    @cached_property
    def _reduced(self) -> ReducedStack:
        (a, b), most = self.stack.max_rank, math.isqrt(MOST_CORES // self.slices)
        if self.widest and 2 * self.widest[0] < a and 2 * self.widest[1] < b:
            return ReducedStack(
                self.stack, reduce_stack(self.stack, self.widest, kind="matrix-free")
            )
        if a * b <= most**2:
            return ReducedStack(self.stack, reduce_stack(self.stack, kind="exact"))
        widest = min(4 * most // 5, most - tuning.OVERSAMPLE)  # the block is wider by that much
        rank = (max(1, widest), max(1, widest))
        return ReducedStack(self.stack, reduce_stack(self.stack, rank, kind="matrix-free"))

    @cached_property
    def _bases(self) -> tuple[np.ndarray, np.ndarray]:
        left, right = self._reduced.directions(max(self._reduced.largest))
        return to_numpy(left), to_numpy(right)

    @cached_property
    def _cores(self) -> np.ndarray:
        """Cores between the bases (K × a × b)."""
        left, right = self._bases
        pairs = (self._pair(k) for k in range(self.slices))
        return np.stack([(left.T @ b) @ (a @ right) for b, a in pairs])

    def _pair(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        b, a = self.stack.factors(k)
        return to_numpy(b), to_numpy(a)

    @cached_property
    def _energies(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At every place: energy of the cores, of K times their mean, and of what is left."""
        whole = np.einsum("kij,kij->ij", self._cores, self._cores)
        mean2 = self.slices * np.mean(self._cores, axis=0) ** 2
        return whole, mean2, np.maximum(whole - mean2, 0.0)

    @cached_property
    def _beyond2(self) -> np.ndarray:
        """Energy outside the corner that ends at a place, that outside of the bases included."""
        whole = self._energies[0]
        found: np.ndarray = outside2(whole) + max(self.norm2 - float(whole.sum()), 0.0)
        return found

    def distances2(self) -> np.ndarray:
        """‖ΔW_k − M‖² (K), M being the mean of all slices: what the mean alone leaves of each.

        Formed from products of thin factors; M is built only where it is smaller than they are.
        Differences of squares: good to 1e-7 of the norm, as far as anybody reads such a figure.
        """
        (_, m, n), ranks = self.stack.shape, self.stack.ranks
        pairs = [self._pair(k) for k in range(self.slices)]
        lefts, rights = np.hstack([b for b, _ in pairs]), np.vstack([a for _, a in pairs])
        if sum(ranks) > min(m, n):
            mean = lefts @ rights / self.slices
            mean2 = float(np.sum(mean**2))
            inner = [float(np.sum((b.T @ mean) * a)) for b, a in pairs]
        else:
            lefts = lefts / self.slices
            mean2 = float(np.sum((lefts.T @ lefts) * (rights @ rights.T)))
            inner = [float(np.sum((lefts.T @ b) * (rights @ a.T))) for b, a in pairs]
        norms2 = np.array([np.sum(values**2) for values in self.spectra])
        found: np.ndarray = np.maximum(norms2 - 2.0 * np.array(inner) + mean2, 0.0)
        return found

    def alone(self, step: float) -> Share:
        """What private terms of the slices cost and lose, nothing being shared."""
        bits, lost2 = self._private(self.spectra, step)
        return Share((0, 0), bits, lost2)

    def shares(self, step: float) -> list[Share]:
        """What the pairs of ranks that are looked at cost and lose, nothing shared the first."""
        found = [self.alone(step)]
        common, own, rounding2 = self._corners(step)
        if not common.size:
            return found
        # All in the basis, the best corner of all; then pairs that leave private terms.
        whole2 = rounding2 + self._beyond2[: common.shape[0], : common.shape[1]]
        price = whole2 + slope(step) * (common + own)
        i, j = np.unravel_index(int(np.argmin(price)), price.shape)
        bits = float(common[i, j] + own[i, j])
        found.append(Share((int(i) + 1, int(j) + 1), bits, float(whole2[i, j])))
        for p, q in self._ladder:
            if p > common.shape[0] or q > common.shape[1]:
                continue  # columns too small for any code
            bits, lost2 = self._private(self._residual((p, q)), step)
            bits += float(common[p - 1, q - 1] + own[p - 1, q - 1])
            found.append(Share((p, q), bits, lost2 + float(rounding2[p - 1, q - 1])))
        return found

    def best(self, step: float) -> Share:
        """The ranks of the least ‖error‖² + λ · bits."""
        return min(self.shares(step), key=lambda share: share.price(step))

    @cached_property
    def _ladder(self) -> list[tuple[int, int]]:
        """Pairs of ranks, each about twice the one before, whose two discarded energies agree."""
        whole = self._energies[0]
        tails = [np.append(np.cumsum(whole.sum(axis=i)[::-1])[::-1], 0.0) for i in (1, 0)]
        pairs, rank = [], 1
        while rank < max(whole.shape):
            p = min(rank, whole.shape[0])
            q = int(np.argmax(tails[1] <= tails[0][p]))
            pairs.append((p, max(1, min(q, whole.shape[1]))))
            rank *= 2
        return sorted(set(pairs))

    def _residual(self, pair: tuple[int, int]) -> list[np.ndarray]:
        """Singular values of ΔW_k − U Uᵀ ΔW_k V Vᵀ of a sample of the slices."""
        if pair not in self._residuals:
            left, right = (x[:, :r] for x, r in zip(self._bases, pair, strict=True))
            lefts, rights = [], []
            for k in self._sample:
                b, a = self._pair(k)
                inside = left @ (left.T @ b)
                lefts.append(np.hstack([b - inside, inside]))
                rights.append(np.vstack([a, a - (a @ right) @ right.T]))
            svds = slice_svds(LowRankStack(lefts, rights))
            self._residuals[pair] = [svd.values for svd in svds]
        return self._residuals[pair]

    @cached_property
    def _sample(self) -> list[int]:
        count = min(SAMPLE, self.slices)
        return [round(i * (self.slices - 1) / max(count - 1, 1)) for i in range(count)]

    def _private(self, spectra: Sequence[np.ndarray], step: float) -> tuple[float, float]:
        """Bits and squared error of private terms of slices that stand for all."""
        values = np.concatenate(list(spectra)) if spectra else np.zeros(0)
        sides = np.broadcast_to(np.array(self.sides, dtype=float), (len(values), 2))
        keep, bits, lost2 = predict_terms(values, sides, step)
        times = self.slices / len(spectra)
        lost = float(np.where(keep, lost2, values**2).sum())
        return times * float(bits[keep].sum()), times * lost

    def _corners(self, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At every corner: bits spent once, bits of the cores, and squared error of rounding."""
        whole, mean2, centred2 = self._energies
        norms = np.sqrt(whole.sum(axis=1)), np.sqrt(whole.sum(axis=0))
        costs = [
            column_cost(norm / (math.sqrt(side) * step), None)
            for norm, side in zip(norms, self.sides, strict=True)
        ]
        p, q = (int(np.count_nonzero(cost.distortion < 1.0)) for cost in costs)
        whole, mean2, centred2 = (x[:p, :q] for x in (whole, mean2, centred2))
        mean = column_cost(np.sqrt(mean2) / step, None)
        own = column_cost(np.sqrt(centred2 / self.slices) / step, None)
        kept = np.outer(1 - costs[0].distortion[:p], 1 - costs[1].distortion[:q])
        inner2 = mean2 * mean.distortion + centred2 * own.distortion
        rounding2 = _corner_sums(whole * (1 - kept) + kept * inner2)
        common = _corner_sums(mean.bits)
        common += np.cumsum(self.sides[0] * costs[0].bits[:p] + COLUMN_BITS)[:, None]
        common += np.cumsum(self.sides[1] * costs[1].bits[:q] + COLUMN_BITS)
        return common, self.slices * _corner_sums(own.bits), rounding2

    def lower_bound2(self, ranks: tuple[int, int]) -> float:
        """Squared error that no basis of these ranks falls below, nothing being private."""
        return self._reduced.lower_bound2(self._reduced.nearest(ranks))

    def quantise(self, ranks: tuple[int, int], step: float) -> QuantisedBasis | None:
        """Return the basis of these ranks on a grid; None where nothing is left of it.

        Parameters
        ----------
        ranks : (int, int)
            (p, q), as `best` found them.
        step : float
            Δ.
        """
        if not min(ranks):
            return None
        found = self._reduced.tucker2(self._reduced.nearest(ranks), self._reduced.hosvd.left.dtype)
        left, core, right = (to_numpy(x) for x in (found.left, found.core, found.right))
        first = _codes(left * np.sqrt(np.sum(core**2, axis=(0, 2))), step)
        second = _codes(right * np.sqrt(np.sum(core**2, axis=(0, 1))), step)
        if not first.shape[1] or not second.shape[1]:
            return None
        inverse, other = (np.linalg.pinv(unit_columns(x)) for x in (first, second))
        mean = np.zeros((first.shape[1], second.shape[1]))
        for b, a in map(self._pair, range(self.slices)):
            mean += (inverse @ b) @ (a @ other.T) / self.slices
        # No finer than codes of 16 bits allow.
        largest = float(np.max(np.abs(mean)))
        finest = (LARGEST_CODE * step / largest) ** 2 if largest else math.inf
        fineness = max(1, int(min(self.slices, finest)))
        codes = round_to_grid(mean, step / math.sqrt(fineness)).astype(np.int16)
        return QuantisedBasis(
            first.astype(np.int16), second.astype(np.int16), codes, step, fineness
        )


def _codes(columns: np.ndarray, step: float) -> np.ndarray:
    """Codes of columns that will be brought to norm 1, without those of zeros."""
    largest = np.max(np.abs(columns), axis=0, initial=0.0) / step
    codes = round_to_grid(columns * np.minimum(1.0, LARGEST_CODE / np.maximum(largest, 1.0)), step)
    found: np.ndarray = codes[:, codes.any(axis=0)]
    return found


def _corner_sums(x: np.ndarray) -> np.ndarray:
    """Sums over the corners [:i + 1, :j + 1]."""
    found: np.ndarray = np.cumsum(np.cumsum(x, axis=0), axis=1)
    return found
