"""Tucker2: K slices U · G_k · Vᵀ that share their left and right factors."""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import device

from lotrtensor.core.arrays import (
    Array,
    Namespace,
    as_accumulator,
    as_dtype,
    as_working,
    check_finite,
    check_real_floating,
    constant,
    namespace,
)
from lotrtensor.core.linalg import largest_entry
from lotrtensor.core.stacks.algebra import LinearOperators
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import DataError, ShapeError


@dataclass(frozen=True, eq=False)
class Tucker2(LinearOperators):
    """The Tucker-2 format: slice k is ``left @ core[k] @ right.T``.

    Parameters
    ----------
    left : array (m, p)
        Left factor U.
    core : array (K, p, q)
        Core G, one p × q matrix a slice.
    right : array (n, q)
        Right factor V.

    Raises
    ------
    ShapeError
        If the three do not fit together.
    DataError
        If one is not real floating point or not finite.

    Notes
    -----
    Tucker, "Some mathematical notes on three-mode factor analysis", Psychometrika 31 (1966); the
    layer axis is left uncompressed (the Tucker-2 model of Kroonenberg and de Leeuw, 1980).

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> found = lt.Tucker2(np.ones((4, 1)), np.ones((3, 1, 2)), np.ones((5, 2)))
    >>> found.shape, found.rank, found.parameters
    ((3, 4, 5), (1, 2), 20)
    >>> float(found.slice(0)[0, 0]), (found + found).rank
    (2.0, (2, 4))
    """

    left: Array
    core: Array
    right: Array

    def __post_init__(self) -> None:
        namespace(self.left, self.core, self.right)
        found = tuple(tuple(x.shape) for x in (self.left, self.core, self.right))
        fits = (
            [x.ndim for x in (self.left, self.core, self.right)] == [2, 3, 2]
            and self.core.shape[1] == self.left.shape[1]
            and self.core.shape[2] == self.right.shape[1]
            and 0 not in (*found[0], *found[1], *found[2])
        )
        if not fits:
            raise ShapeError(
                f"left, core and right have shapes {found[0]}, {found[1]} and {found[2]}; "
                "expected (m, p), (K, p, q) and (n, q)"
            )
        for x, name in ((self.left, "left"), (self.core, "core"), (self.right, "right")):
            check_real_floating(x, name)
            check_finite(as_working(x), name)

    @property
    def xp(self) -> Namespace:
        """Array-API namespace of the arrays."""
        return namespace(self.left, self.core, self.right)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices and the shape of one: (K, m, n)."""
        return int(self.core.shape[0]), int(self.left.shape[0]), int(self.right.shape[0])

    @property
    def rank(self) -> tuple[int, int]:
        """Left and right rank (p, q)."""
        return int(self.left.shape[1]), int(self.right.shape[1])

    @property
    def max_rank(self) -> tuple[int, int]:
        """Largest rank that the slices can need: no more than the sides and the cores hold."""
        (slices, m, n), (p, q) = self.shape, self.rank
        p, q = min(m, p), min(n, q)
        return min(p, slices * q), min(q, slices * p)

    @property
    def parameters(self) -> int:
        """Number of stored numbers: m p + n q + K p q."""
        (slices, m, n), (p, q) = self.shape, self.rank
        return m * p + n * q + slices * p * q

    def slice(self, k: int) -> Array:
        """Return ΔW_k = U G_k Vᵀ (m × n)."""
        return self.left @ self.core[k, :, :] @ self.right.T

    def astype(self, dtype: object) -> Tucker2:
        """Return the same decomposition rounded to ``dtype``.

        Raises
        ------
        OptionError
            If the library has no such type.
        DataError
            If ``dtype`` is not real floating point, or does not hold the entries.
        """
        xp = self.xp
        cast = [as_dtype(x, dtype) for x in (self.left, self.core, self.right)]
        for x, y in zip((self.left, self.core, self.right), cast, strict=True):
            if not bool(xp.all(xp.isfinite(as_working(y)))):
                raise DataError(
                    f"entries go up to {largest_entry(as_working(x)):.3g}, which {dtype} does not "
                    "hold; choose a wider dtype"
                )
        return Tucker2(*cast)

    def __add__(self, other: Tucker2) -> Tucker2:
        """The sum: factors side by side, cores block-diagonal; ranks add up.

        Raises
        ------
        ShapeError
            If K, m or n differ.
        """
        if not isinstance(other, Tucker2):
            raise DataError(
                f"a Tucker2 and a {type(other).__name__} have no sum; to_low_rank() makes a stack"
            )
        namespace(self.core, other.core)
        if self.shape != other.shape:
            raise ShapeError(
                f"decompositions of (K, m, n) = {self.shape} and {other.shape} have no sum"
            )
        xp, (slices, _, _) = self.xp, self.shape
        (p, q), (p2, q2) = self.rank, other.rank
        place = {"dtype": self.core.dtype, "device": device(self.core)}
        upper = xp.concat([self.core, xp.zeros((slices, p, q2), **place)], axis=2)
        lower = xp.concat([xp.zeros((slices, p2, q), **place), other.core], axis=2)
        return Tucker2(
            xp.concat([self.left, other.left], axis=1),
            xp.concat([upper, lower], axis=1),
            xp.concat([self.right, other.right], axis=1),
        )

    def _times(self, factor: float) -> Tucker2:
        return Tucker2(self.left, self.core * factor, self.right)

    def orthogonalised(self) -> Tucker2:
        """The same slices with orthonormal U and V, in the widest type of the library.

        The triangles of the QRs U = Q T and V = P S go into the cores, T G_k Sᵀ. Where a factor has
        more columns than rows, the rank falls to the number of rows.
        """
        xp, wide = self.xp, self.accumulated()
        left, left_triangle = xp.linalg.qr(wide.left)
        right, right_triangle = xp.linalg.qr(wide.right)
        return Tucker2(left, left_triangle @ wide.core @ right_triangle.T, right)

    def norm2(self) -> float:
        """Squared norm Σ_k ‖U G_k Vᵀ‖²."""
        core = self.orthogonalised().core
        return float(self.xp.sum(core * core))

    def to_low_rank(self) -> LowRankStack:
        """The slices as factors U and G_k Vᵀ, so that they compare with any other stack."""
        left, core, right = (as_working(x) for x in (self.left, self.core, self.right))
        slices = self.shape[0]
        return LowRankStack([left] * slices, [core[k, :, :] @ right.T for k in range(slices)])

    def to_dense(self) -> Array:
        """The slices as one array (K × m × n)."""
        return self.xp.stack([self.slice(k) for k in range(self.shape[0])])

    def accumulated(self) -> Tucker2:
        """The same decomposition in the widest type of its library."""
        return Tucker2(*(as_accumulator(constant(x)) for x in (self.left, self.core, self.right)))
