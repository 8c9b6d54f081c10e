"""An analysis as one JSON document: what the page draws and ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import lotrtensor
from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.analysis.rows import (
    AdapterPoint,
    Analysis,
    Curve,
    GroupAnalysis,
    Similarity,
    Step,
    Target,
)
from lotrtensor.report.documents import Document

DIGITS = 5
"""Significant digits of a number that is not counted."""

SPECTRUM = 160
"""Singular values of a spectrum, at most: the leading ones, then ever fewer."""


def analysis_document(
    names: Sequence[str],
    adapters: Sequence[Adapter],
    analyses: Sequence[Analysis],
    alike: Similarity | None,
) -> Document:
    """One entry an adapter and, of several, how alike they are. Errors have `DIGITS` digits."""
    rows = zip(names, adapters, analyses, strict=True)
    document = {
        "lotrtensor": lotrtensor.__version__,
        "adapters": [_adapter(*row) for row in rows],
        "similarity": None if alike is None else _similarity(names, alike),
    }
    return {key: _short(value) for key, value in document.items()}


def _adapter(name: str, adapter: Adapter, analysis: Analysis) -> Document:
    recommended = analysis.recommended
    return {
        "name": name,
        "type": _type(adapter),
        "base_model": adapter.config.get("base_model_name_or_path"),
        "dtype": adapter.dtype.name,
        "stored_bytes": adapter.bytes,
        "source_parameters": analysis.source_parameters,
        "source_bytes": analysis.source_bytes,
        "recommendation": analysis.recommendation,
        "recommended": recommended._asdict() if recommended else None,
        "choices": [choice._asdict() for choice in analysis.choices],
        "targets": [_target(target) for target in analysis.targets],
        "curves": [_curve(curve) for curve in analysis.curves],
        "groups": [_group(group, analysis.itemsize) for group in analysis.groups],
        "steps": [_step(step) for step in analysis.steps],
        "overlap": {
            "left": _matrix(analysis.left_overlap),
            "right": _matrix(analysis.right_overlap),
            "groups": list(analysis.compared),
        },
    }


def _type(adapter: Adapter) -> str:
    if isinstance(adapter, LoraAdapter):
        return "LORA"
    return "COMPRESSED" if isinstance(adapter, CompressedAdapter) else "LOTR"


def _target(target: Target) -> Document:
    point = target.point
    return {
        "kind": target.kind,
        "representation": target.representation,
        "tolerance": target.tolerance,
        "bytes": point.bytes if point else None,
        "parameters": point.parameters if point else None,
        "relative_error": point.relative_error if point else None,
    }


def _curve(curve: Curve) -> Document:
    return {
        "kind": curve.kind,
        "representation": curve.representation,
        "bytes": [point.bytes for point in curve.points],
        "parameters": [point.parameters for point in curve.points],
        "relative_error": [point.relative_error for point in curve.points],
        "lower_bound": [point.lower_bound for point in curve.points],
    }


def _group(group: GroupAnalysis, itemsize: int) -> Document:
    return {
        "name": group.name,
        "shape": list(group.shape),
        "parameters": group.parameters,
        "norm": group.norm,
        "modules": [module._asdict() for module in group.modules],
        "rates": {
            "p": [rate.p for rate in group.rates],
            "q": [rate.q for rate in group.rates],
            "parameters": [rate.parameters for rate in group.rates],
            "bytes": [rate.parameters * itemsize for rate in group.rates],
            "relative_error": [rate.relative_error for rate in group.rates],
            "lower_bound": [rate.lower_bound for rate in group.rates],
        },
        "spectrum": {
            "left": _spectrum(group.left_values),
            "right": _spectrum(group.right_values),
        },
        "overlap": {
            "left": _matrix(group.left_overlap),
            "right": _matrix(group.right_overlap),
            "modules": list(group.compared),
            "chance": list(group.chance),
        },
    }


def _spectrum(values: np.ndarray) -> Document:
    """Singular values and their numbers from 1; zeros at the end are left out."""
    above = int(np.sum(values > 1e-7 * values[0])) if values[0] > 0 else 1
    kept = np.arange(above)
    if above > SPECTRUM:
        kept = np.unique(np.geomspace(1, above, SPECTRUM).round().astype(int)) - 1
    return {"index": (kept + 1).tolist(), "value": values[kept].tolist()}


def _step(step: Step) -> Document:
    return {
        "bytes": step.bytes,
        "compressed": _point(step.compressed),
        "lotr": _point(step.lotr),
        "alternatives": dict(step.alternatives),
    }


def _point(point: AdapterPoint | None) -> Document | None:
    if point is None:
        return None
    return {
        "bytes": point.bytes,
        "relative_error": point.relative_error,
        "lower_bound": point.lower_bound,
        "groups": [
            {
                "p": group.p,
                "q": group.q,
                "terms": group.terms,
                "bytes": group.bytes,
                "relative_error": group.relative_error,
                "lower_bound": group.lower_bound,
                "module_errors": group.slice_errors.tolist(),
            }
            for group in point.groups
        ],
    }


def _similarity(names: Sequence[str], alike: Similarity) -> Document:
    return {
        "adapters": list(names),
        "cosine": _matrix(alike.cosine),
        "shared_modules": alike.shared.tolist(),
        "kinds": [
            {"name": kind, "cosine": _matrix(table)} for kind, table in alike.by_kind.items()
        ],
    }


def _matrix(table: np.ndarray) -> list[list[float | None]]:
    """Rows of shares with three decimals; None where there is none."""
    return [[None if np.isnan(value) else round(float(value), 3) for value in row] for row in table]


def _short(value: Any) -> Any:
    """Numbers with no more digits than they deserve: half the size, and easier to read."""
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return value
