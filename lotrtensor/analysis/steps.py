"""The slider's stops: sizes in bytes, from the smallest form drawn to the adapter's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lotrtensor.analysis.in_bits import InBits, compressed_point
from lotrtensor.analysis.representations import Lotr, Representation
from lotrtensor.analysis.rows import AdapterPoint, Kind, Step
from lotrtensor.verbs._compression_job import CompressionJob

STOPS = 28
"""Sizes of the slider."""


def steps(job: CompressionJob, lotr: Lotr, every: Sequence[Representation]) -> tuple[Step, ...]:
    """One step a size: the adapter in bits, LoTR by type, and the errors of all forms."""
    compressed = next(form for form in every if isinstance(form, InBits))
    drawn = (form.curve().points[0].bytes for form in (compressed, lotr))
    sizes = _sizes(min(drawn), job.lora.bytes)
    pairs = [lotr.pairs_within(size // lotr.dtype.itemsize) for size in sizes]
    reached = iter(lotr.adapter_points([pair for pair in pairs if pair is not None]))
    found = []
    for size, pair in zip(sizes, pairs, strict=True):
        shared: AdapterPoint | None = None if pair is None else next(reached)
        points = [(form.kind, form.within(size)) for form in every]
        errors: dict[Kind, float] = {k: point.relative_error for k, point in points if point}
        in_bits = compressed_point(job, compressed.prices, lotr, size)
        found.append(Step(size, in_bits, shared, errors))
    return tuple(found)


def _sizes(smallest: int, largest: int) -> list[int]:
    """Sizes on a logarithmic scale; one where nothing is smaller than the adapter."""
    sizes = np.geomspace(smallest, max(smallest, largest), STOPS)
    return sorted({math.ceil(size * (1 - 1e-9)) for size in sizes})
