"""Updates in parts, ΔW_k = U G_k Vᵀ + P_k Q_kᵀ, as plain numbers: what is loaded into a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.compressed_group import CompressedGroup
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import LotrGroup


@dataclass(frozen=True, eq=False)
class GroupParts:
    """The numbers of a group.

    Attributes
    ----------
    name : str
        Name of the group.
    modules : tuple of str
        Paths of the adapted modules, one a slice.
    shape : (int, int)
        Shape (m, n) of one ΔW_k.
    slice_ranks : tuple of int
        Rank r_k that each ΔW_k had before.
    left, core, right : ndarray (m, p), (K, p, q), (n, q)
        U, G and V; p and q are 0 where nothing is shared.
    private : tuple of (ndarray, ndarray)
        P_k (m × c_k) and Q_k (n × c_k) of every slice; c_k may be 0. Empty where no slice has any.
    embedding : bool
        Whether the modules are embeddings, whose weights are n × m.
    """

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    slice_ranks: tuple[int, ...]
    left: np.ndarray
    core: np.ndarray
    right: np.ndarray
    private: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    embedding: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Ranks (p, q) of the shared part, (0, 0) where there is none."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def private_ranks(self) -> tuple[int, ...]:
        """Width c_k of the private part of every slice; empty where no slice has any."""
        return tuple(left.shape[1] for left, _ in self.private)


def group_parts(adapter: LotrAdapter | CompressedAdapter) -> tuple[GroupParts, ...]:
    """Return the groups of an adapter in parts; those of a compressed one in float64."""
    if isinstance(adapter, LotrAdapter):
        return tuple(_of_lotr(group) for group in adapter.groups)
    return tuple(_of_compressed(group) for group in adapter.groups)


def _of_lotr(group: LotrGroup) -> GroupParts:
    return GroupParts(
        name=group.name,
        modules=group.modules,
        shape=group.shape,
        slice_ranks=group.slice_ranks,
        left=group.left,
        core=group.tucker2().core,
        right=group.right,
        embedding=group.embedding,
    )


def _of_compressed(group: CompressedGroup) -> GroupParts:
    (m, n), slices = group.shape, len(group.modules)
    left, core, right = np.zeros((m, 0)), np.zeros((slices, 0, 0)), np.zeros((n, 0))
    if group.stack.shared is not None:
        left, core, right = group.stack.shared.factors()
    pairs = [terms.factors() for terms in group.stack.private]
    return GroupParts(
        name=group.name,
        modules=group.modules,
        shape=group.shape,
        slice_ranks=group.slice_ranks,
        left=left,
        core=core,
        right=right,
        private=tuple((b, a.T) for b, a in pairs) if any(group.private_ranks) else (),
        embedding=group.embedding,
    )
