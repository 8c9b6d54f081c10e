"""Healing a compressed adapter: its terms' values fitted to what the original makes of some inputs.

A term value · p qᵀ of a compressed adapter has one value beside its codes. Codes stay as they are,
and so does the size of the file; the values are trained for a few steps, so that the model's
outputs come near to those of the original adapter (distillation; Hinton, Vinyals and Dean,
arXiv 1503.02531). No labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.core.bits.terms import QuantisedTerms
from lotrtensor.core.options import check_number
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import DataError, OptionError, ShapeError, UnsupportedAdapterError
from lotrtensor.torch.expert_slices import ExpertSlice, layers_by_name
from lotrtensor.torch.groups import check_model, slot_of
from lotrtensor.torch.sources import from_numpy

HELD_OUT = 5
"""Every so-manieth batch is not trained on: the outputs are compared on these."""

Read = Callable[[Any], Tensor]
Pair = tuple[Tensor, Tensor]
Update = tuple[Tensor, Tensor, Tensor | None]


class Target(NamedTuple):
    """What a batch gives: values of the places that count, and whether they are logits."""

    values: Tensor
    is_logits: bool


Updates = Mapping[str, Update]
Outputs = Callable[[Any, Updates], Target]


class Healed(NamedTuple):
    """What `heal` found.

    Attributes
    ----------
    adapter : CompressedAdapter
        The adapter with new values; as it was, where these are not nearer on the held-out batches.
    before, after : float
        Mean distance of the outputs from the original's on the held-out batches: nats of
        divergence where the model gives logits, else a squared relative error.

    Examples
    --------
    >>> import numpy as np, torch, lotrtensor as lt, lotrtensor.torch as lotr
    >>> B, A = np.random.default_rng(0).normal(size=(2, 32, 4))
    >>> lora = lt.LoraAdapter((lt.LoraModule("0", B, A.T),), {}, np.dtype("float32"))
    >>> small = lt.compress(lora, tolerance=0.6, form="lora")
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> healed = lotr.heal(model, small, lora, torch.randn(10, 8, 32))
    >>> healed.after <= healed.before
    True
    """

    adapter: CompressedAdapter
    before: float
    after: float


def heal(
    model: nn.Module,
    compressed: CompressedAdapter,
    original: LoraAdapter | LotrAdapter,
    batches: Iterable[Any],
    *,
    rate: float = 0.03,
    read: Read | None = None,
) -> Healed:
    """Fit the values of a compressed adapter's terms to the original's outputs.

    With ΔW_k ≈ U G_k Vᵀ + P_k diag(s_k) Q_kᵀ, the s_k take one step of Adam a batch down the
    distance of the outputs, at a rate that falls to a twentieth; codes and shared parts stay. The
    error that the adapter reports is that of the new values, ‖ΔW − ΔW'‖ / ‖ΔW‖, which may grow:
    the outputs are what is kept.

    Parameters
    ----------
    model : nn.Module
        The base model, without an adapter; it is left as it was.
    compressed : CompressedAdapter
        What `lotrtensor.compress` made of ``original``.
    original : LoraAdapter or LotrAdapter
        The adapter before.
    batches : iterable
        Inputs of the kind that the adapter is for, ten batches at least: mappings, sequences or
        tensors that the model is called with. Every fifth is held out.
    rate : float
        Learning rate of the values, relative to them.
    read : callable, optional
        Takes the model's output, returns the tensor to compare. By default ``logits``, else
        ``last_hidden_state``, else the output itself; places that an ``attention_mask`` of the
        batch leaves out do not count.

    Returns
    -------
    Healed
        The adapter, and the distances before and after.

    Raises
    ------
    OptionError
        If there are fewer than ten batches, no terms to fit, or ``rate`` is not positive.
    DataError
        If an adapted layer is missing in the model or never runs, a module in ``original``, or an
        output is not finite.
    ShapeError
        If a layer has another shape than its update.
    UnsupportedAdapterError
        If embeddings or experts are adapted.

    Examples
    --------
    >>> import numpy as np, torch, lotrtensor as lt, lotrtensor.torch as lotr
    >>> rng = np.random.default_rng(0)
    >>> pairs = [(rng.normal(size=(32, 4)), rng.normal(size=(4, 32))) for _ in "01"]
    >>> modules = tuple(lt.LoraModule(f"{k}", B, A) for k, (B, A) in enumerate(pairs))
    >>> lora = lt.LoraAdapter(modules, {}, np.dtype("float32"))
    >>> small = lt.compress(lora, tolerance=0.6, form="lora")
    >>> generator = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    >>> healed = lotr.heal(model, small, lora, torch.randn(60, 8, 32))
    >>> healed.after < healed.before
    True
    """
    check_model(model)
    for adapter, name, kinds in (
        (compressed, "compressed", (CompressedAdapter,)),
        (original, "original", (LoraAdapter, LotrAdapter)),
    ):
        if not isinstance(adapter, kinds):
            expected = " or ".join(f"a {kind.__name__}" for kind in kinds)
            raise DataError(f"{name} is a {type(adapter).__name__}; expected {expected}")
    if read is not None and not callable(read):
        raise OptionError(f"read is a {type(read).__name__}; expected a function")
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise DataError(f"batches is a {type(batches).__name__}; expected several of them")
    if not check_number(rate, "rate") > 0:
        raise OptionError(f"rate is {rate:g}; expected a positive number")
    inputs = list(batches)
    if len(inputs) < 2 * HELD_OUT:
        raise OptionError(f"there are {len(inputs)} batches; healing needs at least {2 * HELD_OUT}")
    lora = original.to_lora() if isinstance(original, LotrAdapter) else original
    scales = {
        name: nn.Parameter(torch.ones(terms.rank))
        for group in compressed.groups
        for name, terms in zip(group.modules, group.stack.private, strict=True)
        if terms.rank
    }
    if not scales:
        raise OptionError(
            "the adapter has no terms of single modules, whose values could be fitted"
        )
    changed = {name: (*pair, scales.get(name)) for name, pair in _compressed_pairs(compressed)}
    whole = {name: (*pair, None) for name, pair in _original_pairs(lora, compressed)}
    with _outputs_of(model, _layers(model, compressed), read or _read) as outputs:
        held = inputs[::HELD_OUT]
        before = _mean_distance(outputs, held, changed, whole)
        _train(outputs, [x for k, x in enumerate(inputs) if k % HELD_OUT], changed, whole, rate)
        healed = _with_values(compressed, lora, scales)
        rounded = {name: (*pair, None) for name, pair in _compressed_pairs(healed)}
        after = _mean_distance(outputs, held, rounded, whole)
    return Healed(healed, before, after) if after < before else Healed(compressed, before, before)


def _compressed_pairs(adapter: CompressedAdapter) -> Iterator[tuple[str, Pair]]:
    """B and A of every module; the columns of its own terms come last."""
    for group in adapter.groups:
        for k, name in enumerate(group.modules):
            b, a = group.stack.factors(k)
            yield name, (from_numpy(b).float(), from_numpy(a).float())


def _original_pairs(lora: LoraAdapter, compressed: CompressedAdapter) -> Iterator[tuple[str, Pair]]:
    known = {module.name: module for module in lora.modules}
    for name in (name for group in compressed.groups for name in group.modules):
        if name not in known:
            raise DataError(f"the original has no {name}, which the compressed adapter has")
        module = known[name]
        yield name, (from_numpy(module.B).float(), from_numpy(module.A).float())


def _layers(model: nn.Module, adapter: CompressedAdapter) -> dict[str, nn.Module]:
    """The adapted layers by path, which are linear and have the updates' shapes."""
    known = layers_by_name(model)
    found: dict[str, nn.Module] = {}
    for group in adapter.groups:
        for name in group.modules:
            if name not in known:
                raise DataError(f"the model has no {name}, which the adapter adapts")
            layer = known[name]
            if isinstance(layer, ExpertSlice | nn.Embedding):
                raise UnsupportedAdapterError(
                    f"{name} is an embedding or an expert; values are fitted for linear layers only"
                )
            shape = slot_of(name, layer).shape
            if shape != group.shape:
                raise ShapeError(f"{name} is {shape} in the model and {group.shape} in the adapter")
            found[name] = layer
    return found


