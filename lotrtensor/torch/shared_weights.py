"""Weights shared by several layers, and layers that occur in several places of a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Users = dict[int, dict[str, nn.Module]]
"""Modules by path, for the key of every weight."""


def weight_users(model: nn.Module, key: Callable[[Tensor], int] = id) -> Users:
    """Return every place where a weight is held.

    A module that stands in two places of the model counts twice, unless what holds it does too.

    Parameters
    ----------
    model : nn.Module
        The model.
    key : callable
        Says when two weights are one: ``id``, or `storage` where writing is in place.
    """
    users: Users = {}
    for parameter in model._parameters.values():
        if parameter is not None:
            users.setdefault(key(parameter), {})[f"the {type(model).__name__} itself"] = model
    for name, holder in model.named_modules():
        for attribute, child in holder._modules.items():
            for parameter in child._parameters.values() if child is not None else ():
                if parameter is not None:
                    path = f"{name}.{attribute}" if name else attribute
                    users.setdefault(key(parameter), {})[path] = child
    return users


def storage(weight: Tensor) -> int:
    """Return the address of a weight's numbers, or its identity where it has none."""
    plain = type(weight.data) is Tensor and not weight.is_meta and weight.numel() > 0
    return weight.data_ptr() if plain else id(weight)


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands in ``model``, but for the place within ``new`` itself.

    A layer that stands in two places of a model is one layer: its update acts in both.
    """
    for holder in list(model.modules()):
        if holder is not new:
            for attribute, child in holder._modules.items():
                if child is old:
                    holder._modules[attribute] = new
