"""Stacks of thin factors to try the library on: NumPy float64, from generic to degenerate.

A strategy draws the sizes, the kind of spectrum and a seed; the numbers come from the seed, so that
a failing case shrinks to few rows and columns and prints as one short line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lotrtensor import DenseStack, LazyStack, LowRankStack


@dataclass(frozen=True)
class Factors:
    """B_k (m × r_k) and A_k (r_k × n) of every slice, and the ways to write the same thing anew."""

    B: tuple[np.ndarray, ...]
    A: tuple[np.ndarray, ...]
    origin: str = ""

    def __repr__(self) -> str:
        """Return sizes and origin; the entries follow from them."""
        return f"Factors({self.origin}, shape={self.shape}, ranks={self.ranks})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, m, n)."""
        return len(self.B), self.B[0].shape[0], self.A[0].shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_k of every slice."""
        return tuple(b.shape[1] for b in self.B)

    @property
    def max_rank(self) -> tuple[int, int]:
        """(min(m, ρ), min(n, ρ)) with ρ = Σ r_k."""
        _, m, n = self.shape
        return min(m, sum(self.ranks)), min(n, sum(self.ranks))

    def stack(self) -> LowRankStack:
        """Return the stack in NumPy float64."""
        return LowRankStack(list(self.B), list(self.A))

    def dense(self) -> np.ndarray:
        """The slices as K × m × n, entry by entry from their definition."""
        return np.stack([np.einsum("ir,rj->ij", b, a) for b, a in zip(self.B, self.A, strict=True)])

    def transposed(self) -> Factors:
        """ΔW_kᵀ = A_kᵀ B_kᵀ."""
        return self._new([a.T for a in self.A], [b.T for b in self.B], "transposed")

    def permuted(self, order: Sequence[int]) -> Factors:
        """Return the slices in another order."""
        return self._new([self.B[k] for k in order], [self.A[k] for k in order], "permuted")

    def scaled(self, left: float, right: float = 1.0) -> Factors:
        """Return left · right · ΔW_k."""
        return self._new([left * b for b in self.B], [right * a for a in self.A], "scaled")

    def turned(self, left: np.ndarray, right: np.ndarray) -> Factors:
        """Return left · ΔW_k · rightᵀ."""
        return self._new([left @ b for b in self.B], [a @ right.T for a in self.A], "turned")

    def gauged(self, rng: np.random.Generator, spread: float = 1.5) -> Factors:
        """(B_k S_k, S_k⁻¹ A_k) with singular values of S_k between 10^-spread and 10^spread."""
        lefts, rights = [], []
        for b, a in zip(self.B, self.A, strict=True):
            r = b.shape[1]
            turn, mix = orthogonal(rng, r), orthogonal(rng, r)
            sizes = 10.0 ** rng.uniform(-spread, spread, r)
            lefts.append(b @ turn * sizes @ mix)
            rights.append(mix.T / sizes @ turn.T @ a)
        return self._new(lefts, rights, "gauged")

    def _new(self, lefts: list[np.ndarray], rights: list[np.ndarray], how: str) -> Factors:
        return Factors(tuple(lefts), tuple(rights), f"{how} {self.origin}")


Pairs = tuple[list[np.ndarray], list[np.ndarray]]


def orthogonal(rng: np.random.Generator, size: int, columns: int | None = None) -> np.ndarray:
    """Random orthonormal columns (size × columns), square if ``columns`` is not given."""
    return np.linalg.qr(rng.standard_normal((size, columns or size)))[0]


def _generic(rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """Gaussian factors: nothing coincides."""
    lefts = [rng.standard_normal((m, r)) for r in ranks]
    return lefts, [rng.standard_normal((r, n)) for r in ranks]


def _decaying(rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """Directions that halve or worse, within a slice and from slice to slice."""
    lefts, rights = _generic(rng, m, n, ranks)
    return [b * 0.3 ** np.arange(b.shape[1]) * 0.5**k for k, b in enumerate(lefts)], rights


def _planted(rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """All slices in one pair of subspaces of dimension at most two."""
    left, right = orthogonal(rng, m, min(2, m)), orthogonal(rng, n, min(2, n))
    lefts, rights = _generic(rng, left.shape[1], right.shape[1], ranks)
    return [left @ b for b in lefts], [a @ right.T for a in rights]


def _deficient(rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """B_k of rank below r_k: its last column repeats its first; zero where it has but one."""
    lefts, rights = _generic(rng, m, n, ranks)
    for k, b in enumerate(lefts):
        if b.shape[1] > 1:
            b[:, -1] = b[:, 0]
        elif k:
            b[:] = 0.0
    return lefts, rights


def _zero_slice(rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """The last slice is zero, as a fresh LoRA is: B = 0."""
    lefts, rights = _generic(rng, m, n, ranks)
    if len(ranks) > 1:
        lefts[-1][:] = 0.0
    return lefts, rights


def _uneven(rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """Each slice a millionth of the one before."""
    lefts, rights = _generic(rng, m, n, ranks)
    return [b * 1e-6**k for k, b in enumerate(lefts)], rights


def _repeated(rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """All singular values equal: orthonormal columns and rows, zero where r exceeds the side."""
    lefts, rights = [], []
    for r in ranks:
        b, a = np.zeros((m, r)), np.zeros((r, n))
        width = min(r, m, n)
        b[:, :width], a[:width, :] = orthogonal(rng, m, width), orthogonal(rng, n, width).T
        lefts.append(b)
        rights.append(a)
    return lefts, rights


def _identical(rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """Every slice is the same matrix of rank one, its factors as wide as asked."""
    u, v = rng.standard_normal((m, 1)), rng.standard_normal((1, n))
    return [u @ np.ones((1, r)) for r in ranks], [np.ones((r, 1)) / r @ v for r in ranks]


def _diagonal(_rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """Slice k holds one entry of its own: all mode singular values tie."""
    lefts, rights = [], []
    for k, r in enumerate(ranks):
        b, a = np.zeros((m, r)), np.zeros((r, n))
        b[k % m, 0] = a[0, k % n] = 1.0
        lefts.append(b)
        rights.append(a)
    return lefts, rights


def _all_zero(_rng: np.random.Generator, m: int, n: int, ranks: Sequence[int]) -> Pairs:
    """A stack of zeros."""
    return [np.zeros((m, r)) for r in ranks], [np.ones((r, n)) for r in ranks]


_MAKERS: dict[str, Callable[[np.random.Generator, int, int, Sequence[int]], Pairs]] = {
    "generic": _generic,
    "decaying": _decaying,
    "planted": _planted,
    "deficient": _deficient,
    "zero_slice": _zero_slice,
    "uneven": _uneven,
    "repeated": _repeated,
    "identical": _identical,
    "diagonal": _diagonal,
    "all_zero": _all_zero,
}

UNTIED = ("generic", "decaying", "planted", "deficient", "zero_slice", "uneven")
"""Kinds whose singular values differ: the leading subspaces, hence a fit's path, are unique."""

