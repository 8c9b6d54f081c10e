"""LowRankStack: slices that stay pairs of thin factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from array_api_compat import device

from lotrtensor.core.arrays import (
    Array,
    as_accumulator,
    as_working,
    check_finite,
    common_dtype,
    namespace,
)
from lotrtensor.core.linalg import (
    gram_root,
    largest_term,
    norms2,
    squares_hold,
    thin_qr,
)
from lotrtensor.core.options import check_integer, shown
from lotrtensor.core.stacks.algebra import LinearOperators
from lotrtensor.core.stacks.batches import batches, one_below_another, side_by_side
from lotrtensor.core.stacks.factors import check_factors, listed
from lotrtensor.core.stacks.protocol import (
    SliceStack,
    Sweep,
    check_one_shape,
    check_stack,
    check_weights,
)
from lotrtensor.errors import OptionError


class LowRankStack(LinearOperators):
    """Slices ΔW_k = B_k A_k kept as thin factors; the ranks r_k may differ.

    Parameters
    ----------
    B : sequence of arrays (m, r_k), or array (K, m, r)
        Left factors, scale included.
    A : sequence of arrays (r_k, n), or array (K, r, n)
        Right factors.

    Raises
    ------
    ShapeError
        If the stack is empty or two factors do not fit together.
    DataError
        If a factor is not real floating point or not finite.

    Notes
    -----
    Only the products B_k A_k have meaning: (B_k S, S⁻¹ A_k) is the same stack. Sums are taken in
    float32 at the least; a gauge of condition κ, that of S, costs factors in float32 an error of
    1e-7 κ, which float64 spares. Factors in float32 whose products are beyond 1e±10 are held in
    float64, which a decomposition comes back in too: their squares would leave the range. The
    factors are held side by side, m × ρ and ρ × n with ρ = Σ r_k, so that a product with all of
    them is one matrix product; see `of_constants` for another way.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> stack = lt.LowRankStack(B, A)
    >>> stack.shape, stack.ranks, bool(np.allclose(stack.slice(1), B[1] @ A[1]))
    ((4, 20, 30), (2, 2, 2, 2), True)
    """

    lazy = False
    _given: list[tuple[Array, Array]] | None = None

    def __init__(self, B: Sequence[Array] | Array, A: Sequence[Array] | Array) -> None:
        lefts, rights = self._working(B, A)
        xp, ranks = self.xp, tuple(int(x.shape[1]) for x in lefts)
        left, right = xp.concat(lefts, axis=1), xp.concat(rights, axis=0)
        holds = squares_hold(largest_term(left, right), left)
        if not holds:
            left, right = as_accumulator(left), as_accumulator(right)
            self.dtype = left.dtype
        self._hold(left, right, ranks)
        # What is infinite or no number is the largest of its column, and its terms never hold.
        if not holds and not bool(xp.all(xp.isfinite(left)) & xp.all(xp.isfinite(right))):
            for k in range(len(ranks)):
                for x, name in zip(self.factors(k), "BA", strict=True):
                    check_finite(x, f"{name} of slice {k}")

    @classmethod
    def of_constants(cls, B: Sequence[Array], A: Sequence[Array]) -> LowRankStack:
        """Return the stack of factors that nobody will write to, which so need no copies.

        They are brought side by side, beside those that were given, when a product with all of them
        asks for it. If somebody does write to them, some results are of before, some of after.

        Parameters
        ----------
        B : sequence of arrays (m, r_k)
            Left factors, scale included.
        A : sequence of arrays (r_k, n)
            Right factors.

        Raises
        ------
        ShapeError, DataError
            As for `LowRankStack`.
        """
        made = object.__new__(cls)
        lefts, rights = made._working(B, A)
        pairs = list(zip(lefts, rights, strict=True))
        if not all(squares_hold(largest_term(b, a), b) for b, a in pairs):
            return cls(B, A)
        made._given = pairs
        made._set_ranks(tuple(int(b.shape[1]) for b in lefts))
        return made

    def _working(
        self, B: Sequence[Array] | Array, A: Sequence[Array] | Array
    ) -> tuple[list[Array], list[Array]]:
        """The factors one by one, checked and in one type; library and type are set."""
        lefts, rights = listed(B, "B"), listed(A, "A")
        check_factors(lefts, rights)
        self.xp = xp = namespace(*lefts, *rights)
        self.dtype = common_dtype([*lefts, *rights])
        lefts, rights = [as_working(x) for x in lefts], [as_working(x) for x in rights]
        working = xp.result_type(*lefts, *rights)
        lefts, rights = [[xp.astype(x, working, copy=False) for x in xs] for xs in (lefts, rights)]
        return lefts, rights

    def _hold(self, left: Array, right: Array, ranks: tuple[int, ...]) -> None:
        self._left, self._right = left, right
        self._set_ranks(ranks)

    def _set_ranks(self, ranks: tuple[int, ...]) -> None:
        self.ranks, ends = ranks, accumulate(ranks)
        self._spans = [slice(b - r, b) for b, r in zip(ends, ranks, strict=True)]
        self._batches = batches(ranks, sum(self.shape[1:]))

    @cached_property
    def _left(self) -> Array:
        """The factors B_k side by side (m × ρ)."""
        return self.xp.concat([b for b, _ in self._given or ()], axis=1)

    @cached_property
    def _right(self) -> Array:
        """The factors A_k one below another (ρ × n)."""
        return self.xp.concat([a for _, a in self._given or ()], axis=0)

    def _with(self, left: Array, right: Array, ranks: tuple[int, ...], dtype: Any) -> LowRankStack:
        """A stack of factors side by side, whose decompositions come back in ``dtype``."""
        made = object.__new__(LowRankStack)
        made.xp, made.dtype = self.xp, dtype
        made._hold(left, right, ranks)
        return made

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices and the shape of one: (K, m, n)."""
        b, a = self._given[0] if self._given else (self._left, self._right)
        return len(self.ranks), int(b.shape[0]), int(a.shape[1])

    @property
    def max_rank(self) -> tuple[int, int]:
        """Largest left and right rank (p, q) that can be needed: (min(m, ρ), min(n, ρ))."""
        _, m, n = self.shape
        return min(m, sum(self.ranks)), min(n, sum(self.ranks))

    def factors(self, k: int) -> tuple[Array, Array]:
        """Return B_k (m × r_k) and A_k (r_k × n) of slice ``k``."""
        if self._given:
            return self._given[k]
        return self._left[:, self._spans[k]], self._right[self._spans[k], :]

    def norms2(self) -> Array:
        """Squared Frobenius norms ‖B_k A_k‖², one per slice (K)."""
        return self._norms2

    @cached_property
    def _norms2(self) -> Array:
        return self.xp.concat([self._batch_norms2(i) for i in range(len(self._batches))])

    def _batch_norms2(self, index: int) -> Array:
        """Squared norms of the slices of a batch.

        In the widest type they are tr(BᵀB · AAᵀ), which takes a fifth of the time of a QR; its
        rounding is one of ‖B‖² ‖A‖². Where little is left of that, as of the difference of two
        equal slices, and where ranks exceed a side, the QR is formed instead.
        """
        xp, batch, transpose = self.xp, self._batches[index], self.xp.matrix_transpose
        b = batch.columns(self._left)
        wide = as_accumulator(self.empty()).dtype == self.empty().dtype
        if wide and b.shape[-1] <= min(self.shape[1:]):
            a = batch.rows(self._right)
            grams = transpose(b) @ b, a @ transpose(a)
            found = xp.sum(grams[0] * grams[1], axis=(1, 2))
            whole = xp.linalg.trace(grams[0]) * xp.linalg.trace(grams[1])
            if bool(xp.all(found > TRACE_LIMIT * whole)):
                return found
        return norms2(b @ transpose(self._roots[index]))

    @cached_property
    def _roots(self) -> list[Array]:
        """R_k (r_k × r_k) with R_kᵀR_k = A_k A_kᵀ, batch by batch: ‖X A_k‖ = ‖X R_kᵀ‖."""
        transpose = self.xp.matrix_transpose
        return [gram_root(transpose(batch.rows(self._right))) for batch in self._batches]

    def left_factor(self, right: Array | None = None) -> Array:
        """Return F (m × c) with F Fᵀ = Σ_k ΔW_k V Vᵀ ΔW_kᵀ; V is the identity if not given.

        The block of slice k is B_k R_kᵀ with R_kᵀR_k = A_k V (A_k V)ᵀ, or B_k (A_k V) where that is
        narrower.
        """
        if right is None:
            roots = [self.xp.matrix_transpose(root) for root in self._roots]
        else:
            projected = self._right @ self._own(right)
            roots = [_narrow(batch.rows(projected)) for batch in self._batches]
        pairs = zip(self._batches, roots, strict=True)
        return self.xp.concat(
            [side_by_side(batch.columns(self._left) @ root) for batch, root in pairs], axis=1
        )

    def right_factor(self, left: Array | None = None) -> Array:
        """Return F (n × c) with F Fᵀ = Σ_k ΔW_kᵀ U Uᵀ ΔW_k; U is the identity if not given."""
        projected = self._left.T if left is None else self._left.T @ self._own(left)
        transpose = self.xp.matrix_transpose
        blocks = (
            transpose(batch.rows(self._right)) @ _narrow(batch.rows(projected))
            for batch in self._batches
        )
        return self.xp.concat([side_by_side(block) for block in blocks], axis=1)

    def core(self, left: Array, right: Array) -> Array:
        """Cores (Uᵀ B_k)(A_k V) (K × p × q)."""
        lefts, rights = self._own(left).T @ self._left, self._right @ self._own(right)
        return self.xp.concat([b.columns(lefts) @ b.rows(rights) for b in self._batches])

    def residual_norms2(self, left: Array, right: Array) -> Array:
        """Squared norms ‖ΔW_k − U Uᵀ ΔW_k V Vᵀ‖², one per slice (K).

        The sum of ‖(I − UUᵀ) B_k A_k‖² and ‖UᵀB_k A_k (I − VVᵀ)‖²: each is formed from what is
        left of thin factors, so that an error of 1e-12 is seen as such.
        """
        transpose, residuals = self.xp.matrix_transpose, []
        left, right = self._own(left), self._own(right)
        for batch, root in zip(self._batches, self._roots, strict=True):
            b, a = batch.columns(self._left), batch.rows(self._right)
            inside = left.T @ b
            lost_left = (b - left @ inside) @ transpose(root)
            root_outside = gram_root(transpose(a - (a @ right) @ right.T))
            residuals.append(norms2(lost_left) + norms2(inside @ transpose(root_outside)))
        return self.xp.concat(residuals)

    def sweep(self, left: Array, right: Array) -> Sweep:
        """The products of one pass: about 4 ρ (m + n) b flops."""
        lefts, rights = self._own(left).T @ self._left, self._right @ self._own(right)
        transpose, cores, inner_left, inner_right = self.xp.matrix_transpose, [], [], []
        for batch in self._batches:
            b, a = batch.columns(lefts), batch.rows(rights)
            core = b @ a
            inner_left.append(one_below_another(a @ transpose(core)))
            inner_right.append(one_below_another(transpose(b) @ core))
            cores.append(core)
        return Sweep(
            self._left @ self.xp.concat(inner_left),
            self._right.T @ self.xp.concat(inner_right),
            self.xp.concat(cores),
            self.norms2(),
        )

    def project(self, left: Array, right: Array) -> tuple[Array, Array]:
        """`core` and `residual_norms2`."""
        return self.core(left, right), self.residual_norms2(left, right)

    def reduce(self) -> tuple[Array | None, LowRankStack, Array | None]:
        """Return Q_B, a small stack and Q_A with ΔW_k = Q_B · small_k · Q_Aᵀ.

        QR of the factors side by side: an equal problem of size ρ × K × ρ, in float64 where the
        library has it. Q_B is m × min(m, ρ) and Q_A is n × min(n, ρ).
        """
        basis_left, triangle_left = thin_qr(self._left)
        basis_right, triangle_right = thin_qr(self._right.T)
        lefts, rights = as_accumulator(triangle_left), as_accumulator(triangle_right.T)
        small = self._with(lefts, rights, self.ranks, lefts.dtype)
        return basis_left, small, basis_right

    def reduce_without_bases(self) -> LowRankStack:
        """Return the small stack of `reduce` in some other orthonormal bases, which are not formed.

        Norms, spectra and sums over slices of squared cores are the same; half of the time or less.
        A Gram matrix loses columns that are small beside others: B and A share their norms first.
        """
        scale = self._balance()
        left, right = gram_root(self._left * scale), gram_root(self._right.T / scale)
        lefts, rights = as_accumulator(left), as_accumulator(right.T)
        return self._with(lefts, rights, self.ranks, lefts.dtype)

    def _balance(self) -> Array:
        """Powers of two (ρ) that bring every column of B and its row of A to about one norm."""
        xp = self.xp
        sizes = [xp.sqrt(xp.vecdot(x, x)) for x in map(as_accumulator, (self._left.T, self._right))]
        some = (sizes[0] > 0.0) & (sizes[1] > 0.0)
        one = xp.ones_like(sizes[0])
        ratio = xp.where(some, sizes[1], one) / xp.where(some, sizes[0], one)
        return self._own(2.0 ** xp.round(xp.log2(ratio) / 2.0))

    def _own(self, block: Array) -> Array:
        """A block in the working type, which can be wider than that of the factors given."""
        return self.xp.astype(block, self.empty().dtype, copy=False)

    def empty(self) -> Array:
        """An array of no entries: library, device and working type of the products."""
        return self.factors(0)[0][:0, :0]

    def slice(self, k: int) -> Array:
        """Return B_k A_k (m × n), dense."""
        left, right = self.factors(k)
        return left @ right

    def magnitude(self) -> float:
        """Largest entry of a column of B times that of its row of A."""
        pairs = self._given or [(self._left, self._right)]
        return max(largest_term(b, a) for b, a in pairs)

    def take(self, indices: Sequence[int]) -> LowRankStack:
        """Return the stack of the slices at ``indices``, in that order."""
        if not isinstance(indices, Sequence) or not indices:
            raise OptionError(f"indices is {shown(indices)}; expected the numbers of slices")
        indices = [check_integer(k, "an index", 0, self.shape[0] - 1) for k in indices]
        pairs = [self.factors(k) for k in indices]
        left = self.xp.concat([b for b, _ in pairs], axis=1)
        right = self.xp.concat([a for _, a in pairs], axis=0)
        return self._with(left, right, tuple(self.ranks[k] for k in indices), self.dtype)

    def scaled(self, weights: Sequence[float]) -> LowRankStack:
        """Return the stack of (w_k B_k) A_k."""
        weights = check_weights(weights, self.shape[0])
        repeated = [w for w, r in zip(weights, self.ranks, strict=True) for _ in range(r)]
        place = {"dtype": self._left.dtype, "device": device(self._left)}
        left = self._left * self.xp.asarray(repeated, **place)
        return self._with(left, self._right, self.ranks, self.dtype)

    def __add__(self, other: SliceStack) -> Any:
        """Slice-wise sum; with another of thin factors, kept as factors of rank r_k + r'_k."""
        check_stack(other)
        if not isinstance(other, LowRankStack):
            return NotImplemented  # whole slices are formed by the other one
        check_one_shape(self, other)
        namespace(self.empty(), other.empty())
        pairs = [(self.factors(k), other.factors(k)) for k in range(self.shape[0])]
        return LowRankStack.of_constants(
            [self.xp.concat([b, b2], axis=1) for (b, _), (b2, _) in pairs],
            [self.xp.concat([a, a2], axis=0) for (_, a), (_, a2) in pairs],
        )

    def _times(self, factor: float) -> LowRankStack:
        return self.scaled([factor] * self.shape[0])

    def to_dense(self) -> Array:
        """The slices as one array (K × m × n)."""
        return self.xp.stack([self.slice(k) for k in range(self.shape[0])])


TRACE_LIMIT = 1e-8
"""Share of ‖B‖² ‖A‖² below which ‖B A‖² is not the trace of a product of Gram matrices: from there
on that would have fewer than seven digits. Of a LoRA's own slices about a tenth is left."""


def _narrow(x: Array) -> Array:
    """Return Y (… × r × c) with Y Yᵀ = x xᵀ and c the smaller side of ``x`` (… × r × b)."""
    if x.shape[-1] <= x.shape[-2]:
        return x
    transpose = namespace(x).matrix_transpose
    return transpose(gram_root(transpose(x)))
