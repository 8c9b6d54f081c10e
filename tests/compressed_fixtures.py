"""Compressed adapters made by hand, and their dense ΔW straight from the codes."""

from __future__ import annotations

from typing import Any

import numpy as np

import lotrtensor as lt
from lotrtensor.adapters.compressed_group import CompressedGroup, SourceRecord
from lotrtensor.core.bits.shared import QuantisedTucker2
from lotrtensor.core.bits.stack import QuantisedStack
from lotrtensor.core.bits.terms import QuantisedTerms

Shape = tuple[int, int]


def codes(rows: int, columns: int, start: int, largest: int) -> np.ndarray:
    """Different integers of both signs, no column zero."""
    values = (np.arange(rows * columns) * 37 + start) % (2 * largest + 1) - largest
    return values.reshape(rows, columns).astype(np.int16)


def terms(shape: Shape, rank: int, start: int, largest: int) -> QuantisedTerms:
    """A slice's own terms."""
    values = np.array([0.75, -0.5, 3.0])[:rank]
    left, right = (codes(side, rank, start + i * 5, largest) for i, side in enumerate(shape))
    return QuantisedTerms(left, values, right)


def shared(shape: Shape, ranks: Shape, slices: int, step: float = 0.25) -> QuantisedTucker2:
    """A shared part."""
    (m, n), (p, q) = shape, ranks
    core = codes(slices, p * q, 9, 2).reshape(slices, p, q)
    return QuantisedTucker2(codes(m, p, 1, 3), core, codes(n, q, 4, 5), step)


def group(
    name: str,
    modules: list[str],
    shape: Shape,
    ranks: Shape = (0, 0),
    private: tuple[int, ...] = (),
    **fields: Any,
) -> CompressedGroup:
    """A group with a shared part of these ranks and private parts of these ranks."""
    own_ranks = private or (0,) * len(modules)
    own = tuple(terms(shape, rank, k + 2, 3) for k, rank in enumerate(own_ranks))
    part = shared(shape, ranks, len(modules)) if min(ranks) else None
    most = min(*shape, max(1, min(ranks) + max(own_ranks)))
    return CompressedGroup(
        name=name,
        modules=tuple(modules),
        shape=shape,
        slice_ranks=(most,) * len(modules),
        stack=QuantisedStack(part, own),
        relative_error=0.25,
        norm=8.0,
        **fields,
    )


def adapter(*groups: CompressedGroup, **config: Any) -> lt.CompressedAdapter:
    """An adapter of these groups."""
    return lt.CompressedAdapter(groups, config, SourceRecord(np.dtype("float32"), 100, 400))


def dense_updates(adapter: lt.CompressedAdapter) -> dict[str, np.ndarray]:
    """ΔW of every module in float64, from the codes of an adapter in memory."""
    found = {}
    for group in adapter.groups:
        part = group.stack.shared
        for k, (name, own) in enumerate(zip(group.modules, group.stack.private, strict=True)):
            found[name] = np.zeros(group.shape)
            if part is not None:
                left, right = (x / np.linalg.norm(x, axis=0) for x in (part.left, part.right))
                found[name] += left @ (part.step * part.core[k]) @ right.T
            left, right = (x / np.linalg.norm(x, axis=0) for x in (own.left, own.right))
            found[name] += (left * own.values) @ right.T
    return found
