"""Put the numbers of another adapter into the place of a loaded one, in a compiled model too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.errors import FormatError, UnsupportedAdapterError
from lotrtensor.peft.factors import fill_adapter, source_groups
from lotrtensor.peft.layer import LotrLayer
from lotrtensor.peft.model import LotrModel
from lotrtensor.peft.planning import AdapterPlan
from lotrtensor.torch.groups import GroupPlan
from lotrtensor.torch.numbers import GroupNumbers


def hotswap_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Replace U, V and the cores of a loaded adapter by those of a directory, in place.

    Nothing is added to the model or taken out, so that a compiled model is not compiled again.
    Lower ranks are filled up with zeros. PEFT's own ``hotswap_adapter`` is for LoRA alone.

    Parameters
    ----------
    model : nn.Module
        A PEFT model of LoTR, compiled or not.
    directory : path-like
        A LoTR directory of the same groups.
    adapter_name : str
        The adapter to replace, which keeps its name.

    Raises
    ------
    FormatError
        If the model has no such adapter, or the directory other groups, layers or larger ranks.
    UnsupportedAdapterError
        If the adapter is merged, shares its factors with another adapter, or either of the two
        has more than its update. The model is as it was.
    """
    tuner = next((m for m in model.modules() if isinstance(m, LotrModel)), None)
    if tuner is None or adapter_name not in tuner.peft_config:
        known = ", ".join(map(repr, tuner.peft_config)) if tuner is not None else "no LoTR adapter"
        raise FormatError(f"the model has no adapter {adapter_name!r} to replace; it has {known}")
    adapter = LotrAdapter.load(directory)
    layers = {n: m for n, m in tuner.model.named_modules() if isinstance(m, LotrLayer)}
    config: Any = tuner.peft_config[adapter_name]
    _check_alone(layers, config, adapter, adapter_name)
    table = tuner.factor_table(adapter_name)
    plans = {plan.name: plan for plan in tuner.plans(adapter_name)}
    _check_groups(plans, adapter)
    fill_adapter(tuner.model, table, adapter_name, _groups(adapter, plans))
    tuner.retrained(adapter_name)


def _groups(adapter: LotrAdapter, plans: Mapping[str, GroupPlan]) -> list[GroupNumbers]:
    """Numbers of the directory in the order of the model, with the model's scales taken out."""
    source = {group.name: group for group in adapter.groups}
    ordered = replace(adapter, groups=tuple(source[name] for name in plans))
    return source_groups(AdapterPlan(tuple(plans.values()), ordered))


def _check_alone(
    layers: Mapping[str, LotrLayer], config: Any, adapter: LotrAdapter, adapter_name: str
) -> None:
    extra = next(iter(adapter.extras), None) or config.modules_to_save
    if extra or config.trainable_token_indices:
        raise UnsupportedAdapterError(
            f"the adapter carries {extra or 'trained tokens'} besides its update, which is not "
            "swapped; delete the adapter and load the other"
        )
    if bool(adapter.config.get("ensure_weight_tying")) != config.ensure_weight_tying:
        raise FormatError(
            f"ensure_weight_tying is {config.ensure_weight_tying} in the model and not in the "
            "directory, or the other way round; delete the adapter and load the other"
        )
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise UnsupportedAdapterError(
                f"{name} has {adapter_name!r} merged, and could not be unmerged once its numbers "
                "are others; call unmerge_adapter first"
            )
        own = layer.lotr_shared.get(adapter_name)
        users = [a for a, factors in layer.lotr_shared.items() if factors is own]
        if own is not None and len(users) > 1:
            raise UnsupportedAdapterError(
                f"{' and '.join(map(repr, users))} share their factors in {name}, and swapping "
                "would change all of them; delete the adapter and load the other"
            )


def _check_groups(plans: Mapping[str, GroupPlan], adapter: LotrAdapter) -> None:
    own = next((name for name, plan in plans.items() if plan.private_ranks), None)
    if own is not None:
        raise UnsupportedAdapterError(
            f"group {own!r} of the loaded adapter has private factors, as compressed adapters do, "
            "which are not swapped; delete the adapter and load the other"
        )
    found = {group.name: group for group in adapter.groups}
    for name in {**plans, **found}:
        plan, group = plans.get(name), found.get(name)
        same = plan is not None and group is not None and set(plan.modules) == set(group.modules)
        if not same or plan is None or group is None or plan.shape != group.shape:
            raise FormatError(
                f"group {name!r} is not the same set of layers in the model and in the directory; "
                "delete the adapter and load the other"
            )
        if any(new > old for new, old in zip(group.rank, plan.rank, strict=True)):
            raise FormatError(
                f"group {name!r} has rank {group.rank} in the directory and {plan.rank} in the "
                "model; load the adapter of the largest rank first"
            )
