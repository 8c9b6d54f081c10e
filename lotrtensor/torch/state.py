"""LoTR layers to and from state dicts, adapters in memory and native directories."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import LotrGroup
from lotrtensor.errors import FormatError, OptionError, UnsupportedAdapterError
from lotrtensor.torch.apply import TABLE, factor_table, inject, lotr_layers, set_trainable
from lotrtensor.torch.groups import GroupPlan, Rank, check_model, check_plans
from lotrtensor.torch.shared_weights import weight_users
from lotrtensor.torch.sources import Source, as_lotr, from_numpy, to_numpy


def lotr_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the part of ``model.state_dict()`` that is LoTR's: factors once, cores.

    Parameters
    ----------
    model : nn.Module
        A model with LoTR layers, of `apply_lotr` or `load_lotr`.

    Returns
    -------
    dict of str to Tensor
        ``model.load_state_dict(state, strict=False)`` puts it back.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> sorted(lotr.lotr_state_dict(model))
    ['0.lotr_core', '1.lotr_core', 'lotr_factors.:*.left', 'lotr_factors.:*.right']
    """
    factor_table(model)
    return {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(TABLE + ".") or key.endswith(".lotr_core")
    }


def load_lotr(
    model: nn.Module,
    source: Source,
    *,
    rank: Rank | None = None,
    group_by: str = "type",
    train: str | None = None,
) -> nn.Module:
    """Give ``model`` the layers and numbers of a trained adapter, in place.

    Parameters
    ----------
    model : nn.Module
        The base model; or one that has these LoTR layers already, which are filled.
    source : path-like, LotrAdapter, LoraAdapter, or mapping of str to tensor
        A LoTR; or a LoRA or weight deltas ΔW_k (m × n) by path, which are brought into LoTR form
        first: fine-tuning then goes on from where they were.
    rank : int or (int, int), optional
        Ranks to bring them to.
    group_by : str
        Grouping to do so with.
    train : str, optional
        ``"all"`` or ``"cores"`` to train on; not given, nothing trains.

    Returns
    -------
    nn.Module
        ``model``, for chaining.

    Raises
    ------
    FormatError, ShapeError
        If the adapter was made for another model: layers are missing, or have other shapes; or if
        layers to be filled are merged. The model is as it was.
    UnsupportedAdapterError
        If another source than a LoTR is given without ``rank``, or the adapter carries tensors
        besides its update.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> lotr.load_lotr(base, lotr.to_adapter(model), train="cores")[0].lotr_core.shape
    torch.Size([2, 2])
    """
    check_model(model)
    adapter = as_lotr(source, rank=rank, group_by=group_by)
    if adapter.extras:
        raise UnsupportedAdapterError(
            f"the adapter carries {next(iter(adapter.extras))!r} besides its update, which would "
            "be lost; load it with lotrtensor.peft"
        )
    plans = adapter_plans(adapter)
    fresh = TABLE not in model._modules
    if fresh:
        check_plans(plans, dict(model.named_modules()))
        if adapter.config.get("ensure_weight_tying"):
            _check_untied(model, plans)
        inject(model, plans)
    else:
        _check_same(model, plans)
    _fill(model, adapter)
    if train is not None:
        set_trainable(model, train)
    elif fresh:
        model.requires_grad_(False)
    return model


def adapter_plans(adapter: LotrAdapter) -> tuple[GroupPlan, ...]:
    """Return the groups of an adapter as plans; scales are in its cores already."""
    return tuple(
        GroupPlan(
            name=group.name,
            modules=group.modules,
            shape=group.shape,
            rank=group.rank,
            scale=1.0,
            slice_ranks=group.slice_ranks,
            embedding=group.embedding,
        )
        for group in adapter.groups
    )


