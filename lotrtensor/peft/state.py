"""Keys of a LoTR adapter in a PEFT model, and in its file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from lotrtensor.adapters.formats.carried import PREFIX
from lotrtensor.adapters.formats.compressed import CODED, take_groups
from lotrtensor.adapters.formats.native import (
    CORE,
    CORE_LEFT,
    CORE_RIGHT,
    LEFT,
    PRIVATE_LEFT,
    PRIVATE_RIGHT,
    RIGHT,
)
from lotrtensor.adapters.parts import GroupParts, group_parts
from lotrtensor.errors import FormatError
from lotrtensor.torch.expert_slices import slice_name
from lotrtensor.torch.factors import decode
from lotrtensor.torch.numbers import cast

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


def split_cores(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with every stack of cores as a core an expert, as a file has them.

    Keys may have an adapter's name at their end.
    """
    found = {}
    for key, value in state.items():
        match = _STACK.fullmatch(key)
        if match is None or value.ndim != 3:
            found[key] = value
            continue
        for k, core in enumerate(value):
            name = slice_name(match["experts"], k, match["parameter"])
            found[name + match["core"]] = core
    return found


_STACK = re.compile(r"(?P<experts>.+)\.(?P<parameter>[^.]+)(?P<core>\.lotr_core(?:\.[^.]+)?)")


def join_cores(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors with the cores of experts stacked: the inverse of `split_cores`.

    Parameters
    ----------
    state : mapping of str to Tensor
        Tensors of the file, which are all there.
    expected : mapping of str to Tensor
        The model's parameters by the file's keys.
    """
    found = dict(state)
    for key, place in expected.items():
        own = list(split_cores({key: place}))
        if own != [key]:
            found[key] = torch.stack([found.pop(name) for name in own])
    return found


def dequantise(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Return a file's tensors with those of a compressed adapter as plain numbers.

    Parameters
    ----------
    state : mapping of str to Tensor
        Tensors of the file; without codes they are returned as they are.
    parameters : mapping of str to Tensor
        The model's parameters by the file's keys: their types are taken.
    where : str
        The adapter, named in messages.

    Raises
    ------
    FormatError
        If the codes are damaged.
    DataError
        If a parameter's type does not hold the numbers.
    """
    found = dict(state)
    row = found.pop(CODED, None)
    if row is None:
        return found
    groups, _ = take_groups({CODED: row.cpu().numpy()}, where)
    return found | plain_numbers(group_parts(groups), parameters)


def plain_numbers(
    groups: Iterable[GroupParts], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of groups as a file has them, in the types of the model's parameters.

    Raises
    ------
    DataError
        If a parameter's type does not hold the numbers.
    """
    found = {}
    for group in groups:
        for key, array in _arrays(group).items():
            place = parameters.get(key)
            dtype = torch.float32 if place is None else place.dtype
            found[key] = cast([array], dtype, key)[0]
    return found


def _arrays(group: GroupParts) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    if min(group.rank):
        found = {LEFT + group.name: group.left, RIGHT + group.name: group.right}
        found |= {
            PREFIX + module + CORE: core
            for module, core in zip(group.modules, group.core, strict=True)
        }
    for module, (left, right) in zip(group.modules, group.private, strict=bool(group.private)):
        if left.shape[1]:
            found |= {PREFIX + module + PRIVATE_LEFT: left, PREFIX + module + PRIVATE_RIGHT: right}
    return found


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
    stray = [key for key in state if is_own(key) and key not in expected]
    if stray:
        raise FormatError(f"{stray[0]} of the adapter has no place in the model")


def is_own(key: str) -> bool:
    """Whether a key of a file is that of an update, and not of what is carried beside it."""
    return key.startswith((LEFT, RIGHT)) or key.endswith((CORE, PRIVATE_LEFT, PRIVATE_RIGHT))
