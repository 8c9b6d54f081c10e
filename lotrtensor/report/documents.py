"""Results as JSON documents: plain dicts, one a command."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.formats.layout import LAYOUT, read_layout
from lotrtensor.adapters.grouping import Slot, group_modules
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.verbs._compare import Difference, lora_factors

Document = dict[str, Any]


def dumps(document: Document) -> str:
    """Return one JSON document. A ratio to nothing, infinite in Python, is null."""
    return json.dumps(finite(document), indent=2, allow_nan=False)


def lotr_document(adapter: LotrAdapter) -> Document:
    """Errors and sizes of a LoTR adapter and of its groups; bytes count the updates as stored."""
    return {
        "relative_error": adapter.relative_error,
        "lower_bound": adapter.lower_bound,
        "parameters": adapter.parameters,
        "source_parameters": adapter.source_parameters,
        "bytes": adapter.bytes,
        "source_bytes": adapter.source_bytes,
        "dtype": adapter.dtype.name,
        "groups": [
            {
                "name": row.group,
                "modules": list(group.modules),
                "shape": list(row.shape),
                "ranks": list(row.ranks),
                "relative_error": row.relative_error,
                "lower_bound": row.lower_bound,
                "parameters": row.parameters,
            }
            for row, group in zip(adapter.summary, adapter.groups, strict=True)
        ],
    }


def compressed_document(adapter: CompressedAdapter) -> Document:
    """Errors and sizes of a compressed adapter and of its groups.

    ``file_bytes`` counts both files as written, without tensors that are carried along;
    ``alternatives`` holds what other forms would reach at that size, of an adapter just compressed,
    and ``weighted_error`` its error in the metric of the calibration, if it had one.
    """
    return {
        "relative_error": adapter.relative_error,
        "weighted_error": adapter.weighted_error,
        "lower_bound": adapter.lower_bound,
        "parameters": adapter.parameters,
        "file_bytes": adapter.file_bytes,
        "bytes": adapter.bytes,
        "source_parameters": adapter.source.parameters,
        "source_bytes": adapter.source.bytes,
        "dtype": adapter.dtype.name,
        "alternatives": [other._asdict() for other in adapter.alternatives],
        "groups": [
            {
                "name": row.group,
                "modules": list(group.modules),
                "shape": list(row.shape),
                "shared_ranks": list(row.shared_ranks),
                "private_ranks": list(row.private_ranks),
                "bits": row.bits,
                "relative_error": row.relative_error,
                "lower_bound": row.lower_bound,
                "parameters": row.parameters,
            }
            for row, group in zip(adapter.summary, adapter.groups, strict=True)
        ],
    }


def inspect_document(adapter: Adapter, group_by: str = "type") -> Document:
    """What an adapter holds: sizes, base model, groups, and ‖ΔW‖ of every module."""
    norms = {n: float(np.sqrt(s.norms2()[0])) for n, s in lora_factors(adapter).items()}
    shared = {
        "type": "LORA" if isinstance(adapter, LoraAdapter) else "LOTR",
        "base_model": adapter.config.get("base_model_name_or_path"),
        "task_type": adapter.config.get("task_type"),
        "file_style": read_layout(adapter.config).style if LAYOUT in adapter.config else None,
        "carried_tensors": sorted(adapter.extras),
    }
    if isinstance(adapter, LotrAdapter):
        document = shared | lotr_document(adapter)
    elif isinstance(adapter, CompressedAdapter):
        document = shared | compressed_document(adapter)
    else:
        document = shared | _lora_document(adapter, group_by)
    document["modules"] = [{"name": name, "norm": norm} for name, norm in norms.items()]
    return document


def difference_document(difference: Difference) -> Document:
    """How far two adapters are apart, whole and module by module."""
    return {
        "relative_error": difference.relative_error,
        "max_slice_error": difference.max_slice_error,
        "modules": [row._asdict() for row in difference.modules],
    }


def _lora_document(adapter: LoraAdapter, group_by: str) -> Document:
    modules = {module.name: module for module in adapter.modules}
    slots = [Slot(m.name, m.shape, m.embedding) for m in adapter.modules]
    return {
        "parameters": adapter.parameters,
        "bytes": adapter.bytes,
        "dtype": adapter.dtype.name,
        "groups": [
            {
                "name": name,
                "modules": [slot.name for slot in group],
                "shape": list(group[0].shape),
                "lora_ranks": sorted({modules[slot.name].rank for slot in group}),
                "parameters": sum(modules[slot.name].parameters for slot in group),
            }
            for name, group in group_modules(slots, group_by).items()
        ],
    }


def finite(value: Any) -> Any:
    """Return the value with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
