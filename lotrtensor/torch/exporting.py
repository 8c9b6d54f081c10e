"""LoTR layers of a model as an adapter in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.adapters.parts import thin_module
from lotrtensor.errors import OptionError
from lotrtensor.torch.apply import factor_table, lotr_layers
from lotrtensor.torch.expert_slices import slice_name
from lotrtensor.torch.experts import LotrExpertsUpdate
from lotrtensor.torch.groups import slot_of
from lotrtensor.torch.linear import LotrLinear
from lotrtensor.torch.sources import to_numpy


def to_adapter(
    model: nn.Module, config: Mapping[str, Any] | None = None
) -> LotrAdapter | LoraAdapter:
    """Return the LoTR layers of ``model`` as an adapter in memory, scales folded into the cores.

    Parameters
    ----------
    model : nn.Module
        A model with LoTR layers.
    config : mapping, optional
        Fields for ``adapter_config.json``, ``base_model_name_or_path`` say.

    Returns
    -------
    LotrAdapter or LoraAdapter
        Every scale is 1: it is in the cores. Where layers have private parts, or no shared one, as
        a compressed adapter gives them, they are no LoTR and become a LoRA: exactly the same
        update, which `lotrtensor.compress` makes small again.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> lotr.to_adapter(model).groups[0].modules
    ('0', '1')
    """
    if not isinstance(config, Mapping | None):
        raise OptionError(f"config is {config!r}; expected a mapping of fields")
    table, layers = factor_table(model), dict(lotr_layers(model))
    config = dict(config or {})
    stacks = sorted(path for path, x in layers.items() if isinstance(x, LotrExpertsUpdate))
    if stacks:  # which tells them from experts that are modules of their own
        config.setdefault("target_parameters", stacks)
    if any(layer.factors is None or layer.private_rank for layer in layers.values()):
        modules = tuple(m for name, layer in layers.items() for m in _as_lora(name, layer))
        kinds = [p.dtype for layer in layers.values() for p in layer.parameters(recurse=False)]
        dtype = to_numpy(torch.zeros(0, dtype=kinds[0] if kinds else torch.float32)).dtype
        return LoraAdapter(modules, dict(config or {}), dtype)
    groups = []
    for name, factors in table.groups():
        members = {path: layer for path, layer in layers.items() if layer.factors is factors}
        cores = {n: core for path, layer in members.items() for n, core in cores_of(path, layer)}
        groups.append(
            LotrGroup(
                name=name,
                modules=tuple(cores),
                left=to_numpy(factors.left),
                right=to_numpy(factors.right),
                cores=tuple(to_numpy(core) for core in cores.values()),
                slice_ranks=(min(factors.rank),) * len(cores),
            )
        )
    return LotrAdapter(tuple(groups), dict(config or {}), groups[0].left.dtype)


def cores_of(path: str, layer: LotrLinear | LotrExpertsUpdate) -> Iterator[tuple[str, Tensor]]:
    """Cores of a layer, or of the experts of a parameter, by path, scale included."""
    if isinstance(layer, LotrExpertsUpdate):
        experts, _, parameter = path.rpartition(".")
        for k, core in enumerate(layer.lotr_core):
            yield slice_name(experts, k, parameter), layer.scale * core
    elif layer.lotr_core is not None:
        yield path, layer.scale * layer.lotr_core


def paths_of(path: str, layer: LotrLinear | LotrExpertsUpdate) -> list[str]:
    """Path of a layer, or those of the experts of a parameter."""
    return [n for n, _ in cores_of(path, layer)] if isinstance(layer, LotrExpertsUpdate) else [path]


def _as_lora(name: str, layer: LotrLinear | LotrExpertsUpdate) -> Iterator[LoraModule]:
    """ΔW of a layer as thin factors in float64, from the numbers that it has."""
    if isinstance(layer, LotrExpertsUpdate):
        left, right = _wide(layer.factors.left), _wide(layer.factors.right)
        for path, own in cores_of(name, layer):
            shape = len(left), len(right)
            yield thin_module(path, (left, _wide(own), right), None, shape)
        return
    factors, core = layer.factors, layer.lotr_core
    shared = private = None
    if factors is not None and core is not None:
        shared = _wide(factors.left), layer.scale * _wide(core), _wide(factors.right)
    if layer.lotr_private_left is not None and layer.lotr_private_right is not None:
        private = _wide(layer.lotr_private_left), _wide(layer.lotr_private_right)
    yield thin_module(name, shared, private, slot_of(name, layer.base).shape)


def _wide(x: Tensor) -> np.ndarray:
    return to_numpy(x.double())
