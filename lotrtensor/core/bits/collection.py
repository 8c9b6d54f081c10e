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
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.bits.basis import QuantisedBasis
from lotrtensor.core.bits.grid import column_cost, round_to_grid
from lotrtensor.core.bits.spaces import Spaces, is_cheap, widest_space
from lotrtensor.core.bits.stream import LARGEST_CODE
from lotrtensor.core.bits.terms import predict_terms, slope, unit_columns
from lotrtensor.core.ranks.curve import outside2
from lotrtensor.core.slice_svd import slice_spectra
from lotrtensor.core.stacks.low_rank import LowRankStack

NARROW = 128
"""Columns of the spaces between which ranks are looked for first; twice as many where ranks above
half of them are the best. A column is worth its bits only where it spares several slices one of
theirs, and to decompose thousands of slices whole takes the cube of their number."""

GAIN = 0.99
"""Ratio of prices that counts: hundreds of columns at the edge of being coded lower one by some
thousandths, and are not coded in the end."""

FALLS = 0.75
"""Ratio of what lies beyond all columns of the spaces to what lies beyond half of them, below which
more columns are looked at; what is private lies beyond either nearly alike."""

COLUMN_BITS = 8
"""Bits of a column beside its codes: its kind."""


# Thin factors B (m × r) and A (r × n) of a slice.
Pair = tuple[np.ndarray, np.ndarray]


class Share(NamedTuple):
    """What ranks (p, q) cost and lose: bits of all slices together, and squared error."""

    ranks: tuple[int, int]
    bits: float
    lost2: float

    def price(self, step: float) -> float:
        """‖error‖² + λ · bits."""
        return self.lost2 + slope(step) * self.bits


def cheapest(shares: Sequence[Share], step: float) -> Share:
    """The share of the least price, or that of the fewest columns of those as good as that."""
    best = min(shares, key=lambda share: share.price(step))
    like = (x for x in shares if min(x.ranks) and GAIN * x.price(step) <= best.price(step))
    return min(like, key=lambda share: sum(share.ranks)) if min(best.ranks) else best


