"""Updates of fused experts, for a checkpoint that holds the experts' matrices one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from lotrtensor.adapters.expert_weights import HOLDERS, PARTS
from lotrtensor.adapters.formats.checkpoint import Checkpoint
from lotrtensor.adapters.formats.experts import parameter_path
from lotrtensor.adapters.layers import WEIGHT
from lotrtensor.adapters.names import NameIndex
from lotrtensor.verbs._changes import Factors, Update


def fit_experts(updates: Mapping[str, Update], source: Checkpoint) -> dict[str, Update]:
    """Return updates with those of fused experts as the checkpoint holds their weights.

    transformers joins the matrices of experts when it loads them (``gate_proj`` over ``up_proj``),
    and takes them apart again when it saves: an update of the joined matrix is one of each.

    Parameters
    ----------
    updates : mapping of str to Update
        Updates by module.
    source : Checkpoint
        The base, fused experts as weights of their own.
    """
    index = NameIndex(name for name in source.tensors if name.endswith(WEIGHT))
    found: dict[str, Update] = {}
    for module, update in updates.items():
        parts = [] if parameter_path(module) is None else _parts(module, index)
        rows = update.shape[0] // max(len(parts), 1)
        if not parts:
            found[module] = update
        for k, name in enumerate(parts):
            own = partial(_rows, update.factors, k * rows, (k + 1) * rows)
            found[name] = replace(update, shape=(rows, update.shape[1]), factors=own)
    return found


def _parts(module: str, index: NameIndex) -> tuple[str, ...] | list[str]:
    """Modules that hold the rows of an expert's matrix; none where it has its own weight."""
    path, _, parameter = module.rpartition(".")
    if index.find(module + WEIGHT):
        return ()
    new, old = HOLDERS
    for holder in (path, path.replace(new, old)):
        for names in PARTS.get(parameter, ()):
            candidates = [f"{holder}.{name}" for name in names]
            if all(index.find(name + WEIGHT) for name in candidates):
                return candidates
    return ()


def _rows(factors: Factors, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    b, a = factors()
    return b[start:stop], a
