"""Layers whose weight a model reads without calling them, found in the model's source.

An update is added in the forward of its layer. A model that uses ``self.q_proj.weight`` and never
calls ``self.q_proj`` gets the base weight: the adapter has no effect and does not train. Fused
attention, state-space kernels and heads that use an embedding's weight are written this way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import NamedTuple

from torch import nn

from lotrtensor.errors import LotrWarning, UnsupportedAdapterError
from lotrtensor.torch.source_reader import Path, SourceReader, Uses

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Modules whose children their owner calls."""


class Read(NamedTuple):
    """A read of a layer's weight: in which function, and whether the layer is called as well."""

    where: str
    called: bool


def check_called(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse to adapt layers that the model never calls.

    Parameters
    ----------
    model : nn.Module
        The model.
    layers : iterable of str
        Paths of the layers that are to be adapted.

    Raises
    ------
    UnsupportedAdapterError
        Naming the first such layer and who reads its weight.

    Warns
    -----
    LotrWarning
        If layers are called and their weight is read as well, for example on another path.
    """
    reads = weight_reads(model, layers)
    never = {name: read for name, read in reads.items() if not read.called}
    if never:
        name, read = next(iter(never.items()))
        more = f" (as it does with {len(never) - 1} more)" if len(never) > 1 else ""
        raise UnsupportedAdapterError(
            f"{name}: {read.where} reads the weight of this layer{more} and never calls it, so "
            "that an update would have no effect and would not train; leave it out of the target "
            "modules"
        )
    if reads:
        name, read = next(iter(reads.items()))
        warnings.warn(
            f"{name}: {read.where} calls this layer in one place and reads its weight in another, "
            f"where the update has no effect ({len(reads)} of the adapted layers are used so); "
            "lotrtensor.torch.check_adapted says which path a batch takes",
            LotrWarning,
            stacklevel=2,
        )


def weight_reads(model: nn.Module, layers: Iterable[str]) -> dict[str, Read]:
    """Return the layers whose weight is read by a module that holds them.

    The source of the forward of every module that holds a layer is followed, with the functions
    that it calls. If a source cannot be read, or a layer is passed to a function that cannot be
    followed, the layer is not reported.

    Parameters
    ----------
    model : nn.Module
        The model.
    layers : iterable of str
        Paths of the layers to look for.

    Returns
    -------
    dict of str to Read
        By path.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known: dict[type, Uses] = {}
    found = {}
    for name in layers:
        read = _read_of(name, modules, known)
        if read is not None:
            found[name] = read
    return found


def _read_of(name: str, modules: Mapping[str, nn.Module], known: dict[type, Uses]) -> Read | None:
    where, called, direct = None, False, True
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        holder = modules[".".join(parts[:depth])]
        if isinstance(holder, CONTAINERS):
            continue
        cls, path = type(holder), tuple(parts[depth:])
        if cls not in known:
            known[cls] = _uses(cls)
        uses = known[cls]
        # A holder that hands the layer on, or the list that it is in, may call it anywhere.
        handed = [path[:end] for end in range(0 if direct else len(path), len(path) + 1)]
        if any(_matches(pattern, part) for pattern in uses.unknown for part in handed):
            return None
        here = next((at for pattern, at in uses.read.items() if _matches(pattern, path)), None)
        called = called or any(_matches(pattern, path) for pattern in uses.called)
        if here is not None:
            called = called or _called_elsewhere(cls, path)
            where = where or here
        direct = False
    return None if where is None else Read(where, called)


def _matches(pattern: Path, path: Path) -> bool:
    return len(pattern) == len(path) and all(
        a in ("*", b) for a, b in zip(pattern, path, strict=True)
    )


def _uses(cls: type) -> Uses:
    uses = Uses()
    forward = getattr(cls, "forward", None)
    if isinstance(forward, FunctionType):
        SourceReader(cls, uses, set()).follow(forward, [()], {})
    return uses


def _called_elsewhere(cls: type, path: Path) -> bool:
    """Whether a method that forward does not reach calls the layer."""
    uses = Uses()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, FunctionType):
                SourceReader(cls, uses, set()).follow(function, [()], {})
    return any(_matches(pattern, path) for pattern in uses.called)
