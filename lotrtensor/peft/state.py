"""Keys of a LoTR adapter in a PEFT model, and in its file."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lotrtensor.adapters.formats.native import CORE, CORE_LEFT, CORE_RIGHT, LEFT, RIGHT
from lotrtensor.errors import FormatError
from lotrtensor.torch.factors import decode

FACTORS = "lotr_factors"
_PREFIX = {"left": LEFT, "right": RIGHT}


def file_key(key: str, adapter_name: str) -> str | None:
    """Return the key in the file of a shared factor of the model; None for any other tensor.

    >>> file_key("base_model.lotr_factors.default.:self%2Equery.left", "default")
    'base_model.lotr_left.self.query'
    """
    name = re.escape(adapter_name)
    match = re.fullmatch(rf"(?:.*\.)?{FACTORS}\.{name}\.(:[^.]+)\.(left|right)", key)
    return _PREFIX[match[2]] + decode(match[1]) if match else None


def multiply_cores(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors with every core that is kept as a product multiplied out.

    Training needs the dense core: a product of fixed rank would confine it.
    """
    dense = {}
    for key, value in state.items():
        if key.endswith(CORE_LEFT):
            stem = key.removesuffix(CORE_LEFT)
            right = state.get(stem + CORE_RIGHT)
            if right is None:
                raise FormatError(f"{key} has no partner; expected {stem + CORE_RIGHT}")
            dense[stem + CORE] = value.float() @ right.float()
        elif not key.endswith(CORE_RIGHT):
            dense[key] = value
    return dense


def add_aliases(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with every other name of its parameters too, which PEFT would miss.

    A layer in two places of a model has one core, which the file holds once.
    """
    known = {id(parameters[key]): key for key in state if key in parameters}
    others = {key: known[id(p)] for key, p in parameters.items() if id(p) in known}
    return {**state, **{key: state[first] for key, first in others.items()}}


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Hold the tensors of a file against the shapes that the model has for them.

    Raises
    ------
    FormatError
        If one is missing, has another shape, or has no place.
    """
    for key, shape in expected.items():
        if key not in state:
            raise FormatError(f"{key} is missing from the adapter; expected {tuple(shape)}")
        if state[key].shape != shape:
            raise FormatError(
                f"{key} is {tuple(state[key].shape)} in the adapter and {tuple(shape)} in the "
                "model; they do not belong together"
            )
    stray = [key for key in state if _is_own(key) and key not in expected]
    if stray:
        raise FormatError(f"{stray[0]} of the adapter has no place in the model")


def _is_own(key: str) -> bool:
    return key.startswith((LEFT, RIGHT)) or key.endswith(CORE)
