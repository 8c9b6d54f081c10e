"""Distillation of scales: a model's outputs under two updates, their distance, and its descent.

Updates are added by hooks on the layers, so that any model is taken as it is and left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lotrtensor.adapters.formats.carried import PREFIX
from lotrtensor.errors import DataError, OptionError, ShapeError, UnsupportedAdapterError
from lotrtensor.torch.expert_slices import ExpertSlice, layers_by_name
from lotrtensor.torch.groups import slot_of
from lotrtensor.torch.sources import from_numpy

Read = Callable[[Any], Tensor]
Update = tuple[Tensor, Tensor, Tensor | None]
"""B (m × c), A (c × n), and scales of the last of the c terms, if there are any."""

Updates = Mapping[str, Update]


class Output(NamedTuple):
    """What a batch gives: values of the places that count, and whether they are logits."""

    values: Tensor
    are_logits: bool


Outputs = Callable[[Any, Updates], Output]
Seen = Callable[[str, Tensor, Tensor], Tensor]


@contextmanager
def outputs_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    read: Read | None,
    seen: Seen | None = None,
) -> Iterator[Outputs]:
    """A function that runs a batch with given updates; the model only evaluates meanwhile.

    Parameters
    ----------
    model : nn.Module
        The base model.
    layers : mapping of str to nn.Module
        Its linear layers that updates are for, by path.
    read : callable or None
        Takes the model's output, returns the tensor to compare; see `lotrtensor.torch.heal`.
    seen : callable, optional
        Is told the path of a layer, its input, and what it gives with its update; returns the
        latter, as it is to go on.

    Raises
    ------
    DataError
        From the function: if a layer did not run, or an output is not finite.
    OptionError
        From the function: if what is read is no tensor.
    """
    current: Updates = {}
    called: set[str] = set()

    def add(name: str, _: nn.Module, args: Any, kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        called.add(name)
        x = args[0] if args else next(iter(kwargs.values()))
        b, a, scale = (None if part is None else part.to(x) for part in current[name])
        assert b is not None
        assert a is not None
        h = x @ a.T
        if scale is not None:
            shared = h.shape[-1] - len(scale)
            h = torch.cat([h[..., :shared], h[..., shared:] * scale], dim=-1)
        found = y + h @ b.T
        return found if seen is None else seen(name, x, found)

    def outputs(batch: Any, updates: Updates) -> Output:
        nonlocal current
        current = updates
        found = _call(model, batch)
        if missing := set(layers) - called:
            raise DataError(
                f"{min(missing)} did not run on the first batch, so that nothing is known of it"
            )
        y, name = (read(found), "") if read else _read(found)
        if not isinstance(y, Tensor):
            raise OptionError(f"read gave a {type(y).__name__}; expected a tensor")
        if not y.ndim:
            raise OptionError("the output to compare is one number; expected a place a row")
        y = kept(y, batch)
        if not bool(torch.isfinite(y).all()):
            raise DataError("the model's output is not finite")
        return Output(y, name == "logits" and _are_classes(y, model))

    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = [
        layer.register_forward_hook(partial(add, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        model.eval().requires_grad_(False)
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def check_batches(batches: Iterable[Any], least: int, what: str) -> list[Any]:
    """Return inputs as a list.

    Raises
    ------
    DataError
        If they are no iterable.
    OptionError
        If there are fewer than ``least``, which ``what`` needs.
    """
    if isinstance(batches, str | Mapping) or not isinstance(batches, Iterable):
        raise DataError(f"batches is a {type(batches).__name__}; expected several of them")
    found = list(batches)
    if len(found) < least:
        raise OptionError(f"there are {len(found)} batches; {what} needs at least {least}")
    return found


def check_read(read: Any) -> None:
    """Refuse what is to read outputs and is no function.

    Raises
    ------
    OptionError
        Saying what it is.
    """
    if read is not None and not callable(read):
        raise OptionError(f"read is a {type(read).__name__}; expected a function")


def check_carried(model: nn.Module, carried: Mapping[str, np.ndarray]) -> None:
    """Refuse a model without the tensors, a trained head say, that an adapter carries.

    Raises
    ------
    DataError
        Naming one.
    """
    own = model.state_dict()
    for key, value in carried.items():
        name = key.removeprefix(PREFIX)
        expected = from_numpy(np.asarray(value))
        found = own.get(name)
        if found is None or not torch.equal(found.cpu().to(expected.dtype), expected):
            raise DataError(
                f"the adapter carries {name}, and the model has no such values: load them into the "
                "model first, or the outputs are not the original's"
            )


def linear_layers(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, nn.Module]:
    """Return the adapted layers by path, which are linear and have the updates' shapes.

    Raises
    ------
    DataError, ShapeError, UnsupportedAdapterError
        If one is missing, has another shape, or is an embedding or an expert.
    """
    known = layers_by_name(model)
    found: dict[str, nn.Module] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise DataError(f"the model has no {name}, which the adapter adapts")
        layer = known[name]
        if isinstance(layer, ExpertSlice | nn.Embedding):
            raise UnsupportedAdapterError(
                f"{name} is an embedding or an expert; outputs are looked at for linear layers only"
            )
        own = slot_of(name, layer).shape
        if own != shape:
            raise ShapeError(f"{name} is {own} in the model and {shape} in the adapter")
        found[name] = layer
    return found


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _read(output: Any) -> tuple[Tensor, str]:
    """What outputs are compared by where nothing is said, and its name."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found, name
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise OptionError(
            f"the model's output is a {type(first).__name__}; name the tensor to compare by read="
        )
    return first, ""


