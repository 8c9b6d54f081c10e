"""Put LoTR layers into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lotrtensor.core.options import check_choice, check_flag
from lotrtensor.errors import FormatError, LotrError, OptionError, UnsupportedAdapterError
from lotrtensor.torch.factors import FactorTable, SharedFactors
from lotrtensor.torch.fastpath import leave_fast_path
from lotrtensor.torch.groups import (
    DEFAULT_ALPHA,
    PAPER_ALPHA,
    GroupPlan,
    Rank,
    check_model,
    check_numbers,
    plan_groups,
    select,
)
from lotrtensor.torch.init import base_weight, check_init, init_factors
from lotrtensor.torch.linear import LotrLinear
from lotrtensor.torch.shared_weights import replace_everywhere, storage, weight_users
from lotrtensor.torch.watch import watch
from lotrtensor.torch.weight_reads import check_called

TABLE = "lotr_factors"
"""Name of the model's child that owns the factors."""


def apply_lotr(
    model: nn.Module,
    patterns: str | Iterable[str],
    *,
    rank: Rank,
    group_by: str = "type",
    alpha: float | None = None,
    rslora: bool = False,
    init: str = "orthogonal",
    train: str = "all",
    dropout: float = 0.0,
) -> nn.Module:
    """Freeze ``model`` and replace the layers that ``patterns`` name by `LotrLinear`, in place.

    Parameters
    ----------
    model : nn.Module
        Any model.
    patterns : str or iterable of str
        Which layers: ends of paths (``["query", "value"]``), or one regular expression for the
        whole path.
    rank : int or (int, int)
        Left and right rank (p, q) of every group.
    group_by : str
        Which layers share U and V: ``"type"``, ``"shape"`` or patterns such as
        ``"qv=query|value"``; see `lotrtensor.adapters.grouping.group_modules`.
    alpha : float, optional
        The update is scaled by alpha / r, r = √(p q); 32 if not given, 1 for ``init="paper"``.
    rslora : bool
        Scale by alpha / √r instead.
    init : str
        ``"orthogonal"``, ``"paper"`` or ``"svd"``; see `lotrtensor.torch.init.init_factors`. The
        cores are zero, so that the model computes what it computed before.
    train : str
        ``"all"`` or ``"cores"``; see `set_trainable`.
    dropout : float
        Dropout on the input of every update.

    Returns
    -------
    nn.Module
        ``model``, for chaining.

    Raises
    ------
    FormatError
        If a pattern matches nothing, or the model has LoTR layers already.
    RankError, ShapeError, UnsupportedAdapterError, OptionError
        If a rank exceeds a layer, unlike layers meet in a group, a layer is of a kind that is not
        adapted or never called, or a name is not known. The model is as it was.

    Warns
    -----
    LotrWarning
        After the first forward of the model, if adapted layers did not run in it; see
        `check_adapted`.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # U, V and two cores
    40
    """
    check_model(model)
    check_init(init)
    check_train(train)
    rslora = check_flag(rslora, "rslora")
    check_numbers(alpha, dropout)
    _check_plain(model)
    layers = select(model, patterns)
    if alpha is None:
        alpha = PAPER_ALPHA if init == "paper" else DEFAULT_ALPHA
    plans = plan_groups(layers, rank=rank, group_by=group_by, alpha=alpha, rslora=rslora)
    inject(model, plans, dropout=dropout)
    for plan in plans:
        weights = [base_weight(layers[name]) for name in plan.modules] if init == "svd" else []
        init_factors(factor_table(model).of(plan.name), init, weights)
    set_trainable(model, train)
    return model


