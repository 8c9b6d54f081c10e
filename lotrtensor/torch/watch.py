"""Detect adapted layers that a model does not call, in its first forward or with one batch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lotrtensor.errors import FormatError, LotrWarning, UnsupportedAdapterError
from lotrtensor.torch.groups import check_model

PATIENCE = 16
"""Forwards after which a layer that never ran is reported, where others of its kind did run: an
expert that the router did not choose, a layer that was dropped."""


class Watched:
    """An adapted layer that remembers whether it ran.

    The attribute is written in every forward and never read there: reading it would add a guard,
    for which ``torch.compile`` would compile the model twice.
    """

    lotr_ran = False
    lotr_called_by_holder = False
    """Whether the module that holds this one computes with it, and is what the model calls."""


class LayerUse(NamedTuple):
    """What one forward did with an adapted layer.

    Attributes
    ----------
    name : str
        Path of the layer.
    ran : bool
        Whether it was called.
    read_by : tuple of str
        Functions that took its base weight from outside, without the update; most often a layer
        that shares the weight.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> lotr.check_adapted(model, torch.ones(1, 8))[0]
    LayerUse(name='0', ran=True, read_by=())
    """

    name: str
    ran: bool
    read_by: tuple[str, ...]


class Watch:
    """Forward hook of a model that reports, once, the adapted layers that did not run.

    It holds only a count, so that it can be copied and pickled with the model. It removes itself
    when nothing is left to report.
    """

    def __init__(self) -> None:
        self.forwards = 0

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        """Look at the layers after a forward."""
        if torch.compiler.is_compiling():
            return
        self.forwards += 1
        idle = [name for name, layer in watched_layers(model) if not layer.lotr_ran]
        ran = {_kind(name) for name, layer in watched_layers(model) if layer.lotr_ran}
        passed = [name for name in idle if _kind(name) not in ran]
        if idle and not passed and self.forwards < PATIENCE:
            return
        _stop_watching(model)
        if passed:
            warnings.warn(
                f"{_listed(passed)} of the adapted layers did not run in the forward of "
                f"{type(model).__name__}, so that their update has no effect and does not train: "
                "the model reads their weight without calling them, or this input does not reach "
                "them; lotrtensor.torch.check_adapted looks closer",
                LotrWarning,
                stacklevel=2,
            )
        elif idle:
            warnings.warn(
                f"{_listed(idle)} of the adapted layers did not run in {self.forwards} forwards, "
                "though others of their kind did; experts that no token was sent to are harmless",
                LotrWarning,
                stacklevel=2,
            )


def watch(model: nn.Module) -> None:
    """Look at the adapted layers of ``model`` after its next forward; see `Watch`."""
    _stop_watching(model)
    model.register_forward_hook(Watch())


def _stop_watching(model: nn.Module) -> bool:
    hooks = model._forward_hooks
    own = [key for key, hook in hooks.items() if isinstance(hook, Watch)]
    for key in own:
        del hooks[key]
    return bool(own)


def watched_layers(model: nn.Module) -> Iterator[tuple[str, Watched]]:
    """Iterate over the paths of the adapted layers of either kind, and the layers."""
    for name, module in model.named_modules():
        if isinstance(module, Watched):
            yield name, module


def check_adapted(
    model: nn.Module, batch: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
) -> tuple[LayerUse, ...]:
    """Run one batch and report how every adapted layer was used.

    The forward runs without gradients in the model's current mode; evaluation may take other paths
    than training. The model changes only as any forward changes it.

    Parameters
    ----------
    model : nn.Module
        A model of `apply_lotr`, or a PEFT model of `lotrtensor.peft`.
    batch : tensor, tuple, list or mapping
        The argument of the model, its arguments, or its keyword arguments.

    Returns
    -------
    tuple of LayerUse
        One per adapted layer.

    Raises
    ------
    UnsupportedAdapterError
        If the weight of an adapted layer was read and the layer was not called: its update is
        lost.
    FormatError
        If the model has no LoTR layers.

    Warns
    -----
    LotrWarning
        If layers did not run and were not read, or ran and were read as well.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> all(use.ran for use in lotr.check_adapted(model, torch.ones(1, 8)))
    True
    """
    check_model(model)
    model = getattr(model, "_orig_mod", model)  # a compiled model would hide what it calls
    layers = dict(watched_layers(model))
    if not layers:
        raise FormatError(f"{type(model).__name__} has no LoTR layers; adapt it first")
    before = {name: layer.lotr_ran for name, layer in layers.items()}
    watching = [module for module in model.modules() if _stop_watching(module)]
    for layer in layers.values():
        layer.lotr_ran = False
    callers = [
        model.get_submodule(name.rpartition(".")[0]) if layer.lotr_called_by_holder else layer
        for name, layer in layers.items()
    ]
    reads = _Reads(layers, callers)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), reads.counted(), reads:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, tuple | list) else model(batch)
        uses = tuple(
            LayerUse(name, layer.lotr_ran, tuple(sorted(reads.found[name])))
            for name, layer in layers.items()
        )
    finally:
        for name, layer in layers.items():
            layer.lotr_ran = before[name] or layer.lotr_ran
        for module in watching:
            watch(module)
    _report(uses)
    return uses


def _report(uses: Iterable[LayerUse]) -> None:
    lost = [use for use in uses if use.read_by and not use.ran]
    if lost:
        raise UnsupportedAdapterError(
            f"{_listed([use.name for use in lost])} of the adapted layers were not called; "
            f"{', '.join(lost[0].read_by)} took the weight instead, so that the update has no "
            "effect and does not train: leave them out of the target modules"
        )
    idle = [use.name for use in uses if not use.ran]
    if idle:
        warnings.warn(
            f"{_listed(idle)} of the adapted layers did not run with this batch",
            LotrWarning,
            stacklevel=3,
        )
    both = [use for use in uses if use.read_by]
    if both:
        warnings.warn(
            f"{_listed([use.name for use in both])} of the adapted layers ran, and "
            f"{', '.join(both[0].read_by)} took the weight as well, where the update has no "
            "effect: the weight is another layer's too, or the model reads it",
            LotrWarning,
            stacklevel=3,
        )


class _Reads(TorchFunctionMode):
    """Notes every torch function that is given the weight of an adapted layer from outside."""

    def __init__(self, layers: Mapping[str, Watched], callers: Iterable[Any]) -> None:
        super().__init__()
        self.callers = set(callers)
        self.found: dict[str, set[str]] = {name: set() for name in layers}
        self.inside = 0
        self.owner = {id(_weight(layer)): name for name, layer in layers.items()}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Tell the layers' own products from those of others."""
        handles = []
        for layer in self.callers:
            handles.append(layer.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(layer.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: Any) -> None:
        self.inside += 1

    def _leave(self, *_: Any) -> None:
        self.inside -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments, and compute."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.inside and name != "__get__":  # a look at dtype, shape or device
            for value in [*_flat(args), *_flat(kwargs.values())]:
                if id(value) in self.owner:
                    self.found[self.owner[id(value)]].add(name)
        return func(*args, **kwargs)


def _weight(layer: Any) -> Any:
    return layer.weight


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _kind(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
