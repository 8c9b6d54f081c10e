"""Groups of updates that are to share factors: made from adapters, or split into clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lotrtensor.adapters.grouping import Slot, group_modules
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.modules import LazyModule, LoraModule, module_stack
from lotrtensor.core.clusters import cluster
from lotrtensor.core.options import shown
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import RankError


@dataclass(frozen=True, eq=False)
class SourceGroup:
    """Updates that are to share their factors, and their size in the source.

    Attributes
    ----------
    name : str
        Name of the group.
    modules : tuple of str
        Paths of the modules, one per slice.
    make : callable
        Returns their updates, a SliceStack or Tucker2; those of a large adapter at every call anew.
    shape : (int, int, int)
        Number of slices and the shape of one: (K, m, n).
    full_rank : (int, int)
        Largest left and right rank that the updates can need.
    slice_ranks : tuple of int or None
        Ranks r_k of the slices; None where they are whole matrices.
    embedding : bool
        Whether the modules are embeddings.
    parameters, bytes : int
        Size of the updates as stored in the source.
    kept : LotrGroup or None
        The source group, returned unchanged at full rank, without another rounding.
    lazy : bool
        Whether every pass reads the updates again.
    held : bool
        Whether the updates stay in memory.
    """

    name: str
    modules: tuple[str, ...]
    make: Callable[[], SliceStack | Tucker2]
    shape: tuple[int, int, int]
    full_rank: tuple[int, int]
    slice_ranks: tuple[int, ...] | None
    embedding: bool
    parameters: int
    bytes: int
    kept: LotrGroup | None = None
    lazy: bool = False
    held: bool = True

    @classmethod
    def of(cls, stack: SliceStack | Tucker2, **fields: Any) -> SourceGroup:
        """Return the group of updates that are there."""
        if isinstance(stack, Tucker2):
            return cls(make=lambda: stack, shape=stack.shape, full_rank=stack.rank, **fields)
        fields |= {"shape": stack.shape, "full_rank": stack.max_rank, "lazy": stack.lazy}
        return cls(make=lambda: stack, **fields)

    @property
    def max_rank(self) -> tuple[int, int]:
        """Largest left and right rank that the group can need."""
        return self.full_rank if self.kept is None else self.kept.rank

    @property
    def smallest(self) -> int:
        """Stored numbers of the group at ranks (1, 1)."""
        return sum(self.shape)


def lora_groups(adapter: LoraAdapter, group_by: str) -> list[tuple[str, list[LoraModule]]]:
    """Return names and modules of the groups of a LoRA; see `group_modules`."""
    modules = {module.name: module for module in adapter.modules}
    slots = [Slot(m.name, m.shape, m.embedding) for m in adapter.modules]
    return [
        (name, [modules[slot.name] for slot in group])
        for name, group in group_modules(slots, group_by).items()
    ]


def source_group(name: str, modules: Sequence[LoraModule], dtype: np.dtype) -> SourceGroup:
    """Return LoRA modules as a group; ``dtype`` is the type that they are stored in."""
    (m, n), ranks = modules[0].shape, [module.rank for module in modules]
    fields: dict[str, Any] = {
        "name": name,
        "modules": tuple(module.name for module in modules),
        "slice_ranks": tuple(min(r, m, n) for r in ranks),
        "embedding": modules[0].embedding,
        "parameters": sum(module.parameters for module in modules),
        "bytes": sum(module.bytes_in(dtype) for module in modules),
    }
    if not any(isinstance(module, LazyModule) for module in modules):
        return SourceGroup.of(module_stack(modules), **fields)
    return SourceGroup(
        make=partial(module_stack, modules),
        shape=(len(modules), m, n),
        full_rank=(min(m, sum(ranks)), min(n, sum(ranks))),
        held=False,
        **fields,
    )


def lotr_source(group: LotrGroup, dtype: np.dtype) -> SourceGroup:
    """Return a group of a LoTR; ``dtype`` is the type that it is stored in."""
    found = group.low_rank() if group.thin else group.tucker2()
    (m, n), (p, q) = group.shape, group.rank
    return SourceGroup.of(
        found,
        name=group.name,
        modules=group.modules,
        slice_ranks=tuple(min(r, m, n, p, q) for r in group.slice_ranks),
        embedding=group.embedding,
        parameters=group.parameters,
        bytes=group.parameters * dtype.itemsize,
        kept=group,
    )


def split_groups(
    groups: Sequence[tuple[str, Sequence[LoraModule]]],
    clusters: int,
    rank: tuple[int, int] | None,
) -> list[tuple[str, list[LoraModule]]]:
    """Split the slices of every group into clusters that get factors of their own; see `cluster`.

    Parameters
    ----------
    groups : sequence of (str, sequence of LoraModule)
        Names and modules of the groups.
    clusters : int
        Number of clusters per group, at most one per slice.
    rank : (int, int) or None
        Ranks that the clusters are found at; a quarter of what the group can need if not given.

    Raises
    ------
    RankError
        If ``clusters`` is no integer, or below 1.
    """
    if not isinstance(clusters, int | np.integer) or isinstance(clusters, bool):
        raise RankError(f"cluster is {shown(clusters)}; expected an integer")
    if clusters < 1:
        raise RankError(f"cluster is {shown(clusters)}; expected at least 1")
    found: list[tuple[str, list[LoraModule]]] = []
    for name, modules in groups:
        parts = min(clusters, len(modules))
        if parts == 1:
            found.append((name, list(modules)))
            continue
        stack = module_stack(modules)
        p, q = stack.max_rank
        wanted = rank or (max(1, p // 4), max(1, q // 4))
        labels = cluster(stack, parts, (min(wanted[0], p), min(wanted[1], q))).labels
        for label in range(int(labels.max()) + 1):
            members = [m for m, own in zip(modules, labels, strict=True) if own == label]
            found.append((f"{name}#{label + 1}", members))
    return found