@contextmanager
def _outputs_of(model: nn.Module, layers: Mapping[str, nn.Module], read: Read) -> Iterator[Outputs]:
    """A function that runs a batch with given updates; the model only evaluates meanwhile."""
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
        return y + h @ b.T

    def outputs(batch: Any, updates: Updates) -> Target:
        nonlocal current
        current = updates
        found = _call(model, batch)
        if missing := set(layers) - called:
            raise DataError(
                f"{min(missing)} did not run on the first batch: its values cannot be fitted"
            )
        is_logits = read is _read and getattr(found, "logits", None) is not None
        y = read(found)
        if not bool(torch.isfinite(y).all()):
            raise DataError("the model's output is not finite")
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and mask.shape == y.shape[: mask.ndim]:
            y = y[mask.bool()]
        return Target(y, is_logits)

    training = model.training
    flags = [(p, p.requires_grad) for p in model.parameters()]
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
        model.train(training)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _read(output: Any) -> Tensor:
    """What the outputs are compared by."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise OptionError(
            f"the model's output is a {type(first).__name__}; name the tensor to compare by read="
        )
    return first


def _distance(found: Target, wanted: Target) -> Tensor:
    """Divergence from the original's logits in nats, or a squared relative error."""
    if wanted.is_logits:
        p, q = (x.values.float().log_softmax(-1) for x in (wanted, found))
        return (p.exp() * (p - q)).sum(-1).mean()
    difference = (found.values - wanted.values).float()
    return difference.square().sum() / wanted.values.float().square().sum()


