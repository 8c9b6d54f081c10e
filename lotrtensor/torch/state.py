"""LoTR layers to and from state dicts, adapters in memory and native directories."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.loading import load
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.parts import GroupParts, group_parts
from lotrtensor.errors import FormatError, UnsupportedAdapterError
from lotrtensor.packs.members import Member
from lotrtensor.torch.apply import (
    TABLE,
    check_train,
    factor_table,
    inject,
    lotr_layers,
    set_trainable,
)
from lotrtensor.torch.expert_slices import ExpertSlice, layers_by_name, split_name
from lotrtensor.torch.expert_stacks import expert_stacks
from lotrtensor.torch.experts import LotrExpertsUpdate
from lotrtensor.torch.exporting import cores_of, paths_of, to_adapter
from lotrtensor.torch.groups import GroupPlan, Rank, check_model, check_plans
from lotrtensor.torch.linear import LotrLinear
from lotrtensor.torch.numbers import GroupNumbers, check_dtype, group_numbers
from lotrtensor.torch.shared_weights import weight_users
from lotrtensor.torch.sources import Source, as_lotr

OWN = (".lotr_core", ".lotr_private_left", ".lotr_private_right")
"""Ends of the keys of a layer's own parameters."""


def lotr_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the part of ``model.state_dict()`` that is LoTR's: factors once, and layers' own.

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
        if key.startswith(TABLE + ".") or key.endswith(OWN)
    }


