"""Put LoTR layers into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lotrtensor.core.options import check_choice, check_flag
from lotrtensor.errors import FormatError, OptionError, UnsupportedAdapterError
from lotrtensor.torch.expert_slices import ExpertSlice, Layer, layers_by_name, select_experts
from lotrtensor.torch.expert_stacks import expert_stacks
from lotrtensor.torch.experts import LotrExperts, LotrExpertsUpdate
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
from lotrtensor.torch.shared_weights import replace_everywhere
from lotrtensor.torch.watch import watch
from lotrtensor.torch.weight_reads import check_called

TABLE = "lotr_factors"
"""Name of the model's child that owns the factors."""


def apply_lotr(
    model: nn.Module,
    patterns: str | Iterable[str] = (),
    *,
    rank: Rank,
    target_parameters: Iterable[str] | None = None,
    group_by: str = "type",
    alpha: float | None = None,
    rslora: bool = False,
    init: str = "orthogonal",
    train: str = "all",
    dropout: float = 0.0,
) -> nn.Module:
    """Freeze ``model`` and replace the layers that ``patterns`` name by `LotrLinear`, in place.

    Fused experts that ``target_parameters`` name are replaced by `LotrExperts`.

    Parameters
    ----------
    model : nn.Module
        Any model.
    patterns : str or iterable of str
        Which layers: ends of paths (``["query", "value"]``), or one regular expression for the
        whole path. May be left out where ``target_parameters`` are given.
    rank : int or (int, int)
        Left and right rank (p, q) of every group.
    target_parameters : iterable of str, optional
        Ends of paths of 3-D parameters, a matrix an expert:
        ``["experts.gate_up_proj", "experts.down_proj"]``. Their modules have to follow the experts
        interface of transformers.
    group_by : str
        Which layers share U and V: ``"type"``, ``"shape"`` or patterns such as
        ``"qv=query|value"``; see `lotrtensor.adapters.grouping.group_modules`. Experts of one
        layer share them by default, those of all layers by ``"gate_up_proj,down_proj"``.
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
    layers: dict[str, Layer] = {}
    if target_parameters is None or patterns != ():
        layers |= select(model, patterns)
    if target_parameters is not None:
        layers |= select_experts(model, target_parameters)
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
    layers = layers_by_name(model)
    names = [n for plan in plans for n in plan.modules if not isinstance(layers[n], ExpertSlice)]
    check_called(model, names)
    stacks = expert_stacks(plans, layers)
    model.requires_grad_(False)
    table = FactorTable()
    for plan in plans:
        factors = _shared_factors(plan, layers, dtype)
        if factors is not None:
            table.add(plan.name, factors)
        for name in plan.modules:
            base = layers[name]
            if isinstance(base, ExpertSlice):
                continue
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
    adapted: dict[nn.Module, LotrExperts] = {}
    for (experts, parameter), plan in stacks.items():
        if experts not in adapted:
            adapted[experts] = LotrExperts(experts)
            replace_everywhere(model, experts, adapted[experts])
        shared = table.of(plan.name)
        options = {"scale": plan.scale, "dropout": dropout}
        adapted[experts].add(LotrExpertsUpdate(experts, parameter, shared, **options))
        adapted[experts].train(model.training)
    model.add_module(TABLE, table)
    leave_fast_path(model, names)
    watch(model)


def _shared_factors(
    plan: GroupPlan, layers: Mapping[str, Layer], dtype: torch.dtype | None
) -> SharedFactors | None:
    if not min(plan.rank):
        return None
    weight = layers[plan.modules[0]].weight
    assert isinstance(weight, torch.Tensor)
    if dtype is None and weight.is_floating_point():
        dtype = weight.dtype
    return SharedFactors(plan.shape, plan.rank, dtype=dtype, device=weight.device)


def set_trainable(model: nn.Module, train: str = "all") -> None:
    """Choose what trains: ``"all"`` factors and cores, or the ``"cores"`` alone.

    With the factors frozen a layer of any size trains p · q numbers. The private factors of a
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


def lotr_layers(model: nn.Module) -> Iterator[tuple[str, LotrLinear | LotrExpertsUpdate]]:
    """Iterate over the paths of the adapted layers and parameters, and what adapts them."""
    for name, module in model.named_modules():
        if isinstance(module, LotrLinear | LotrExpertsUpdate):
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
