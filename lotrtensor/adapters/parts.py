"""Updates in parts, ΔW_k = U G_k Vᵀ + P_k Q_kᵀ, as plain numbers: what is loaded into a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lotrtensor.adapters.compressed_group import CompressedGroup
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.modules import LoraModule, module_stack
from lotrtensor.adapters.rounding import narrowed
from lotrtensor.core.slice_svd import slice_svds, truncate_slices


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

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> left, core, right = np.ones((4, 2)), np.ones((1, 2, 3)), np.ones((5, 3))
    >>> parts = lt.GroupParts("q", ("layers.0.q",), (4, 5), (2,), left, core, right)
    >>> parts.rank, parts.private_ranks
    ((2, 3), ())
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


def group_parts(
    groups: Iterable[LotrGroup | CompressedGroup | GroupParts],
) -> tuple[GroupParts, ...]:
    """Return the groups of an adapter in parts; those of a compressed one in float64."""
    return tuple(map(_parts, groups))


def _parts(group: LotrGroup | CompressedGroup | GroupParts) -> GroupParts:
    if isinstance(group, GroupParts):
        return group
    return _of_lotr(group) if isinstance(group, LotrGroup) else _of_compressed(group)


def thin_module(
    name: str,
    shared: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    private: tuple[np.ndarray, np.ndarray] | None,
    shape: tuple[int, int],
    *,
    embedding: bool = False,
) -> LoraModule:
    """Return U G Vᵀ + P Qᵀ as thin factors in float64, of no rank above the sides.

    Parameters
    ----------
    name : str
        Path of the module.
    shared : (ndarray (m, p), ndarray (p, q), ndarray (n, q)) or None
        U, G and V.
    private : (ndarray (m, c), ndarray (n, c)) or None
        P and Q.
    shape : (int, int)
        Shape (m, n); the update is zero, of rank 1, where there is neither part.
    embedding : bool
        Whether the module is an embedding.
    """
    (m, n), lefts, rights = shape, [], []
    if shared is not None:
        left, core, right = (x.astype(np.float64) for x in shared)
        narrow = left.shape[1] <= right.shape[1]
        lefts.append(left if narrow else left @ core)
        rights.append(core @ right.T if narrow else right.T)
    if private is not None:
        lefts.append(private[0].astype(np.float64))
        rights.append(private[1].astype(np.float64).T)
    if not lefts:
        return LoraModule(name, np.zeros((m, 1)), np.zeros((1, n)), embedding)
    module = LoraModule(name, np.hstack(lefts), np.vstack(rights), embedding)
    return lowered(module, min(module.rank, m, n))


def lowered(module: LoraModule, rank: int) -> LoraModule:
    """Return the best module of at most ``rank``, its singular values shared evenly by both sides.

    Parameters
    ----------
    module : LoraModule
        ΔW = B A.
    rank : int
        At least 1.
    """
    svds = slice_svds(module_stack([module]))
    b, a = truncate_slices(svds, [min(rank, len(svds[0].values))]).factors(0)
    return LoraModule(module.name, b, a, module.embedding)


def narrow_module(module: LoraModule, dtype: np.dtype) -> LoraModule:
    """Return the module as it is worked with before it is stored in ``dtype``; see `narrowed`."""
    b, a = narrowed(*module.factors(), dtype)
    return LoraModule(module.name, b, a, module.embedding)


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
