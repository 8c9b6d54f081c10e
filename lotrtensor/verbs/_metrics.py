"""Metrics of an adapter's slices, from a calibration."""

from __future__ import annotations

import math
import warnings

import numpy as np

from lotrtensor.adapters.calibration import Calibration, Moment
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.core.bits.metric import Metric
from lotrtensor.core.bits.weighted import Metrics
from lotrtensor.errors import DataError, LotrWarning

DAMPING = 0.5
"""Share of the mean eigenvalue that is added to all: directions that the calibration did not see
count by it, and without it errors of any size would be left there. Less suits larger files, more
smaller ones."""

SAME = 0.01
"""Relative difference of the norms of two updates up to which they are taken for one."""


def metrics_of(lora: LoraAdapter, calibration: Calibration) -> dict[str, Metrics]:
    """Return the metrics of every module, so that the adapter's norm in them is its plain one.

    Raises
    ------
    DataError
        If a module was not calibrated, or in another shape; or adapts an embedding.

    Warns
    -----
    LotrWarning
        If the calibration was made with another adapter.
    """
    known: dict[int, Metric] = {}
    found: dict[str, Metrics] = {}
    weighted2 = plain2 = 0.0
    other: list[str] = []
    for module in lora.modules:
        if module.embedding:
            raise DataError(f"{module.name} is an embedding, which no calibration is made for")
        moments = calibration.of(module.name, module.shape)
        for moment in (moments.outputs, moments.inputs):
            if id(moment) not in known:
                known[id(moment)] = _metric(moment)
        own = Metrics(known[id(moments.outputs)], known[id(moments.inputs)])
        found[module.name] = own
        b, a = _wide(module)
        norm2 = float(np.sum((b.T @ b) * (a @ a.T)))
        norm = math.sqrt(max(norm2, 0.0))
        if abs(norm - moments.norm) > SAME * moments.norm:
            other.append(f"{module.name} has the norm {moments.norm:.4g} and not {norm:.4g}")
        weighted2, plain2 = weighted2 + own.norm2(b, a), plain2 + norm2
    if other:
        warnings.warn(
            f"the calibration was made with another adapter, in which {other[0]}",
            LotrWarning,
            stacklevel=4,
        )
    scale = plain2 / weighted2 if weighted2 else 1.0
    return {name: Metrics(_scaled(own.outputs, scale), own.inputs) for name, own in found.items()}


def _wide(module: LoraModule) -> tuple[np.ndarray, np.ndarray]:
    b, a = module.factors()
    return b.astype(np.float64), a.astype(np.float64)


def _metric(moment: Moment) -> Metric:
    floor = (moment.left_out + DAMPING * moment.trace) / moment.size
    # As stored, or in more digits; of integers or half precision a scaled one would lose all.
    kept = np.result_type(moment.factor.dtype, np.float32)
    return Metric(moment.factor.astype(kept, copy=False), floor)


def _scaled(metric: Metric, scale: float) -> Metric:
    factor = np.asarray(math.sqrt(scale) * metric.factor, dtype=metric.factor.dtype)
    return Metric(factor, scale * metric.floor)
