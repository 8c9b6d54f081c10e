"""Which parameters a model uses without calling their module, found by a run on meta tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class DryRun(NamedTuple):
    """What a run on the meta device showed.

    Attributes
    ----------
    read : frozenset of str
        Parameters that an operation took while none of their modules was running; tied ones under
        each of their names.
    complete : bool
        Whether the model ran to its end; if not, there may be more.
    """

    read: frozenset[str]
    complete: bool


def dry_run(model: Any) -> DryRun:
    """Run a model on meta tensors and record which parameters are used outside of their modules.

    Parameters
    ----------
    model : transformers model
        In evaluation mode, on the meta device; it is left in bfloat16.
    """
    import torch

    model.to(torch.bfloat16)  # grouped products of experts have no other type there
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    found: set[int] = set()
    complete = False
    with _running(model) as running:
        for inputs in _inputs(model):
            try:
                with torch.no_grad(), _watch(owners, running, found):
                    model(**inputs)
            except Exception:  # another kind of input, or the model cannot run on meta tensors
                running.clear()
            else:
                complete = True
                break
    named = model.named_parameters(remove_duplicate=False)
    return DryRun(frozenset(name for name, p in named if id(p) in found), complete)


def _watch(owners: dict[int, list[Any]], running: list[Any], found: set[int]) -> Any:
    """Return a torch function mode that records parameters used outside of their modules."""
    import torch
    from torch.overrides import TorchFunctionMode

    # Models ask for values only to warn of padding and the like: any answer will do.
    answers: dict[Any, Any] = {
        torch.Tensor.__contains__: False,
        torch.Tensor.__bool__: False,
        torch.Tensor.item: 0,
    }

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in answers and args[0].is_meta:
                return answers[func]
            result = func(*args, **(kwargs or {}))
            # Reading the type or shape of a parameter does not use its values.
            results = result if isinstance(result, tuple | list) else (result,)
            if any(isinstance(item, torch.Tensor) for item in results):
                for used in _parameters((*args, *(kwargs or {}).values())):
                    if not any(owner in running for owner in owners.get(id(used), ())):
                        found.add(id(used))
            return result

    return Watch()


@contextmanager
def _running(model: Any) -> Iterator[list[Any]]:
    """Keep a list of the modules that are being called, the innermost last."""
    running: list[Any] = []

    def begin(module: Any, _: Any) -> None:
        running.append(module)

    def end(*_: Any) -> None:
        running.pop()

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(begin))
        hooks.append(module.register_forward_hook(end))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def _parameters(values: Iterable[Any]) -> Iterator[Any]:
    """Return the parameters among arguments, and among those in lists of them."""
    import torch

    for value in values:
        if isinstance(value, torch.nn.Parameter):
            yield value
        elif isinstance(value, list | tuple):
            yield from _parameters(value)


def _inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Yield small inputs: the main one of the model alone, then all that it takes."""
    import torch

    def number(name: str, default: int) -> int:
        for config in (model.config, getattr(model.config, "vision_config", None)):
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
        return default

    size, channels = number("image_size", 224), number("num_channels", 3)
    frames = 2 * number("max_source_positions", 1500)
    shapes = {
        "input_ids": (1, 8),
        "decoder_input_ids": (1, 8),
        "pixel_values": (1, channels, size, size),
        "input_values": (1, 16000),
        "input_features": (1, number("num_mel_bins", 80), frames),
    }

    def tensor(name: str) -> Any:
        kind = torch.long if name.endswith("input_ids") else torch.bfloat16
        return torch.zeros(shapes.get(name, (1, 8)), dtype=kind, device="meta")

    main = {model.main_input_name}
    if getattr(model.config, "is_encoder_decoder", False):
        main.add("decoder_input_ids")
    taken = shapes.keys() & inspect.signature(model.forward).parameters.keys()
    for names in (main, main | taken):
        yield {name: tensor(name) for name in names}
