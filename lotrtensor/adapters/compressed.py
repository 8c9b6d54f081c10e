"""A compressed adapter in memory: groups of modules whose updates are kept in bits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.compressed_group import Alternative, CompressedGroup, SourceRecord
from lotrtensor.adapters.formats.compressed import (
    CompressedContent,
    compressed_files,
    read_compressed,
    write_compressed,
)
from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.grouping import layer_order
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.adapters.parts import lowered, narrow_module
from lotrtensor.core.bits.stream import entropy_bits
from lotrtensor.core.options import check_flag, is_count, shown
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import RankError


class CompressedSummary(NamedTuple):
    """One row of a compressed adapter's summary.

    ``shared_ranks`` is (p, q) of the shared part, (0, 0) where there is none; ``private_ranks`` the
    number of terms of every slice; ``bits`` the mean bits of a stored number; ``relative_error`` a
    relative Frobenius error, and ``lower_bound`` what no parts of these ranks fall below, None
    where the adapter was read from a file.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 64, 4))
    >>> adapter = lt.LoraAdapter((lt.LoraModule("layers.0.q", B, A.T),), {}, np.dtype("float32"))
    >>> row = lt.compress(adapter, tolerance=0.1).summary[0]
    >>> row.group, row.slices, row.relative_error <= 0.1
    ('q', 1, True)
    """

    group: str
    slices: int
    shape: tuple[int, int]
    shared_ranks: tuple[int, int]
    private_ranks: tuple[int, ...]
    bits: float
    relative_error: float
    parameters: int
    lower_bound: float | None


@dataclass(frozen=True, eq=False)
class CompressedAdapter:
    """An adapter in bits: ΔW_k ≈ U G_k Vᵀ + P_k Q_kᵀ, codes on a grid and their scales.

    Attributes
    ----------
    groups : tuple of CompressedGroup
        The groups.
    config : mapping
        Fields of ``adapter_config.json`` beside the groups: base model, task, targets.
    source : SourceRecord
        What the adapter was stored in before: type, numbers and bytes.
    extras : mapping of str to ndarray
        Tensors carried unchanged under their own keys: fully trained modules, biases.
    alternatives : tuple of Alternative
        What other forms would reach at this size, from `compress`; no file holds it.
    weighted_error : float or None
        Of an adapter that was just compressed by a calibration, the relative error in its metric,
        √(Σ_k tr(E_kᵀ C_k E_k S_k) / Σ_k tr(ΔW_kᵀ C_k ΔW_k S_k)); no file holds it.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> lora = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> small = lt.compress(lora, tolerance=0.5, form="lora")
    >>> [row.private_ranks for row in small.summary][:2]
    [(3, 3, 1, 1, 2, 2), (3, 4, 4, 2, 2, 2)]
    >>> max(module.rank for module in small.to_lora(4).modules)
    4
    """

    groups: tuple[CompressedGroup, ...]
    config: Mapping[str, Any]
    source: SourceRecord
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = ()
    weighted_error: float | None = None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> CompressedAdapter:
        """Read a directory; see `lotrtensor.adapters.formats.compressed.read_compressed`."""
        return cls(*read_compressed(expand(directory)))

    def save(self, directory: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a native directory of format version 2, atomically.

        Raises
        ------
        FormatError
            If ``directory`` exists and ``force`` is not given, or cannot be written.
        """
        write_compressed(expand(directory), self._content, force=check_flag(force, "force"))

    @property
    def _content(self) -> CompressedContent:
        return self.groups, self.config, self.source, self.extras

    @property
    def dtype(self) -> np.dtype:
        """Type that the adapter was stored in before, and that an export has."""
        return self.source.dtype

    @property
    def parameters(self) -> int:
        """Number of stored numbers of the updates, codes all; carried tensors do not count."""
        return sum(group.parameters for group in self.groups)

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of the two files as written, config and index included, carried tensors not."""
        files = compressed_files((self.groups, self.config, self.source, {}))
        return sum(len(content) for content in files.values())

    @property
    def bytes(self) -> int:
        """The same as ``file_bytes``."""
        return self.file_bytes

    @property
    def relative_error(self) -> float:
        """Relative Frobenius error of all groups together, as stored."""
        norm2 = sum(group.norm**2 for group in self.groups)
        lost2 = sum((group.relative_error * group.norm) ** 2 for group in self.groups)
        return math.sqrt(lost2 / norm2) if norm2 else 0.0

    @property
    def lower_bound(self) -> float | None:
        """Relative error that no parts of these ranks fall below; None of a file that was read."""
        known = [(group.lower_bound, group.norm) for group in self.groups]
        norm2 = sum(norm**2 for _, norm in known)
        if any(bound is None for bound, _ in known):
            return None
        lost2 = sum((bound * norm) ** 2 for bound, norm in known if bound is not None)
        return math.sqrt(lost2 / norm2) if norm2 else 0.0

    @property
    def summary(self) -> tuple[CompressedSummary, ...]:
        """One row per group: slices, shape, ranks of both parts, numbers, mean bits, error."""
        return tuple(
            CompressedSummary(
                group=group.name,
                slices=len(group.modules),
                shape=group.shape,
                shared_ranks=group.stack.shared_ranks,
                private_ranks=group.private_ranks,
                bits=_mean_bits(group),
                relative_error=group.relative_error,
                parameters=group.parameters,
                lower_bound=group.lower_bound,
            )
            for group in self.groups
        )

    def updates(self) -> tuple[LoraModule, ...]:
        """Return every ΔW_k as thin factors in float64, exactly what is stored.

        Their rank is that of both parts together, and at least 1: a module of which nothing was
        kept has factors of zeros.
        """
        modules = [
            LoraModule(name, *group.factors(k), group.embedding)
            for group in self.groups
            for k, name in enumerate(group.modules)
        ]
        return tuple(sorted(modules, key=lambda module: layer_order(module.name)))

    @on_one_thread
    def to_lora(self, rank: int | None = None) -> LoraAdapter:
        """Return the adapter as a LoRA, in the type that it had before.

        Parameters
        ----------
        rank : int, optional
            Largest LoRA rank of a module. Not given, each module keeps the rank of its terms, at
            most the rank r_k that it had before.

        Raises
        ------
        RankError
            If ``rank`` is below 1.
        """
        if rank is not None and not is_count(rank):
            raise RankError(f"rank is {shown(rank)}; expected an integer of at least 1")
        modules = []
        for group in self.groups:
            for k, name in enumerate(group.modules):
                module = LoraModule(name, *group.factors(k), group.embedding)
                most = min(group.slice_ranks[k], rank or module.rank)
                modules.append(narrow_module(lowered(module, most), self.dtype))
        modules.sort(key=lambda module: layer_order(module.name))
        return LoraAdapter(tuple(modules), self.config, self.dtype, self.extras)


def _mean_bits(group: CompressedGroup) -> float:
    shared = group.stack.shared
    sides = [side.T for terms in group.stack.private for side in (terms.left, terms.right)]
    if shared is not None:
        sides += [shared.left.T, shared.right.T, shared.core.reshape(shared.core.shape[0], -1).T]
    bits = sum(entropy_bits(list(columns)) for columns in sides)
    return bits / group.parameters if group.parameters else 0.0