def to_adapter(model: nn.Module, config: Mapping[str, Any] | None = None) -> LotrAdapter:
    """Return the LoTR layers of ``model`` as an adapter in memory, scales folded into the cores.

    Parameters
    ----------
    model : nn.Module
        A model with LoTR layers.
    config : mapping, optional
        Fields for ``adapter_config.json``, ``base_model_name_or_path`` say.

    Returns
    -------
    LotrAdapter
        Every scale is 1: it is in the cores.

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
    table = factor_table(model)
    layers = dict(lotr_layers(model))
    groups = []
    for name, factors in table.groups():
        members = {path: layer for path, layer in layers.items() if layer.factors is factors}
        groups.append(
            LotrGroup(
                name=name,
                modules=tuple(members),
                left=to_numpy(factors.left),
                right=to_numpy(factors.right),
                cores=tuple(to_numpy(layer.lotr_core * layer.scale) for layer in members.values()),
                slice_ranks=(min(factors.rank),) * len(members),
            )
        )
    return LotrAdapter(tuple(groups), dict(config or {}), groups[0].left.dtype)


def save_lotr(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write the LoTR layers of ``model`` as a native directory, factors once a group.

    The command line reads it, and so does `lotrtensor.peft`.

    Parameters
    ----------
    model : nn.Module
        A model with LoTR layers, of `apply_lotr` or `load_lotr`.
    directory : path-like
        The directory to make.
    config : mapping, optional
        As for `to_adapter`.
    force : bool
        Replace an adapter directory that stands there.

    Raises
    ------
    FormatError
        If ``directory`` exists and ``force`` is not given, or cannot be written.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> import tempfile, lotrtensor as lt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lotr.save_lotr(model, f"{folder}/adapter")
    ...     print(lt.load(f"{folder}/adapter").parameters)
    40
    """
    to_adapter(model, config).save(directory, force=force)


@torch.no_grad()
def _fill(model: nn.Module, adapter: LotrAdapter) -> None:
    table = factor_table(model)
    for group in adapter.groups:
        factors = table.of(group.name)
        factors.left.copy_(from_numpy(group.left))
        factors.right.copy_(from_numpy(group.right))
        for name, dense in zip(group.modules, group.tucker2().core, strict=True):
            layer = model.get_submodule(name)
            layer.lotr_core.copy_(from_numpy(dense) / layer.scale)  # type: ignore[operator]


def _check_untied(model: nn.Module, plans: tuple[GroupPlan, ...]) -> None:
    """Refuse an adapter whose update is meant for every layer of a weight, where there are more."""
    users = weight_users(model)
    for name in (name for plan in plans for name in plan.modules):
        layer = model.get_submodule(name)
        others = [n for n, m in users[id(layer.weight)].items() if m is not layer]
        if others:
            raise UnsupportedAdapterError(
                f"the adapter has ensure_weight_tying, and {name} shares its weight with "
                f"{others[0]}, which would have to take the same update; load it with "
                "lotrtensor.peft"
            )


def _check_same(model: nn.Module, plans: tuple[GroupPlan, ...]) -> None:
    """Refuse to fill layers that are merged, or grouped or shaped in another way."""
    layers = dict(lotr_layers(model))
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise FormatError(
            f"{merged} is merged, and could not be unmerged once its core is another; call unmerge "
            "first"
        )
    found = {
        name: (
            {path for path, layer in layers.items() if layer.factors is factors},
            factors.shape,
            factors.rank,
        )
        for name, factors in factor_table(model).groups()
    }
    expected = {plan.name: (set(plan.modules), plan.shape, plan.rank) for plan in plans}
    unlike = next((n for n in {**expected, **found} if expected.get(n) != found.get(n)), None)
    if unlike is not None:
        raise FormatError(
            f"group {unlike!r} differs: the adapter has {_describe(expected.get(unlike))}, the "
            f"model {_describe(found.get(unlike))}; load the adapter into the base model"
        )


def _describe(group: tuple[set[str], tuple[int, int], tuple[int, int]] | None) -> str:
    if group is None:
        return "no such group"
    modules, (m, n), (p, q) = group
    return f"{len(modules)} layers of {m} × {n} at rank ({p}, {q})"
