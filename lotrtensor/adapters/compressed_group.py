"""What a compressed adapter is made of: groups of modules in bits, and what they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lotrtensor.adapters.rounding import check_size
from lotrtensor.core.bits.stack import QuantisedStack
from lotrtensor.core.linalg import largest_term


@dataclass(frozen=True)
class SourceRecord:
    """What an adapter was stored in before it was compressed.

    Attributes
    ----------
    dtype : numpy dtype
        Type of its factors.
    parameters, bytes : int
        Numbers of its updates, and their size.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.SourceRecord(np.dtype("float32"), parameters=1000, bytes=4000).bytes
    4000
    """

    dtype: np.dtype
    parameters: int
    bytes: int


class Alternative(NamedTuple):
    """Another form, and its relative error as predicted; None where it needs more bytes.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 64, 4))
    >>> adapter = lt.LoraAdapter((lt.LoraModule("layers.0.q", B, A.T),), {}, np.dtype("float32"))
    >>> lt.compress(adapter, budget=3000).alternatives[0].form
    'terms of single modules, in bits'
    """

    form: str
    relative_error: float | None


@dataclass(frozen=True, eq=False)
class CompressedGroup:
    """Modules of one shape whose updates are in bits.

    Attributes
    ----------
    name : str
        Name of the group.
    modules : tuple of str
        Paths of the adapted modules, one per slice.
    shape : (int, int)
        Shape (m, n) of one ΔW_k.
    slice_ranks : tuple of int
        Rank r_k that each ΔW_k had before.
    stack : QuantisedStack
        The slices.
    relative_error : float
        √(Σ_k ‖ΔW_k − U G_k Vᵀ − P_k Q_kᵀ‖² / Σ_k ‖ΔW_k‖²) of what is stored.
    norm : float
        √(Σ_k ‖ΔW_k‖²) of the updates before.
    embedding : bool
        Whether the modules are embeddings, whose weights are n × m.
    lower_bound : float or None
        Relative error that no parts of these ranks fall below, whatever their bits; None where the
        group was read from a file, which does not hold it.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 64, 4))
    >>> adapter = lt.LoraAdapter((lt.LoraModule("layers.0.q", B, A.T),), {}, np.dtype("float32"))
    >>> group = lt.compress(adapter, tolerance=0.1).groups[0]
    >>> group.name, group.modules, group.shape
    ('q', ('layers.0.q',), (64, 64))
    """

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    slice_ranks: tuple[int, ...]
    stack: QuantisedStack
    relative_error: float
    norm: float
    embedding: bool = False
    lower_bound: float | None = None

    @property
    def private_ranks(self) -> tuple[int, ...]:
        """Number of terms of every slice."""
        return tuple(terms.rank for terms in self.stack.private)

    @property
    def parameters(self) -> int:
        """Number of stored numbers, codes all: m p + n q + K p q + Σ_k c_k (m + n)."""
        (m, n), (p, q) = self.shape, self.stack.shared_ranks
        return m * p + n * q + len(self.modules) * p * q + sum(self.private_ranks) * (m + n)

    def factors(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return B (m × r) and A (r × n) of the update of module ``k`` in float64, B A exactly it.

        r is the rank of both parts together, and at least 1: of a module of which nothing was kept
        the factors are zeros.

        Raises
        ------
        DataError
            If the update is beyond 1e±140.
        """
        b, a = self.stack.factors(k)
        if not b.shape[1]:
            return np.zeros((len(b), 1)), np.zeros((1, a.shape[1]))
        check_size(largest_term(b, a), self.modules[k])
        return b, a
