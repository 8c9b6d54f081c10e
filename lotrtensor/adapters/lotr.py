"""A LoTR adapter in memory: groups of modules that share their factors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.native import read_lotr, write_lotr
from lotrtensor.adapters.formats.tensors import is_large
from lotrtensor.adapters.grouping import layer_order
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.modules import LazyModule, LoraModule
from lotrtensor.adapters.parts import lowered, narrow_module
from lotrtensor.adapters.rounding import narrowed
from lotrtensor.core.balanced import balanced_factors
from lotrtensor.core.options import check_flag, is_count, shown
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import RankError


class GroupSummary(NamedTuple):
    """One row of a LoTR adapter's summary.

    Errors are relative Frobenius errors, None where the group was trained; parameters are stored
    numbers, bytes their size as stored.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> row = lt.convert(adapter, rank=8).summary[0]
    >>> row.group, row.slices, row.ranks, row.parameters
    ('attention.output.dense', 6, (8, 8), 6528)
    """

    group: str
    slices: int
    shape: tuple[int, int]
    ranks: tuple[int, int]
    relative_error: float | None
    lower_bound: float | None
    parameters: int
    bytes: int


@dataclass(frozen=True, eq=False)
class LotrAdapter:
    """A LoTR adapter: the groups, and what travels with them.

    Attributes
    ----------
    groups : tuple of LotrGroup
        The groups.
    config : mapping
        Fields of ``adapter_config.json`` beside the groups: base model, task, targets.
    dtype : numpy dtype
        Type that factors and cores are stored in.
    extras : mapping of str to ndarray
        Tensors carried unchanged under their own keys: fully trained modules, biases.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> lotr = lt.convert(adapter, rank=8)
    >>> len(lotr.groups), lotr.bytes, round(lotr.relative_error, 2)
    (6, 115200, 0.6)
    >>> lotr.to_lora().modules[0].rank
    8
    """

    groups: tuple[LotrGroup, ...]
    config: Mapping[str, Any]
    dtype: np.dtype
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> LotrAdapter:
        """Read a native directory; see `lotrtensor.adapters.formats.native.read_lotr`."""
        return cls(*read_lotr(expand(directory)))

    def save(self, directory: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a native LoTR directory, atomically.

        Raises
        ------
        FormatError
            If ``directory`` exists and ``force`` is not given, or cannot be written.
        """
        content = (self.groups, self.config, self.dtype, self.extras)
        write_lotr(expand(directory), content, force=check_flag(force, "force"))

    @property
    def parameters(self) -> int:
        """Number of stored numbers of the updates; carried tensors do not count."""
        return sum(group.parameters for group in self.groups)

    @property
    def bytes(self) -> int:
        """Bytes of the updates as stored: parameters × itemsize."""
        return self.parameters * self.dtype.itemsize

    @property
    def relative_error(self) -> float | None:
        """Relative Frobenius error of all groups together; None if one was not fitted."""
        return self._whole("relative_error")

    @property
    def lower_bound(self) -> float | None:
        """Smallest relative error that any factors of these groups and ranks reach."""
        return self._whole("lower_bound")

    @property
    def source_parameters(self) -> int | None:
        """Numbers that the adapter this one was fitted to is stored in."""
        fits = [group.fit for group in self.groups]
        return None if None in fits else sum(fit.parameters for fit in fits if fit)

    @property
    def source_bytes(self) -> int | None:
        """Bytes that the adapter this one was fitted to is stored in."""
        fits = [group.fit for group in self.groups]
        return None if None in fits else sum(fit.bytes for fit in fits if fit)

    @property
    def summary(self) -> tuple[GroupSummary, ...]:
        """One row per group: slices, shape, ranks, errors, parameters, bytes."""
        return tuple(
            GroupSummary(
                group=group.name,
                slices=len(group.modules),
                shape=group.shape,
                ranks=group.rank,
                relative_error=group.fit.relative_error if group.fit else None,
                lower_bound=group.fit.lower_bound if group.fit else None,
                parameters=group.parameters,
                bytes=group.parameters * self.dtype.itemsize,
            )
            for group in self.groups
        )

    @on_one_thread
    def to_lora(self, rank: int | None = None) -> LoraAdapter:
        """Return the adapter as a LoRA, B_k = U P_k and A_k = Q_k Vᵀ with P_k Q_k ≈ G_k.

        Its factors are in float64, or, of an adapter in half precision, in float32; those of a
        large one are made when they are asked for.

        Parameters
        ----------
        rank : int, optional
            Largest LoRA rank of a module. Not given, each module gets the rank r_k that it had
            before, at most min(p, q): the core of a converted LoRA has no higher one, so nothing
            is lost. A lower rank keeps the leading singular values of each core, which is the
            best LoRA of that rank because U and V are orthonormal.

        Raises
        ------
        RankError
            If ``rank`` is below 1.
        """
        if rank is not None and not is_count(rank):
            raise RankError(f"rank is {shown(rank)}; expected an integer of at least 1")
        modules: list[LoraModule] = []
        numbers = sum(
            sum(group.shape) * _lora_rank(group, k, rank)
            for group in self.groups
            for k in range(len(group.modules))
        )
        large = is_large(numbers * self.dtype.itemsize)
        for group in self.groups:
            found = _lora_modules(group, rank, self.dtype)
            modules += found if large else [module.held() for module in found]
        modules.sort(key=lambda module: layer_order(module.name))
        return LoraAdapter(tuple(modules), self.config, self.dtype, self.extras)

    def _whole(self, name: str) -> float | None:
        fits = [group.fit for group in self.groups]
        if None in fits:
            return None
        parts = (SquaredError((getattr(f, name) * f.norm) ** 2, f.norm**2) for f in fits if f)
        return sum(parts, SquaredError()).relative


def _lora_rank(group: LotrGroup, k: int, rank: int | None) -> int:
    """Rank of module ``k`` as a LoRA."""
    limit = min(group.slice_ranks[k], *group.rank)
    return limit if rank is None else min(rank, limit)


def _lowered(group: LotrGroup, k: int, rank: int | None) -> LoraModule:
    b, a = group.factors(k)
    module = LoraModule(group.modules[k], b, a, group.embedding)
    return lowered(module, _lora_rank(group, k, rank))


def _lora_modules(group: LotrGroup, rank: int | None, dtype: np.dtype) -> Sequence[LoraModule]:
    if group.thin:
        return [narrow_module(_lowered(group, k, rank), dtype) for k in range(len(group.modules))]
    # A trained U need not be orthonormal: the triangles of its QR then belong to the core.
    tucker2 = group.tucker2()
    left, left_triangle = np.linalg.qr(tucker2.left)
    right, right_triangle = np.linalg.qr(tucker2.right)
    modules = []
    for k, module in enumerate(group.modules):
        core = left_triangle @ tucker2.core[k] @ right_triangle.T
        b, a = balanced_factors(core, _lora_rank(group, k, rank))
        make = partial(_product, left, b, a, right, dtype)
        modules.append(LazyModule(module, group.shape, b.shape[1], make, group.embedding))
    return modules


def _product(
    left: np.ndarray, b: np.ndarray, a: np.ndarray, right: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    return narrowed(left @ b, a @ right.T, dtype)
