"""The changes that merging an adapter makes: updates added, tensors replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lotrtensor.adapters.formats.carried import PREFIX, carried_tensors
from lotrtensor.adapters.formats.checkpoint import Checkpoint
from lotrtensor.adapters.formats.image_names import is_difference
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.names import NameIndex
from lotrtensor.adapters.quantised import quantised_modules, refuse_quantised
from lotrtensor.errors import FormatError

Factors = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Makes the factors B (m × r) and A (r × n) of one module's ΔW when they are asked for."""


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one module: shape of ΔW, whether it is an embedding's, and its factors."""

    shape: tuple[int, int]
    embedding: bool
    factors: Factors

    def turned(self) -> Update:
        """Return ΔWᵀ, for a weight that is stored in × out."""
        return replace(self, shape=self.shape[::-1], factors=partial(_transposed, self.factors))


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of one stored tensor: ``update`` is added to it, or ``full`` replaces it."""

    update: Update | None = None
    full: np.ndarray | None = None

    def equals(self, other: Change) -> bool:
        """Whether two changes are the same, up to rounding: what tied weights must have."""
        if self.full is not None and other.full is not None:
            return np.array_equal(self.full, other.full)
        if self.update is None or other.update is None:
            return False
        if self.update.shape != other.update.shape:
            return False
        (b, a), (d, c) = self.update.factors(), other.update.factors()
        # ‖B A − D C‖ from the triangles of thin QRs; nothing of the weights' size is made.
        left = np.linalg.qr(np.hstack([b, -d]).astype(np.float64))[1]
        right = np.linalg.qr(np.hstack([a.T, c.T]).astype(np.float64))[1]
        whole = np.linalg.norm(left[:, : b.shape[1]] @ right[:, : b.shape[1]].T)
        return bool(np.linalg.norm(left @ right.T) <= _SAME * whole)


_SAME = 1e-2
"""Relative difference up to which two updates are one: both were rounded to half precision."""


def updates_of(adapter: Adapter) -> dict[str, Update]:
    """Return the updates of an adapter by module."""
    if isinstance(adapter, LoraAdapter):
        modules = adapter.modules
        return {m.name: Update(m.shape, m.embedding, m.factors) for m in modules}
    return {
        name: Update(group.shape, group.embedding, partial(group.factors, k))
        for group in adapter.groups
        for k, name in enumerate(group.modules)
    }


def _transposed(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    b, a = factors()
    return a.T, b.T


def carried_changes(
    source: Checkpoint,
    extras: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    updates: Mapping[str, Change],
    rename: Callable[[str], str],
) -> tuple[dict[str, Change], list[str]]:
    """Return the tensors of a checkpoint that an adapter carries in full and that differ.

    Also return what the user is told of these, and of those dropped because the base has them.

    Parameters
    ----------
    source : Checkpoint
        The base.
    extras : mapping of str to ndarray
        What the adapter carries, under PEFT's keys.
    config : mapping
        The adapter's config, which says whether biases were trained.
    updates : mapping of str to Change
        What is added to weights.
    rename : callable
        Makes today's name of a key.

    Raises
    ------
    FormatError
        If the checkpoint has no place for one, or the adapter was trained on another weight.
    DataError
        If the base's is quantised.
    """
    index, packed = NameIndex(source.tensors), quantised_modules(source)
    kinds = carried_tensors(extras, config)
    changes, same = {}, []
    for key, tensor in extras.items():
        plain = re.sub(r"\.modules_to_save(\.default)?\.", ".", key.removeprefix(PREFIX))
        name = plain.replace(".base_layer.", ".")
        found = index.find(rename(name))
        if len(found) == 1 and found[0].rpartition(".")[0] in packed:
            raise refuse_quantised(source, packed[found[0].rpartition(".")[0]])
        fits = len(found) == 1 and source.tensors[found[0]].shape == tensor.shape
        if not fits:
            shape = source.tensors[found[0]].shape if len(found) == 1 else None
            raise FormatError(
                f"the adapter carries {key} {tensor.shape}, for which {source.directory} has "
                + (f"{found[0]} {shape}" if shape else f"{len(found) or 'no'} tensors")
                + (
                    "; it is the difference of a whole tensor, which merging does not add: leave "
                    "it out of the file, or merge the file with what it was made for"
                    if is_difference(key)
                    else "; use PEFT's merge_and_unload"
                )
            )
        if _same(tensor, source.read(found[0])):
            same.append(key)
        elif (name != plain and kinds[key].kind != "bias") or found[0] in updates:
            raise FormatError(
                f"the adapter carries {key}, which is not the weight of {source.directory}: it "
                "was trained on another base; use PEFT's merge_and_unload"
            )
        else:
            changes[found[0]] = Change(full=tensor)
    notes = [
        f"{len(names)} tensors that the adapter carries {what}, such as {names[0]}"
        for names, what in (
            (same, "equal the base's and are dropped"),
            (list(changes), "replace the base's"),
        )
        if names
    ]
    return changes, notes


def _same(carried: np.ndarray, weight: np.ndarray) -> bool:
    """Whether a carried weight is the base's, perhaps saved in a narrower type."""
    narrow = min(carried.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    return np.array_equal(carried.astype(narrow), weight.astype(narrow))
