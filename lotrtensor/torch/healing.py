"""Healing a compressed adapter: its terms' values fitted to what the original makes of some inputs.

A term value · p qᵀ of a compressed adapter has one value beside its codes. Codes stay as they are,
and so does the size of the file; the values are trained for a few steps, so that the model's
outputs come near to those of the original adapter (distillation; Hinton, Vinyals and Dean,
arXiv 1503.02531). No labels are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
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
from lotrtensor.errors import DataError, OptionError, ShapeError
from lotrtensor.torch.distillation import (
    Read,
    check_batches,
    check_carried,
    check_read,
    linear_layers,
    mean_distance,
    outputs_of,
    train_scales,
)
from lotrtensor.torch.groups import check_model
from lotrtensor.torch.sources import from_numpy

HELD_OUT = 5
"""Every so-manieth batch is not trained on: the outputs are compared on these."""

Pair = tuple[Tensor, Tensor]


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
        Takes the model's output, returns the tensor to compare, by its squared relative error. By
        default ``logits``, by their divergence where they are of several classes, else
        ``last_hidden_state``, else the output itself. Places of sequences that an
        ``attention_mask`` of the batch leaves out do not count.

    Returns
    -------
    Healed
        The adapter, and the distances before and after.

    Raises
    ------
    OptionError
        If there are fewer than ten batches, no terms to fit, or ``rate`` is not positive.
    DataError
        If an adapted layer is missing in the model or never runs, the two adapters have other
        modules, the model lacks what the adapter carries, or outputs are not finite or cannot be
        compared.
    ShapeError
        If a layer or the original has another shape than the update.
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
    lora = _checked(compressed, original)
    inputs = check_batches(batches, 2 * HELD_OUT, "healing")
    check_read(read)
    if not check_number(rate, "rate") > 0:
        raise OptionError(f"rate is {rate:g}; expected a positive number")
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
    changed = {name: (*pair, scales.get(name)) for name, pair in _pairs(compressed)}
    wanted = {
        m.name: (from_numpy(m.B).float(), from_numpy(m.A).float(), None) for m in lora.modules
    }
    layers = linear_layers(model, {m.name: m.shape for m in lora.modules})
    check_carried(model, lora.extras)
    with outputs_of(model, layers, read) as outputs:
        held, trained = inputs[::HELD_OUT], [x for k, x in enumerate(inputs) if k % HELD_OUT]
        before = mean_distance(outputs, held, changed, wanted)
        train_scales(outputs, trained, changed, wanted, rate)
        healed = _with_values(compressed, lora, scales)
        rounded = {name: (*pair, None) for name, pair in _pairs(healed)}
        after = mean_distance(outputs, held, rounded, wanted)
    return Healed(healed, before, after) if after < before else Healed(compressed, before, before)


def _checked(compressed: CompressedAdapter, original: LoraAdapter | LotrAdapter) -> LoraAdapter:
    """The original as a LoRA of the very modules and shapes that were compressed."""
    if not isinstance(compressed, CompressedAdapter):
        raise DataError(
            f"compressed is a {type(compressed).__name__}; expected a CompressedAdapter"
        )
    if not isinstance(original, LoraAdapter | LotrAdapter):
        raise DataError(
            f"original is a {type(original).__name__}; expected a LoraAdapter or a LotrAdapter"
        )
    lora = original.to_lora() if isinstance(original, LotrAdapter) else original
    shapes = {name: group.shape for group in compressed.groups for name in group.modules}
    known = {module.name: module.shape for module in lora.modules}
    for name in [*shapes, *known]:
        if name not in known or name not in shapes:
            one, other = ("original", "compressed adapter")[:: 1 if name in shapes else -1]
            raise DataError(f"the {one} has no {name}, which the {other} has")
        if known[name] != shapes[name]:
            raise ShapeError(
                f"{name} is {known[name]} in the original and {shapes[name]} in the compressed "
                "adapter; expected what it was made of"
            )
    return lora


def _pairs(adapter: CompressedAdapter) -> Iterator[tuple[str, Pair]]:
    """B and A of every module; the columns of its own terms come last."""
    for group in adapter.groups:
        for k, name in enumerate(group.modules):
            b, a = group.stack.factors(k)
            yield name, (from_numpy(b).float(), from_numpy(a).float())


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
