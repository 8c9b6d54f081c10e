"""Add the updates of a model's LoTR layers to its weights, take them off, take the layers out."""

from __future__ import annotations

from torch import nn

from lotrtensor.core.options import check_flag
from lotrtensor.errors import LotrError, UnsupportedAdapterError
from lotrtensor.torch.apply import TABLE, lotr_layers
from lotrtensor.torch.experts import LotrExperts, LotrExpertsUpdate
from lotrtensor.torch.groups import check_model
from lotrtensor.torch.linear import LotrLinear
from lotrtensor.torch.shared_weights import replace_everywhere, storage, weight_users


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
        own = _base_path(name, layer)
        others = [user for user in users[storage(layer.weight)] if user != own]
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
    for layer in list(model.modules()):
        if isinstance(layer, LotrLinear | LotrExperts):
            replace_everywhere(model, layer, layer.base)
    if TABLE in model._modules:
        delattr(model, TABLE)
    return model


def _base_path(name: str, layer: LotrLinear | LotrExpertsUpdate) -> str:
    """Path of the module that holds the weight of an adapted layer."""
    return f"{name if isinstance(layer, LotrLinear) else name.rpartition('.')[0]}.base"
