"""A group of a LoTR: modules whose updates share U and V, and how well they stand for others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lotrtensor.adapters.rounding import check_size, exact_scale, rounded
from lotrtensor.core.balanced import balanced_factors
from lotrtensor.core.linalg import largest_entry, largest_term
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.tucker2 import Tucker2


@dataclass(frozen=True, eq=False)
class FactoredCore:
    """A core G_k = ``left @ right`` of rank r_k, kept as a product where that is smaller.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> core = lt.FactoredCore(np.ones((8, 1)), np.ones((1, 8)))
    >>> core.size, core.dense().shape
    (16, (8, 8))
    """

    left: np.ndarray
    right: np.ndarray

    @property
    def size(self) -> int:
        """Number of stored numbers: r_k (p + q)."""
        return self.left.size + self.right.size

    @property
    def largest(self) -> float:
        """What no entry of G_k exceeds r_k times."""
        return largest_term(self.left.astype(np.float64), self.right.astype(np.float64))

    def dense(self) -> np.ndarray:
        """Return G_k (p × q) in float64."""
        return self.left.astype(np.float64) @ self.right.astype(np.float64)


Core = np.ndarray | FactoredCore

_MUCH = 4
"""How many times the stored numbers whole cores may take."""


@dataclass(frozen=True)
class FitRecord:
    """How well stored factors and cores stand for the updates that they were fitted to.

    Attributes
    ----------
    relative_error : float
        √(Σ_k ‖ΔW_k − U G_k Vᵀ‖² / Σ_k ‖ΔW_k‖²), storage type included.
    lower_bound : float
        No factors of these ranks reach a smaller one.
    norm : float
        √(Σ_k ‖ΔW_k‖²) of the updates.
    parameters : int
        Numbers that the updates were stored in.
    bytes : int
        Bytes that the updates were stored in.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> fit = lt.convert(adapter, rank=8).groups[0].fit
    >>> fit.lower_bound < fit.relative_error, fit.bytes
    (True, 73728)
    """

    relative_error: float
    lower_bound: float
    norm: float
    parameters: int
    bytes: int


@dataclass(frozen=True, eq=False)
class LotrGroup:
    """Modules whose updates are U · G_k · Vᵀ with one U and one V.

    Attributes
    ----------
    name : str
        Name of the group; also its key in the file.
    modules : tuple of str
        Paths of the adapted modules, one per slice.
    left, right : ndarray (m, p), (n, q)
        Shared factors U and V, as stored.
    cores : tuple of ndarray (p, q) or FactoredCore
        One per module, as stored.
    slice_ranks : tuple of int
        Rank r_k that each ΔW_k had before; no core has a higher one.
    embedding : bool
        Whether the modules are embeddings, whose weights are n × m.
    fit : FitRecord or None
        How well the group stands for what it was fitted to; None where it was trained.
    scale : float
        Factor of every ΔW beside U G_k Vᵀ; 1 where it is baked in.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> group = lt.convert(adapter, rank=8).groups[0]
    >>> group.name, group.shape, group.rank, len(group.cores)
    ('attention.output.dense', (384, 384), (8, 8), 6)
    """

    name: str
    modules: tuple[str, ...]
    left: np.ndarray
    right: np.ndarray
    cores: tuple[Core, ...]
    slice_ranks: tuple[int, ...]
    embedding: bool = False
    fit: FitRecord | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of one ΔW_k."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> tuple[int, int]:
        """Left and right rank (p, q)."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def parameters(self) -> int:
        """Number of stored numbers: both factors once, and every core."""
        return self.left.size + self.right.size + sum(core.size for core in self.cores)

    @property
    def thin(self) -> bool:
        """Whether cores are products of so few columns that whole ones would take far more."""
        dense = len(self.cores) * math.prod(self.rank)
        return dense > _MUCH * self.parameters

    def factors(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return B (m × r) and A (r × n) of the update of module ``k`` in float64, B A exactly it.

        r is the least of p, q and the inner size of a core that is a product.

        Raises
        ------
        DataError
            If the update is beyond 1e±140.
        """
        core = self.cores[k]
        left, right = self.left.astype(np.float64), self.right.astype(np.float64).T
        if isinstance(core, FactoredCore):
            inner, outer = core.left.astype(np.float64), core.right.astype(np.float64)
            b, a = left @ (inner * self.scale), outer @ right
        elif self.rank[0] <= self.rank[1]:
            b, a = left, (core.astype(np.float64) * self.scale) @ right
        else:
            b, a = left @ (core.astype(np.float64) * self.scale), right
        check_size(largest_term(b, a), self.modules[k])
        return b, a

    def low_rank(self) -> LowRankStack:
        """The group as a stack of thin factors, one slice a module."""
        pairs = [self.factors(k) for k in range(len(self.modules))]
        return LowRankStack([b for b, _ in pairs], [a for _, a in pairs])

    def tucker2(self) -> Tucker2:
        """The group as one decomposition in float64, exactly what the stored numbers say.

        Raises
        ------
        DataError
            If its updates are beyond 1e±140.
        """
        sides = largest_entry(self.left.astype(np.float64)) * abs(self.scale)
        sides *= largest_entry(self.right.astype(np.float64))
        for module, core in zip(self.modules, self.cores, strict=True):
            if isinstance(core, FactoredCore):
                check_size(core.largest * sides, module)
            else:
                check_size(largest_entry(core.astype(np.float64)) * sides, module)
        cores = [c.dense() if isinstance(c, FactoredCore) else c for c in self.cores]
        return Tucker2(
            self.left.astype(np.float64),
            np.stack([core.astype(np.float64) * self.scale for core in cores]),
            self.right.astype(np.float64),
        )


def store_group(
    tucker2: Tucker2,
    *,
    name: str,
    modules: tuple[str, ...],
    slice_ranks: tuple[int, ...],
    dtype: np.dtype,
    embedding: bool = False,
) -> LotrGroup:
    """Round a decomposition to what a file holds.

    A core of rank r_k is kept as a product where r_k (p + q) < p q. Cores beyond the range of
    ``dtype`` are divided by a power of two, which the group's scale then is.
    """
    p, q = tucker2.rank
    cores: list[Core] = []
    scale = exact_scale(float(np.max(np.abs(tucker2.core))), dtype)
    for core, rank in zip(tucker2.core / scale, slice_ranks, strict=True):
        if rank * (p + q) >= p * q:
            cores.append(rounded(core, dtype, f"a core of group {name}"))
            continue
        factors = (rounded(x, dtype, f"a core of {name}") for x in balanced_factors(core, rank))
        cores.append(FactoredCore(*factors))
    return LotrGroup(
        name=name,
        modules=modules,
        left=rounded(tucker2.left, dtype, f"the left factor of group {name}"),
        right=rounded(tucker2.right, dtype, f"the right factor of group {name}"),
        cores=tuple(cores),
        slice_ranks=slice_ranks,
        embedding=embedding,
        scale=scale,
    )