def load_lotr(
    model: nn.Module,
    source: Source | Member,
    *,
    rank: Rank | None = None,
    group_by: str = "type",
    train: str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a trained adapter into ``model``, in place.

    Parameters
    ----------
    model : nn.Module
        The base model; or one that has these LoTR layers already, which are filled.
    source : path-like, adapter, or mapping of str to tensor
        A LoTR; a compressed adapter or one of a pack (`lotrtensor.Pack.member`), whose codes become
        plain numbers; or a LoRA or weight deltas
        ΔW_k (m × n) by path, which are brought into LoTR form first: fine-tuning then goes on from
        where they were.
    rank : int or (int, int), optional
        Ranks to bring them to.
    group_by : str
        Grouping to do so with.
    train : str, optional
        ``"all"`` or ``"cores"`` to train on, see `set_trainable`; not given, nothing trains.
    dtype : torch.dtype, optional
        Of the factors and cores; that of the base weights if not given.

    Returns
    -------
    nn.Module
        ``model``, for chaining.

    Raises
    ------
    FormatError, ShapeError
        If the adapter was made for another model: layers are missing, or have other shapes; or if
        layers to be filled are merged, or have another type than ``dtype``. The model is as it was.
    UnsupportedAdapterError
        If a LoRA or deltas are given without ``rank``, or the adapter carries tensors besides its
        update.
    DataError
        If the type does not hold the adapter's numbers.
    OptionError
        If layers do not compute in ``dtype``; if ``train`` is no such word, or means cores that the
        adapter does not have.

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
    check_dtype(dtype)
    adapter = _loadable(source, rank, group_by)
    if adapter.extras:
        raise UnsupportedAdapterError(
            f"the adapter carries {next(iter(adapter.extras))!r} besides its update, which would "
            "be lost; load it with lotrtensor.peft"
        )
    parts = group_parts(adapter.groups)
    plans = parts_plans(parts)
    if train is not None:
        check_train(train, cores=any(min(plan.rank) for plan in plans))
    fresh = TABLE not in model._modules
    if fresh:
        layers = layers_by_name(model)
        check_plans(plans, layers)
        expert_stacks(plans, layers)
        if adapter.config.get("ensure_weight_tying"):
            _check_untied(model, plans)
    else:
        _check_same(model, plans, dtype)
    numbers = [
        group_numbers(plan, group, dtype or _dtype(model, plan.modules[0]))
        for plan, group in zip(plans, parts, strict=True)
    ]
    if fresh:
        inject(model, plans, dtype=dtype)
    _fill(model, numbers)
    if train is not None:
        set_trainable(model, train)
    elif fresh:
        model.requires_grad_(False)
    return model


def _loadable(
    source: Source | Member, rank: Rank | None, group_by: str
) -> LotrAdapter | CompressedAdapter | Member:
    if isinstance(source, Member):
        if rank is None:
            return source
        source = source.to_lora()
    if isinstance(source, str | os.PathLike):
        source = load(source)
    if isinstance(source, CompressedAdapter) and rank is None:
        return source
    return as_lotr(source, rank=rank, group_by=group_by)


def parts_plans(groups: Iterable[GroupParts]) -> tuple[GroupPlan, ...]:
    """Return the groups of an adapter as plans; scales are in its numbers already."""
    return tuple(
        GroupPlan(
            name=group.name,
            modules=group.modules,
            shape=group.shape,
            rank=group.rank,
            scale=1.0,
            slice_ranks=group.slice_ranks,
            embedding=group.embedding,
            private_ranks=group.private_ranks,
        )
        for group in groups
    )


def save_lotr(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write the LoTR layers of ``model`` as a native directory, factors once per group.

    The command line reads it, and so does `lotrtensor.peft`. Layers with private parts, of a
    compressed adapter, become a PEFT LoRA instead; see `to_adapter`.

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
def _fill(model: nn.Module, groups: Iterable[GroupNumbers]) -> None:
    table, modules = factor_table(model), dict(model.named_modules())
    for group in groups:
        if min(group.plan.rank):
            factors = table.of(group.plan.name)
            factors.left.copy_(group.left)
            factors.right.copy_(group.right)
        for k, name in enumerate(group.plan.modules):
            layer, expert = _find(modules, name)
            if expert is not None:
                layer.lotr_core[expert].copy_(group.cores[k] / layer.scale)
            elif layer.lotr_core is not None:
                layer.lotr_core.copy_(group.cores[k] / layer.scale)
            if layer.private_rank:
                layer.lotr_private_left.copy_(group.private[k][0])
                layer.lotr_private_right.copy_(group.private[k][1])


def _dtype(model: nn.Module, name: str) -> torch.dtype:
    """Type that the factors of a layer have, or get where none is asked for."""
    layer, _ = _find(dict(model.named_modules()), name)
    own = []
    if isinstance(layer, LotrLinear | LotrExpertsUpdate):
        own = list(layer.parameters(recurse=False))
    weight: Tensor = own[0] if own else layer.weight
    return weight.dtype if weight.is_floating_point() else torch.get_default_dtype()


def _find(modules: Mapping[str, nn.Module], name: str) -> tuple[Any, int | None]:
    """Return what adapts a layer or an expert, or is to be adapted; and the number of an expert."""
    parts = split_name(name)
    if name in modules or parts is None:
        return modules[name], None
    experts, index, parameter = parts
    update = modules.get(f"{experts}.{parameter}")
    return (update or ExpertSlice(modules[experts], parameter, index)), index


def _check_untied(model: nn.Module, plans: tuple[GroupPlan, ...]) -> None:
    """Refuse an adapter whose update is meant for every layer of a weight, where there are more."""
    users = weight_users(model)
    modules = dict(model.named_modules())
    for name in (n for plan in plans for n in plan.modules if n in modules):
        layer = modules[name]
        others = [n for n, m in users[id(layer.weight)].items() if m is not layer]
        if others:
            raise UnsupportedAdapterError(
                f"the adapter has ensure_weight_tying, and {name} shares its weight with "
                f"{others[0]}, which would have to take the same update; load it with "
                "lotrtensor.peft"
            )


def _check_same(model: nn.Module, plans: tuple[GroupPlan, ...], dtype: torch.dtype | None) -> None:
    """Refuse to fill layers that are merged, or grouped, shaped or typed in another way."""
    layers = dict(lotr_layers(model))
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise FormatError(
            f"{merged} is merged, and could not be unmerged once its core is another; call unmerge "
            "first"
        )
    found = {
        name: (
            {
                n
                for path, layer in layers.items()
                if layer.factors is factors
                for n, _ in cores_of(path, layer)
            },
            factors.shape,
            factors.rank,
        )
        for name, factors in factor_table(model).groups()
    }
    expected = {p.name: (set(p.modules), p.shape, p.rank) for p in plans if min(p.rank)}
    unlike = next((n for n in {**expected, **found} if expected.get(n) != found.get(n)), None)
    if unlike is not None:
        raise FormatError(
            f"group {unlike!r} differs: the adapter has {_describe(expected.get(unlike))}, the "
            f"model {_describe(found.get(unlike))}; load the adapter into the base model"
        )
    own = {n: x.private_rank for path, x in layers.items() for n in paths_of(path, x)}
    wanted = {name: plan.private.get(name, 0) for plan in plans for name in plan.modules}
    other = next((n for n in {**wanted, **own} if wanted.get(n) != own.get(n)), None)
    if other is not None:
        raise FormatError(
            f"{other} has private factors of rank {wanted.get(other, 0)} in the adapter and "
            f"{own.get(other, 0)} in the model, or no place in one of them; load the adapter into "
            "the base model"
        )
    kinds = {p.dtype for layer in layers.values() for p in layer.parameters(recurse=False)}
    if dtype is not None and kinds - {dtype}:
        raise FormatError(
            f"dtype is {dtype}, and the model's layers are {', '.join(map(str, kinds))}; unload "
            "them first, or leave dtype out"
        )


def _describe(group: tuple[set[str], tuple[int, int], tuple[int, int]] | None) -> str:
    if group is None:
        return "no such group"
    modules, (m, n), (p, q) = group
    return f"{len(modules)} layers of {m} × {n} at rank ({p}, {q})"
