"""Layers that share one weight, and which of them has the update."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from lotrtensor.errors import LotrWarning, UnsupportedAdapterError
from lotrtensor.torch.groups import is_transposed
from lotrtensor.torch.shared_weights import weight_users

BASE = ".base_layer"


def owners(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the layers that are to have an update of their own, one of all that share a weight.

    That is the embedding if there is one, as PEFT's LoRA has it, or else the first.

    Parameters
    ----------
    model : nn.Module
        The model.
    names : iterable of str
        Paths of the layers that are to be adapted.
    """
    sharers = _sharers(model)
    chosen: dict[str, None] = {}
    for name in names:
        users = sharers.get(name, {name: model.get_submodule(name)})
        first = next((n for n, module in users.items() if isinstance(module, nn.Embedding)), None)
        chosen[first or next(iter(users))] = None
    return list(chosen)


def tied_layers(model: nn.Module, names: Iterable[str], *, warn: bool = True) -> dict[str, str]:
    """Return every layer that shares the weight of an adapted one, and which one.

    Parameters
    ----------
    model : nn.Module
        The model.
    names : iterable of str
        Paths of the layers that have an update of their own.
    warn : bool
        Say so where no layer shares its weight.

    Raises
    ------
    UnsupportedAdapterError
        If one of the layers that share is no layer that can be adapted.

    Warns
    -----
    LotrWarning
        If no layer shares its weight, and ``warn`` is given.
    """
    names = list(names)
    sharers = _sharers(model)
    tied: dict[str, str] = {}
    for name in names:
        for user, module in sharers.get(name, {}).items():
            if user in names:
                continue
            if not isinstance(module, nn.Linear | nn.Embedding) and not is_transposed(module):
                raise UnsupportedAdapterError(
                    f"{user} shares the weight of {name} and is a {type(module).__name__}, which "
                    "cannot take the same update; set ensure_weight_tying=False, or untie them"
                )
            tied[user] = name
    if names and not tied and warn:
        warnings.warn(
            "ensure_weight_tying is set, and no layer shares the weight of an adapted one; it has "
            "no effect",
            LotrWarning,
            stacklevel=2,
        )
    return tied


def _sharers(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Return the layers of every weight that several use, by the path of each of them."""
    found: dict[str, dict[str, nn.Module]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for key, users in weight_users(model).items():
        if len(users) > 1 and names[key].endswith("weight"):
            own: dict[str, nn.Module] = {}
            for name, module in users.items():
                # A layer in two places is one, and what stands behind a trained copy is none.
                if module not in own.values() and not name.endswith(".original_module"):
                    own[name.removesuffix(BASE)] = module
            found |= dict.fromkeys(own, own)
    return found
