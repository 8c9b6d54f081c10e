"""Tucker2: K slices U · G_k · Vᵀ that share their left and right factors."""

from __future__ import annotations

from dataclasses import dataclass

from lotrtensor.core.linalg import (
    Array,
    Namespace,
    as_accumulator,
    as_working,
    check_finite,
    check_real_floating,
    leading_left,
    namespace,
)
from lotrtensor.core.stacks import LowRankStack
from lotrtensor.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Tucker2:
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
    """

    left: Array
    core: Array
    right: Array

    def __post_init__(self) -> None:
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
        namespace(self.left, self.core, self.right)
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
    def parameters(self) -> int:
        """Number of stored numbers: m p + n q + K p q."""
        (slices, m, n), (p, q) = self.shape, self.rank
        return m * p + n * q + slices * p * q

    def slice(self, k: int) -> Array:
        """Return ΔW_k = U G_k Vᵀ (m × n)."""
        return self.left @ self.core[k, :, :] @ self.right.T

    def astype(self, dtype: object) -> Tucker2:
        """Return the same decomposition rounded to ``dtype``."""
        xp = self.xp
        return Tucker2(*(xp.astype(x, dtype) for x in (self.left, self.core, self.right)))

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
        return Tucker2(*(as_accumulator(x) for x in (self.left, self.core, self.right)))


def order_columns(found: Tucker2) -> Tucker2:
    """Rotate U and V so that their columns come by descending captured energy.

    The cores' mode Gram matrices become diagonal: the leading columns are then good factors of
    every smaller rank, and Σ_k G_k² summed over (p, q) is the energy captured there.
    """
    xp = found.xp
    slices, p, q = found.core.shape
    rows = xp.reshape(xp.permute_dims(found.core, (1, 0, 2)), (p, slices * q))
    columns = xp.reshape(xp.permute_dims(found.core, (2, 0, 1)), (q, slices * p))
    left, _ = leading_left(rows, p, squared=False)
    right, _ = leading_left(columns, q, squared=False)
    return Tucker2(found.left @ left, left.T @ found.core @ right, found.right @ right)
