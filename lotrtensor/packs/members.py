"""What a pack is made of in memory: cells that adapters share, and what is each one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.adapters.parts import GroupParts, group_parts, lowered
from lotrtensor.core.bits.basis import QuantisedBasis
from lotrtensor.errors import RankError


@dataclass(frozen=True, eq=False)
class Cell:
    """Modules of one shape whose updates, in all adapters, share a basis.

    Attributes
    ----------
    modules : tuple of str
        Paths of the modules: one, or those of all layers.
    shape : (int, int)
        Shape (m, n) of ΔW.
    basis : QuantisedBasis
        U, V and the mean core.
    cluster : int
        Cluster of adapters that share it; an adapter uses the cells of one cluster.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> lt.Cell.__dataclass_fields__.keys() >= {"modules", "shape", "basis"}
    True
    """

    modules: tuple[str, ...]
    shape: tuple[int, int]
    basis: QuantisedBasis
    cluster: int = 0


def by_cluster(cells: Iterable[Cell]) -> dict[int, tuple[Cell, ...]]:
    """Return the cells of every cluster."""
    found: dict[int, tuple[Cell, ...]] = {}
    for cell in cells:
        found[cell.cluster] = (*found.get(cell.cluster, ()), cell)
    return found


def first_cluster(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Return the cells of the largest cluster that shares anything."""
    return next(iter(by_cluster(cells).values()), ())


@dataclass(frozen=True, eq=False)
class Member:
    """An adapter of a pack: ΔW = U (w Ḡ + step · codes) Vᵀ + P Qᵀ for every module.

    Attributes
    ----------
    own : CompressedAdapter
        The private parts, P Qᵀ; all of the adapter where it uses no basis.
    cores : mapping of str to ndarray (p, q)
        Codes of the cores, by module; empty where it uses no basis.
    weight : float
        Weight w of the mean cores: the norm of the adapter.
    step : float
        Step of the cores.
    cells : mapping of str to Cell
        The cell of every module in ``cores``.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> lt.Member.__dataclass_fields__.keys() >= {"own", "cores", "weight", "step"}
    True
    """

    own: CompressedAdapter
    cores: Mapping[str, np.ndarray] = field(default_factory=dict)
    weight: float = 0.0
    step: float = 1.0
    cells: Mapping[str, Cell] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """Relative Frobenius error of the whole adapter, as stored."""
        return self.own.relative_error

    @property
    def config(self) -> Mapping[str, Any]:
        """Fields of ``adapter_config.json`` that say where the adapter belongs."""
        return self.own.config

    @property
    def extras(self) -> Mapping[str, np.ndarray]:
        """Tensors that it carries unchanged."""
        return self.own.extras

    @cached_property
    def groups(self) -> tuple[GroupParts, ...]:
        """Its groups as plain numbers: one for every cell that it uses, and those that use none."""
        slices = {
            name: (group, terms, rank)
            for group in self.own.groups
            for name, terms, rank in zip(
                group.modules, group.stack.private, group.slice_ranks, strict=True
            )
        }
        found = []
        for cell in dict.fromkeys(self.cells[name] for name in self.cores):
            names = tuple(name for name in cell.modules if name in self.cores)
            left, right = cell.basis.factors
            cores = [cell.basis.core(self.cores[n], self.step, self.weight) for n in names]
            pairs = [slices[name][1].factors() for name in names]
            own = tuple((b, a.T) for b, a in pairs)
            found.append(
                GroupParts(
                    name=names[0] if len(names) == 1 else f"{names[0]} …",
                    modules=names,
                    shape=cell.shape,
                    slice_ranks=tuple(slices[name][2] for name in names),
                    left=left,
                    core=np.stack(cores),
                    right=right,
                    private=own if any(b.shape[1] for b, _ in own) else (),
                    embedding=slices[names[0]][0].embedding,
                )
            )
        if not self.cores:
            return group_parts(self.own.groups)
        rest = [name for name in slices if name not in self.cores]
        for name in rest:
            group, terms, rank = slices[name]
            (m, n), (b, a) = group.shape, terms.factors()
            nothing = np.zeros((m, 0)), np.zeros((1, 0, 0)), np.zeros((n, 0))
            own = ((b, a.T),) if b.shape[1] else ()
            found.append(
                GroupParts(name, (name,), group.shape, (rank,), *nothing, own, group.embedding)
            )
        return tuple(found)

    def updates(self) -> tuple[LoraModule, ...]:
        """Return every ΔW as thin factors in float64, exactly what is stored."""
        modules = []
        for module in self.own.updates():
            if module.name in self.cores:
                basis = self.cells[module.name].basis
                core = basis.core(self.cores[module.name], self.step, self.weight)
                b, a = basis.slice_factors(core)
                if module.B.any():  # else a column of zeros, which stands for no terms
                    b, a = np.hstack([b, module.B]), np.vstack([a, module.A])
                module = LoraModule(module.name, b, a, module.embedding)
            modules.append(module)
        return tuple(modules)

    def to_lora(self, rank: int | None = None) -> LoraAdapter:
        """Return the adapter as a LoRA, in the type that it had before.

        Parameters
        ----------
        rank : int, optional
            Largest LoRA rank of a module. Not given, each module keeps at most the rank that it
            had before.

        Raises
        ------
        RankError
            If ``rank`` is below 1.
        """
        if not self.cores:
            return self.own.to_lora(rank)
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise RankError(f"rank is {rank!r}; expected an integer of at least 1")
        before = {
            name: own
            for group in self.own.groups
            for name, own in zip(group.modules, group.slice_ranks, strict=True)
        }
        modules = tuple(lowered(m, min(before[m.name], rank or m.rank)) for m in self.updates())
        return LoraAdapter(modules, self.own.config, self.own.dtype, self.own.extras)