@torch.no_grad()
def _mean_distance(
    outputs: Outputs, batches: Sequence[Any], updates: Updates, whole: Updates
) -> float:
    found = [float(_distance(outputs(b, updates), outputs(b, whole))) for b in batches]
    return sum(found) / len(found)


def _train(
    outputs: Outputs, batches: Sequence[Any], updates: Updates, whole: Updates, rate: float
) -> None:
    """A step of Adam a batch on all scales; the rate falls to a twentieth.

    The original's outputs are computed as they are needed: logits of all batches may be large.
    """
    scales = [scale for _, _, scale in updates.values() if scale is not None]
    optimizer = torch.optim.Adam(scales, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, len(batches))
    for batch in batches:
        with torch.no_grad():
            wanted = outputs(batch, whole)
        optimizer.zero_grad()
        with torch.enable_grad():
            _distance(outputs(batch, updates), wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _with_values(
    adapter: CompressedAdapter, original: LoraAdapter, scales: Mapping[str, Tensor]
) -> CompressedAdapter:
    """The adapter with its values times the scales, rounded as they are stored, and its errors."""
    modules = {module.name: module for module in original.modules}
    groups = []
    for group in adapter.groups:
        private = []
        for name, terms in zip(group.modules, group.stack.private, strict=True):
            scale = scales[name].detach().double().numpy() if name in scales else 1.0
            scaled = QuantisedTerms(terms.left, terms.values * scale, terms.right)
            private.append(scaled.rounded(group.stack.value_dtype))
        stack = replace(group.stack, private=tuple(private))
        pairs = [(modules[name], stack.factors(k)) for k, name in enumerate(group.modules)]
        left = LowRankStack(
            [np.hstack([m.B.astype(np.float64), b]) for m, (b, _) in pairs],
            [np.vstack([m.A.astype(np.float64), -a]) for m, (_, a) in pairs],
        )
        error = float(np.sqrt(np.sum(left.norms2()))) / group.norm if group.norm else 0.0
        groups.append(replace(group, stack=stack, relative_error=error))
    return replace(adapter, groups=tuple(groups))