def inject(
    model: nn.Module,
    plans: Sequence[GroupPlan],
    *,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> None:
    """Freeze ``model`` and replace the layers of ``plans``; all factors and cores are zero.

    They have ``dtype``, or that of the base weights.
    """
    _check_plain(model)
    for plan in plans:
        if plan.embedding:
            raise UnsupportedAdapterError(
                f"group {plan.name!r} adapts the embedding {plan.modules[0]!r}; only linear layers "
                "are adapted here: use lotrtensor.peft, or leave it out"
            )
    names = [name for plan in plans for name in plan.modules]
    check_called(model, names)
    model.requires_grad_(False)
    table = FactorTable()
    for plan in plans:
        factors = _shared_factors(model, plan, dtype)
        if factors is not None:
            table.add(plan.name, factors)
        for name in plan.modules:
            base = model.get_submodule(name)
            layer = LotrLinear(
                base,
                factors,
                scale=plan.scale,
                dropout=dropout,
                private_rank=plan.private.get(name, 0),
                dtype=dtype,
            )
            layer.train(model.training)
            replace_everywhere(model, base, layer)
    model.add_module(TABLE, table)
    leave_fast_path(model, names)
    watch(model)


def _shared_factors(
    model: nn.Module, plan: GroupPlan, dtype: torch.dtype | None
) -> SharedFactors | None:
    if not min(plan.rank):
        return None
    weight = model.get_submodule(plan.modules[0]).weight
    assert isinstance(weight, torch.Tensor)
    if dtype is None and weight.is_floating_point():
        dtype = weight.dtype
    return SharedFactors(plan.shape, plan.rank, dtype=dtype, device=weight.device)


def set_trainable(model: nn.Module, train: str = "all") -> None:
    """Choose what trains: ``"all"`` factors and cores, or the ``"cores"`` alone.

    With the factors frozen a layer of any width trains p · q numbers. The private factors of a
    compressed adapter are factors in this: ``"cores"`` freezes them, and a layer that has nothing
    else does not train.

    Parameters
    ----------
    model : nn.Module
        A model with LoTR layers, of `apply_lotr` or `load_lotr`.
    train : str
        ``"all"`` or ``"cores"``.

    Raises
    ------
    OptionError
        If ``train`` is neither, or ``"cores"`` where no layer has a core.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> lotr.set_trainable(model, "cores")
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lotr_core', '1.lotr_core']
    """
    table, layers = factor_table(model), [layer for _, layer in lotr_layers(model)]
    check_train(train, cores=any(layer.lotr_core is not None for layer in layers))
    table.requires_grad_(train == "all")
    for layer in layers:
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(train == "all" or name == "lotr_core")


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    factor_lr: float | None = None,
    core_lr: float | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return optimiser groups with separate learning rates for factors, cores and the rest.

    Parameters
    ----------
    model : nn.Module
        A model of `apply_lotr`, or a PEFT model of `lotrtensor.peft`.
    lr : float
        For every other trained parameter, a task head say, and for what is not given.
    factor_lr, core_lr : float, optional
        For U and V, and P_k and Q_k of a compressed adapter; and for the G_k.
    **options
        Further options of every group, such as ``weight_decay``.

    Returns
    -------
    list of dict
        Groups for a torch optimiser; those without a parameter are left out.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> [group["lr"] for group in lotr.param_groups(model, 1e-3, core_lr=1e-2)]  # factors, cores
    [0.001, 0.01]
    """
    check_model(model)
    factors = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, SharedFactors)
        for parameter in module.parameters()
    }
    parts: dict[str, list[nn.Parameter]] = {"factors": [], "cores": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = set(name.split("."))
            private = not own.isdisjoint(("lotr_private_left", "lotr_private_right"))
            factor = private or id(parameter) in factors
            part = "factors" if factor else "cores" if "lotr_core" in own else "rest"
            parts[part].append(parameter)
    rates = {"factors": factor_lr, "cores": core_lr, "rest": None}
    return [
        {"params": parameters, "lr": lr if rates[part] is None else rates[part], **options}
        for part, parameters in parts.items()
        if parameters
    ]


def merge(model: nn.Module, *, safe: bool = False) -> nn.Module:
    """Add every ΔW_k to its base weight, in place; see `LotrLinear.merge`.

    Parameters
    ----------
    model : nn.Module
        A model with LoTR layers, of `apply_lotr` or `load_lotr`.
    safe : bool
        Refuse to write a weight that is not finite.

    Returns
    -------
    nn.Module
        ``model``, for chaining.

    Raises
    ------
    DataError
        If ``safe`` is given and a merged weight would not be finite.
    UnsupportedAdapterError
        If a base weight is quantised, or is another layer's weight too. No weight has changed then.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> lotr.merge(model)[0].merged
    True
    """
    check_model(model)
    safe = check_flag(safe, "safe")
    users = weight_users(model, storage)
    for name, layer in lotr_layers(model):
        others = [user for user in users[storage(layer.weight)] if user != f"{name}.base"]
        if others and not layer.merged:
            raise UnsupportedAdapterError(
                f"{name} shares its weight with {others[0].removesuffix('.base')}, which merging "
                "would change too; untie them first, or keep the update apart"
            )
        try:
            layer.check_merge(safe=safe)
        except LotrError as error:
            raise type(error)(f"{name}: {error}") from error
    for _, layer in lotr_layers(model):
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take every ΔW_k off its base weight, in place.

    Parameters
    ----------
    model : nn.Module
        A model with LoTR layers, of `apply_lotr` or `load_lotr`.

    Returns
    -------
    nn.Module
        ``model``, for chaining; weights come back up to rounding.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> lotr.unmerge(lotr.merge(model))[0].merged
    False
    """
    check_model(model)
    for _, layer in lotr_layers(model):
        layer.unmerge()
    return model


def unload(model: nn.Module) -> nn.Module:
    """Put the base layers back, in place: merged ones keep ΔW_k, others lose it.

    Parameters
    ----------
    model : nn.Module
        A model with LoTR layers, of `apply_lotr` or `load_lotr`.

    Returns
    -------
    nn.Module
        ``model`` without LoTR layers, for chaining.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> lotr.unload(lotr.merge(model))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
      (1): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    check_model(model)
    for _, layer in list(lotr_layers(model)):
        replace_everywhere(model, layer, layer.base)
    if TABLE in model._modules:
        delattr(model, TABLE)
    return model


def lotr_layers(model: nn.Module) -> Iterator[tuple[str, LotrLinear]]:
    """Iterate over the paths of the adapted layers and the layers."""
    for name, module in model.named_modules():
        if isinstance(module, LotrLinear):
            yield name, module


def factor_table(model: nn.Module) -> FactorTable:
    """Return the table that owns the model's shared factors.

    Raises
    ------
    FormatError
        If the model has none.
    """
    check_model(model)
    table = model._modules.get(TABLE)
    if not isinstance(table, FactorTable):
        raise FormatError(f"{type(model).__name__} has no LoTR layers; call apply_lotr first")
    return table


def _check_plain(model: nn.Module) -> None:
    if TABLE in model._modules or next(lotr_layers(model), None) is not None:
        raise FormatError(
            f"{type(model).__name__} has LoTR layers already; unload them first, or use "
            "lotrtensor.peft for several adapters"
        )


def check_train(train: str, *, cores: bool = True) -> None:
    """Refuse what is no word for what trains, and cores where there are none.

    Raises
    ------
    OptionError
        Naming what was found.
    """
    check_choice(train, "train", ("all", "cores"))
    if train == "cores" and not cores:
        raise OptionError(
            "train is 'cores', and no layer of this adapter has one: nothing is shared in it; "
            "expected train='all'"
        )