NONZERO = tuple(kind for kind in _MAKERS if kind != "all_zero")
KINDS = tuple(_MAKERS)


def make(kind: str, seed: int, m: int, n: int, ranks: Sequence[int]) -> Factors:
    """Return factors of one kind: the same for the same arguments."""
    lefts, rights = _MAKERS[kind](np.random.default_rng(seed), m, n, ranks)
    return Factors(tuple(lefts), tuple(rights), f"{kind}, seed={seed}")


def noisy(seed: int, m: int, n: int, slices: int, rank: tuple[int, int], noise: float) -> Factors:
    """A full (p, q) Tucker-2 structure beside Gaussian factors of relative size ``noise``.

    r_k = min(p, q) + 2, so that the slices are of lower rank than m and n.
    """
    rng = np.random.default_rng(seed)
    p, q = rank
    left, right = orthogonal(rng, m, p), orthogonal(rng, n, q)
    lefts, rights = [], []
    for _ in range(slices):
        u, s, vt = np.linalg.svd(rng.standard_normal((p, q)), full_matrices=False)
        lefts.append(np.hstack([left @ u * s, noise * rng.standard_normal((m, 2))]))
        rights.append(np.vstack([vt @ right.T, rng.standard_normal((2, n))]))
    return Factors(tuple(lefts), tuple(rights), f"noisy {rank}, noise={noise}, seed={seed}")