class CollectionInBits:
    """A stack of slices that may share a basis, decomposed once for all steps.

    Parameters
    ----------
    stack : LowRankStack
        K slices ΔW_k, all weighing the same: bring them to one size first.
    widest : (int, int), optional
        Ranks that no basis exceeds, where they are known: decomposing a stack to few columns takes
        a small part of the time.
    slices : int, optional
        Number of slices that those of the stack stand for, where they are a sample.
    """

    def __init__(
        self,
        stack: LowRankStack,
        widest: tuple[int, int] | None = None,
        slices: int | None = None,
    ) -> None:
        self.stack, self.widest = stack, widest
        self.slices = slices or stack.shape[0]
        self.times = self.slices / stack.shape[0]
        self.spectra = slice_spectra(stack)
        self.norm2 = self.times * float(sum(np.sum(values**2) for values in self.spectra))

    @property
    def sides(self) -> tuple[int, int]:
        """M and n."""
        return self.stack.shape[1], self.stack.shape[2]

    @cached_property
    def _spaces(self) -> Spaces:
        if self.widest or is_cheap(self.stack):
            return Spaces(self.stack, self.widest or self.stack.max_rank)
        most = widest_space(self.stack.shape[0])
        return Spaces(self.stack, (min(NARROW, most), min(NARROW, most)))

    @cached_property
    def _cores2(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At every place: energy of the cores, of K times their mean, and of what is left."""
        whole, mean = self._spaces.cores2
        whole, mean2 = self.times * whole, self.slices * mean**2
        return whole, mean2, np.maximum(whole - mean2, 0.0)

    @cached_property
    def _beyond2(self) -> np.ndarray:
        """Energy outside the corner that ends at a place, that outside of the bases included."""
        whole = self._cores2[0]
        found: np.ndarray = outside2(whole) + max(self.norm2 - float(whole.sum()), 0.0)
        return found

    def distances2(self, slices: Callable[[], Iterable[Pair]]) -> np.ndarray:
        """‖ΔW_k − M‖² (K) of all slices, M being their mean.

        Formed from products of thin factors in float64; M is built only where it is smaller than
        they are. Differences of squares: good to 1e-7 of the norm, as far as anybody reads such a
        figure. Where the stack is a sample, M is what of the mean lies between the spaces: of
        hundreds of slices next to nothing of it is beyond them.

        Parameters
        ----------
        slices : callable
            Returns an iterable of the factors B (m × r) and A (r × n) of every slice, in turn.
        """
        along, mean2 = self._along_mean() if self.times == 1 else self._along_spaces(slices())
        found = []
        for b, a in slices():
            b, a = b.astype(np.float64), a.astype(np.float64)
            norm2 = float(np.sum((b.T @ b) * (a @ a.T)))
            found.append(max(norm2 - 2.0 * along(b, a) + mean2, 0.0))
        return np.array(found)

    def _along_mean(self) -> tuple[Callable[[np.ndarray, np.ndarray], float], float]:
        """⟨B A, M⟩ as a function, and ‖M‖², M being the mean of the stack."""
        (count, m, n), ranks = self.stack.shape, self.stack.ranks
        pairs = [tuple(map(to_numpy, self.stack.factors(k))) for k in range(count)]
        lefts, rights = np.hstack([b for b, _ in pairs]) / count, np.vstack([a for _, a in pairs])
        if sum(ranks) > min(m, n):
            mean = lefts @ rights
            return lambda b, a: float(np.sum((b.T @ mean) * a)), float(np.sum(mean**2))
        mean2 = float(np.sum((lefts.T @ lefts) * (rights @ rights.T)))
        return lambda b, a: float(np.sum((lefts.T @ b) * (rights @ a.T))), mean2

    def _along_spaces(
        self, slices: Iterable[Pair]
    ) -> tuple[Callable[[np.ndarray, np.ndarray], float], float]:
        """The same of the part of the mean of given slices that lies between the spaces."""
        left, right = self._spaces.factors
        mean = np.zeros((left.shape[1], right.shape[1]))
        for b, a in slices:
            mean += (left.T @ b) @ (a @ right) / self.slices
        turned = right @ mean.T
        return lambda b, a: float(np.sum((left.T @ b) * (a @ turned).T)), float(np.sum(mean**2))

    def alone(self, step: float) -> Share:
        """What private terms of the slices cost and lose, nothing being shared."""
        bits, lost2 = self._private(self.spectra, step)
        return Share((0, 0), bits, lost2)

    def shares(self, step: float) -> list[Share]:
        """What the pairs of ranks that are looked at cost and lose, nothing shared the first."""
        found = self._shares(step)
        while self._is_narrow(found, step):
            columns = 2 * max(self._spaces.reduced.largest)
            columns = min(columns, widest_space(self.stack.shape[0]))
            self._spaces = Spaces(self.stack, (columns, columns))
            del self._cores2, self._beyond2
            found = self._shares(step)
        return found

    def _is_narrow(self, found: Sequence[Share], step: float) -> bool:
        """Whether there may be better ranks beyond the spaces that were looked at."""
        largest, most = self._spaces.reduced.largest, widest_space(self.stack.shape[0])
        full = all(
            columns >= min(most, rank)
            for columns, rank in zip(largest, self.stack.max_rank, strict=True)
        )
        if self.widest or self._spaces.exact or full:
            return False
        best = min(share.price(step) for share in found)
        inner = (s.price(step) for s in found if 2 * max(s.ranks) <= max(largest))
        if best < GAIN * min(inner):
            return True
        # Slices that lie in spaces of some hundred columns gain nothing before all of these are
        # there; what lies beyond falls quickly then.
        p, q = largest
        half2 = float(self._beyond2[max(p // 2, 1) - 1, max(q // 2, 1) - 1])
        return found[0].lost2 < float(self._beyond2[-1, -1]) < FALLS * half2

    def _shares(self, step: float) -> list[Share]:
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
        for p, q in self._spaces.ladder:
            if p > common.shape[0] or q > common.shape[1]:
                continue  # columns too small for any code
            bits, lost2 = self._private(self._spaces.residual((p, q)), step)
            bits += float(common[p - 1, q - 1] + own[p - 1, q - 1])
            found.append(Share((p, q), bits, lost2 + float(rounding2[p - 1, q - 1])))
        return found

    def best(self, step: float) -> Share:
        """The ranks of the least ‖error‖² + λ · bits; the fewest columns of prices within 1 %."""
        return cheapest(self.shares(step), step)

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
        whole, mean2, centred2 = self._cores2
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
        """Squared error that no basis of these ranks falls below, nothing being private.

        An estimate where the stack is a sample: the bound of the sample, as many times as it
        stands for.
        """
        reduced = self._spaces.reduced
        return self.times * reduced.lower_bound2(reduced.nearest(ranks))

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
        reduced, count = self._spaces.reduced, self.stack.shape[0]
        found = reduced.tucker2(reduced.nearest(ranks), reduced.hosvd.left.dtype)
        left, core, right = (to_numpy(x) for x in (found.left, found.core, found.right))
        first = _codes(left * np.sqrt(self.times * np.sum(core**2, axis=(0, 2))), step)
        second = _codes(right * np.sqrt(self.times * np.sum(core**2, axis=(0, 1))), step)
        if not first.shape[1] or not second.shape[1]:
            return None
        inverse, other = (np.linalg.pinv(unit_columns(x)) for x in (first, second))
        mean = np.zeros((first.shape[1], second.shape[1]))
        for b, a in map(self._spaces.pair, range(count)):
            mean += (inverse @ b) @ (a @ other.T) / count
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
