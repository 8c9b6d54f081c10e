"""LoRA modules at lower ranks: allocated, rounded to the stored type, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lotrtensor.adapters.modules import LazyModule, LoraModule
from lotrtensor.adapters.rounding import rounded
from lotrtensor.core.ranks.goal import Goal
from lotrtensor.core.ranks.terms import ranks_for_parameters, ranks_for_tolerance, uniform_ranks
from lotrtensor.core.ranks.tolerance import settle
from lotrtensor.core.slice_svd import SliceSvd, truncate_slices
from lotrtensor.verbs._goals import Allocation


@dataclass(frozen=True, eq=False)
class Update:
    """The ΔW of one module, to be stored at a lower rank.

    Attributes
    ----------
    name : str
        Path of the module.
    embedding : bool
        Whether it is an embedding.
    shape : (int, int)
        Shape (m, n) of ΔW.
    values : ndarray
        Its falling singular values, or the leading ones.
    svd : callable
        Returns its singular value decomposition, or the leading part; of a module whose factors are
        made on demand at every call anew.
    error2 : callable
        ``error2(B, A)`` is ‖ΔW − B A‖².
    lost2 : float
        Squared norm of ΔW beyond ``svd``.
    whole : LoraModule or None
        The source module, returned unchanged at full rank, without another rounding.
    """

    name: str
    embedding: bool
    shape: tuple[int, int]
    values: np.ndarray
    svd: Callable[[], SliceSvd]
    error2: Callable[[np.ndarray, np.ndarray], float]
    lost2: float = 0.0
    whole: LoraModule | None = None

    @property
    def cost(self) -> int:
        """Stored numbers of a term of rank 1: m + n."""
        return sum(self.shape)

    @property
    def inside2(self) -> float:
        """Squared norm of what ``svd`` holds."""
        return float(np.sum(self.values**2))

    def at_rank(self, rank: int, dtype: np.dtype) -> LoraModule:
        """Return the best module of ``rank``, with the numbers that ``dtype`` stores.

        One that is made on demand is made on demand again.
        """
        if not isinstance(self.whole, LazyModule):
            return LoraModule(self.name, *self._factors(rank, dtype), self.embedding)
        make = partial(self._factors, rank, dtype)
        return LazyModule(self.name, self.shape, min(rank, self.whole.rank), make, self.embedding)

    def _factors(self, rank: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        if self.whole is not None and rank >= self.whole.rank:
            b, a = self.whole.factors()
        else:
            b, a = truncate_slices([self.svd()], [rank]).factors(0)
        working = np.float64 if dtype == np.float64 else np.float32
        name = f"a factor of {self.name}"
        return rounded(b, dtype, name).astype(working), rounded(a, dtype, name).astype(working)


def held(svd: SliceSvd) -> SliceSvd:
    """Return a decomposition that stays in memory, where one may be made at every call."""
    return svd


def lower_ranks(
    updates: Sequence[Update], goal: Goal, dtype: np.dtype, allocation: Allocation = "optimal"
) -> tuple[LoraModule, ...]:
    """Return modules at one rank, or within one size or tolerance over all of them.

    Parameters
    ----------
    updates : sequence of Update
        The modules' ΔW.
    goal : Goal
        A rank gives every module that rank, or its own where that is lower.
    dtype : dtype
        Type that the factors are stored in; the tolerance holds for the numbers as stored.
    allocation : str
        ``"optimal"``: ranks by energy per parameter; ``"uniform"``: one rank for all, as high as
        the size pays or as low as the tolerance allows.

    Raises
    ------
    RankError
        If the goal is out of reach.
    """
    uniform = allocation == "uniform"
    spectra = [update.values for update in updates]
    costs = [update.cost for update in updates]

    def at_ranks(ranks: Sequence[int]) -> tuple[LoraModule, ...]:
        return tuple(u.at_rank(rank, dtype) for u, rank in zip(updates, ranks, strict=True))

    if goal.rank is not None:
        return at_ranks(uniform_ranks(spectra, goal.rank[0]))
    if goal.parameters is not None:
        return at_ranks(ranks_for_parameters(spectra, costs, goal.parameters, uniform=uniform))
    inside2, outside2 = sum(u.inside2 for u in updates), sum(u.lost2 for u in updates)
    full = [len(values) for values in spectra]

    def attempt(target2: float) -> tuple[tuple[LoraModule, ...], float, float, bool]:
        share2 = (target2 - outside2) / inside2 if inside2 else 1.0
        if share2 >= 1.0:
            ranks = uniform_ranks(spectra, 1)
        elif share2 > 0.0:
            ranks = ranks_for_tolerance(spectra, costs, share2**0.5, uniform=uniform)
        else:
            ranks = full
        modules = at_ranks(ranks)
        fitted2 = outside2 + sum(
            float(np.sum(values[rank:] ** 2)) for values, rank in zip(spectra, ranks, strict=True)
        )
        stored2 = sum(u.error2(*m.factors()) for u, m in zip(updates, modules, strict=True))
        return modules, fitted2, stored2, ranks == full

    return settle(goal.tolerance or 0.0, inside2 + outside2, dtype.name, attempt)