def kept(y: Tensor, batch: Any) -> Tensor:
    """Places (rows × …) that the mask of a batch of sequences leaves; all of an output a row.

    Layers that see the places of all sequences one below the other are told by their number.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor):
        return y
    # An output a sequence may have as many classes as the sequence has places.
    if y.ndim > mask.ndim and mask.shape == y.shape[: mask.ndim]:
        return y[mask.bool()]
    if y.ndim == 2 and mask.ndim == 2 and y.shape[0] == mask.numel() > len(mask):
        return y[mask.reshape(-1).bool()]
    return y


def _are_classes(logits: Tensor, model: nn.Module) -> bool:
    """Whether logits are those of one class among several; of a regression their shift counts."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return logits.shape[-1] > 1 and problem in (None, "single_label_classification")


def distance(found: Output, wanted: Output) -> Tensor:
    """Divergence Σ p (log p − log q) from the wanted logits in nats, or a squared relative error.

    Raises
    ------
    DataError
        If there is none: no place counts, or the wanted output is zero throughout.
    """
    if wanted.are_logits:
        p, q = (x.values.float().log_softmax(-1) for x in (wanted, found))
        result = (p.exp() * (p - q)).sum(-1).mean()
    else:
        lost2 = (found.values - wanted.values).float().square().sum()
        result = lost2 / wanted.values.float().square().sum()
    if not bool(torch.isfinite(result)):
        raise DataError(
            "outputs of a batch cannot be compared: its mask leaves nothing, the original gives "
            "zeros, or the values have left the range of numbers"
        )
    return result


@torch.no_grad()
def mean_distance(
    outputs: Outputs, batches: Sequence[Any], updates: Updates, wanted: Updates
) -> float:
    """Mean `distance` of the outputs over batches."""
    found = [float(distance(outputs(x, updates), outputs(x, wanted))) for x in batches]
    return sum(found) / len(found)


def train_scales(
    outputs: Outputs, batches: Sequence[Any], updates: Updates, wanted: Updates, rate: float
) -> None:
    """A step of Adam a batch on the scales of ``updates``; the rate falls to a twentieth.

    The wanted outputs are computed as they are needed: logits of all batches may be large.
    """
    scales = [scale for _, _, scale in updates.values() if scale is not None]
    optimizer = torch.optim.Adam(scales, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, len(batches))
    for batch in batches:
        with torch.no_grad():
            target = outputs(batch, wanted)
        optimizer.zero_grad()
        with torch.enable_grad():
            distance(outputs(batch, updates), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