seeds = st.integers(0, 2**32 - 1)


@st.composite
def factors(
    draw: st.DrawFn,
    kinds: Sequence[str] = KINDS,
    *,
    max_side: int = 7,
    max_slices: int = 4,
    max_width: int = 3,
) -> Factors:
    """Factors of any kind; sides of 1, r above the sides, one slice and ragged r included."""
    m, n = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    widths = st.integers(1, max_width)
    slices = draw(st.integers(1, max_slices))
    ragged = draw(st.booleans())
    ranks = [draw(widths) for _ in range(slices)] if ragged else [draw(widths)] * slices
    return make(draw(st.sampled_from(list(kinds))), draw(seeds), m, n, ranks)


@st.composite
def fits(
    draw: st.DrawFn, kinds: Sequence[str] = KINDS, **sizes: int
) -> tuple[Factors, tuple[int, int]]:
    """Factors and a pair of ranks (p, q) that a fit accepts, equal or not."""
    found = draw(factors(kinds, **sizes))
    p, q = found.max_rank
    return found, (draw(st.integers(1, p)), draw(st.integers(1, q)))


# ---------------------------------------------------------------- every kind of stack

ToArray = Callable[[np.ndarray], Any]
"""From NumPy float64 to an array of the library and type under test."""


def _low_rank(f: Factors, array: ToArray) -> LowRankStack:
    return LowRankStack([array(b) for b in f.B], [array(a) for a in f.A])


def _dense(f: Factors, array: ToArray) -> DenseStack:
    return DenseStack(array(f.dense()))


def lazy(tensor: np.ndarray, array: ToArray = np.array) -> LazyStack:
    """The slices of ``tensor``, made anew at every reading."""
    return LazyStack(lambda k: array(tensor[k]), tensor.shape, like=array(np.zeros(1)))


STACKS: dict[str, Callable[[Factors, ToArray], Any]] = {
    "low-rank": _low_rank,
    "low-rank sum": lambda f, a: _low_rank(f.scaled(0.25), a) + _low_rank(f.scaled(0.75), a),
    "low-rank difference": lambda f, a: _low_rank(f.scaled(1.5), a) - _low_rank(f.scaled(0.5), a),
    "low-rank multiple": lambda f, a: 4.0 * _low_rank(f.scaled(0.25), a),
    "dense": _dense,
    "dense sum": lambda f, a: _dense(f.scaled(0.25), a) + _dense(f.scaled(0.75), a),
    "dense multiple": lambda f, a: 4.0 * _dense(f.scaled(0.25), a),
    "dense and low-rank": lambda f, a: _dense(f.scaled(0.25), a) + _low_rank(f.scaled(0.75), a),
    "lazy": lambda f, a: lazy(f.dense(), a),
    "lazy sum": lambda f, a: lazy(f.scaled(0.25).dense(), a) + lazy(f.scaled(0.75).dense(), a),
    "lazy difference": lambda f, a: lazy(f.scaled(1.5).dense(), a) - _dense(f.scaled(0.5), a),
    "lazy multiple": lambda f, a: lazy(f.scaled(0.25).dense(), a) * 4.0,
}
"""Every kind of stack: how to build it so that its slices are those of the factors."""

EVERYWHERE = [("numpy", kind) for kind in STACKS] + [
    (library, kind)
    for library in ("readonly", "strict", "torch", "jax")
    for kind in (("low-rank", "lazy") if library == "jax" else ("low-rank", "dense", "lazy"))
]
"""Libraries and kinds of stacks to run: all kinds on NumPy, the basic ones on every library."""
