"""The shared factors of an adapter: made, filled, and let go where two are equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from lotrtensor.errors import DataError
from lotrtensor.peft.config import LotrConfig
from lotrtensor.peft.experts import cores_by_name
from lotrtensor.peft.layer import LotrLayer
from lotrtensor.peft.planning import AdapterPlan
from lotrtensor.peft.quantized import restore_order
from lotrtensor.torch.expert_slices import ExpertSlice, Layer
from lotrtensor.torch.factors import FactorTable, SharedFactors
from lotrtensor.torch.init import base_weight, init_factors
from lotrtensor.torch.linear import factor_options
from lotrtensor.torch.numbers import GroupNumbers
from lotrtensor.torch.sources import from_numpy


def make_table(
    config: LotrConfig,
    plan: AdapterPlan,
    layers: Mapping[str, Layer],
    shared: FactorTable | None,
    quantization: Mapping[str, Any],
) -> FactorTable:
    """Return the factors of a new adapter, initialised as its config says.

    Parameters
    ----------
    config : LotrConfig
        Its config.
    plan : AdapterPlan
        Its groups.
    layers : mapping of str to nn.Module or ExpertSlice
        Base layers and experts of the model by path.
    shared : FactorTable or None
        Table of the adapter whose factors are used instead of new ones.
    quantization : mapping
        What PEFT needs to know to dequantise a weight.
    """
    table = FactorTable()
    # Numbers of a file replace whatever is drawn here.
    init = "orthogonal" if config.groups is not None else config.init
    for group in plan.groups:
        if not min(group.rank):
            continue
        held = config.held.get(group.name) if shared is None else shared.of(group.name)
        if held is not None:
            table.add(group.name, held)
            continue
        options = factor_options(layers[group.modules[0]])
        factors = SharedFactors(group.shape, group.rank, **options)
        table.add(group.name, factors.requires_grad_(config.train == "all"))
        if plan.source is None:
            chosen = [layers[name] for name in group.modules] if init == "svd" else []
            init_factors(factors, init, [_dense(layer, quantization) for layer in chosen])
    return table


def _dense(layer: Layer, quantization: Mapping[str, Any]) -> Tensor:
    """Return a base weight (m × n), dequantised."""
    if isinstance(layer, ExpertSlice):
        return layer.weight
    backend = resolve_quantization_backend(layer, **quantization)
    restore_order(layer)
    return backend.get_base_weight(layer) if backend else base_weight(layer)


def source_groups(plan: AdapterPlan) -> list[GroupNumbers]:
    """Return the numbers that an adapter starts from, with the scale of the plan taken out."""
    assert plan.source is not None
    groups = []
    for group, found in zip(plan.groups, plan.source.groups, strict=True):
        cores = [from_numpy(core) / group.scale for core in found.tucker2().core]
        ordered = dict(zip(found.modules, cores, strict=True))
        groups.append(
            GroupNumbers(
                group,
                from_numpy(found.left),
                [ordered[name] for name in group.modules],
                from_numpy(found.right),
            )
        )
    return groups


@torch.no_grad()
def fill_adapter(
    model: nn.Module, table: FactorTable, adapter_name: str, groups: Iterable[GroupNumbers]
) -> None:
    """Write numbers into an adapter of ``model``; lower ranks are filled up with zeros."""
    places = cores_by_name(model, adapter_name)
    for group in groups:
        factors = table.of(group.plan.name)
        _fill(factors.left, group.left)
        _fill(factors.right, group.right)
        for name, core in zip(group.plan.modules, group.cores, strict=True):
            _fill(places[name], core)


def _fill(place: Tensor, numbers: Tensor) -> None:
    place.zero_()
    held = place[: numbers.shape[0], : numbers.shape[1]]
    held.copy_(numbers)
    if not held.any() and numbers.any():
        raise DataError(
            f"the adapter has entries up to {float(numbers.abs().max()):.3g}, which "
            f"{str(place.dtype).removeprefix('torch.')} does not hold; scale it up"
        )


def tie_equal(tables: Iterable[FactorTable], layers: Iterable[LotrLayer]) -> int:
    """Let adapters whose factors are equal to the bit hold one copy; return how many went."""
    kept: list[SharedFactors] = []
    dropped: dict[int, SharedFactors] = {}
    for table in tables:
        for name, factors in list(table.groups()):
            twin = next((k for k in kept if _equal(k, factors)), None)
            if twin is None:
                kept.append(factors)
            elif twin is not factors:
                dropped[id(factors)] = twin
                table.add(name, twin)
    layers = list(layers)
    for layer in layers:
        for user, own in layer.lotr_shared.items():
            layer.lotr_shared[user] = dropped.get(id(own), own)
    for layer in layers:
        for user, owner in layer.lotr_tied.items():
            layer.tie_to(owner, user)
    return len(dropped)


def _equal(a: SharedFactors, b: SharedFactors) -> bool:
    return a is b or (
        a.shape == b.shape
        and a.rank == b.rank
        and a.left.device == b.left.device
        and torch.equal(a.left, b.left)
        and torch.equal(a.right, b.right)
    )
