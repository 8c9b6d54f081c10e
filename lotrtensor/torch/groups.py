"""Plan which layers share factors and at what ranks, before the model is changed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import nn

from lotrtensor.adapters.expert_weights import fused_hint
from lotrtensor.adapters.formats.wrappers import matched_names
from lotrtensor.adapters.grouping import Slot, group_modules
from lotrtensor.errors import (
    DataError,
    FormatError,
    OptionError,
    RankError,
    ShapeError,
    UnsupportedAdapterError,
)
from lotrtensor.torch.expert_slices import ExpertSlice, Layer

Rank = int | tuple[int, int]

DEFAULT_ALPHA = 32.0
"""For orthonormal factors: a scale of 4 at rank 8, which trained best; see `scale_of`."""

PAPER_ALPHA = 1.0
"""Factors with entries from N(0, 1) are larger by √m and √n, so their scale must be smaller."""


@dataclass(frozen=True)
class GroupPlan:
    """Layers that are to share one U and one V.

    Attributes
    ----------
    name : str
        Name of the group; also its key in a file.
    modules : tuple of str
        Paths of the layers, one per slice.
    shape : (int, int)
        Shape (m, n) of a ΔW_k.
    rank : (int, int)
        Left and right rank (p, q); (0, 0) where nothing is shared.
    scale : float
        ΔW_k = scale · U G_k Vᵀ + P_k Q_kᵀ.
    slice_ranks : tuple of int
        No core has a rank above this.
    embedding : bool
        Whether the layers are embeddings, whose weights are n × m.
    fit : mapping or None
        The error that a conversion recorded, carried along.
    private_ranks : tuple of int
        Width c_k of P_k and Q_k, one a slice; empty where no slice has a private part.
    """

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    rank: tuple[int, int]
    scale: float
    slice_ranks: tuple[int, ...]
    embedding: bool = False
    fit: Mapping[str, Any] | None = None
    private_ranks: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of trained numbers: m p + n q + K p q + (m + n) Σ c_k."""
        (m, n), (p, q) = self.shape, self.rank
        private = (m + n) * sum(self.private_ranks)
        return m * p + n * q + len(self.modules) * p * q + private

    @property
    def private(self) -> dict[str, int]:
        """Columns c_k of the private part of every module that has one."""
        columns = zip(self.modules, self.private_ranks, strict=bool(self.private_ranks))
        return {name: count for name, count in columns if count}


def plan_groups(
    layers: Mapping[str, Layer],
    *,
    rank: Rank,
    group_by: str = "type",
    alpha: float = DEFAULT_ALPHA,
    rslora: bool = False,
) -> tuple[GroupPlan, ...]:
    """Group layers and give every group its ranks and scale.

    Parameters
    ----------
    layers : mapping of str to nn.Module or ExpertSlice
        The layers and experts to adapt, by path.
    rank : int or (int, int)
        Left and right rank (p, q) of every group.
    group_by : str
        ``"type"``, ``"shape"`` or patterns; see `lotrtensor.adapters.grouping.group_modules`.
    alpha, rslora
        See `scale_of`.

    Raises
    ------
    RankError
        If a rank is no positive integer, or larger than the layers of a group.
    ShapeError
        If a pattern brings layers of unlike shapes together.
    FormatError
        If ``group_by`` is no grouping.
    UnsupportedAdapterError
        If a layer is neither linear nor an embedding; the message names it.
    """
    pair = check_rank(rank)
    check_grouping(group_by)
    groups = group_modules([slot_of(name, layer) for name, layer in layers.items()], group_by)
    plans = []
    for name, slots in groups.items():
        (m, n), (p, q) = slots[0].shape, pair
        if p > m or q > n:
            raise RankError(
                f"rank (p, q) = ({p}, {q}) exceeds the layers of group {name!r}, which are "
                f"{m} × {n} ({slots[0].name}); choose p ≤ {m} and q ≤ {n}"
            )
        plans.append(
            GroupPlan(
                name=name,
                modules=tuple(slot.name for slot in slots),
                shape=(m, n),
                rank=pair,
                scale=scale_of(pair, alpha, rslora=rslora),
                slice_ranks=(min(pair),) * len(slots),
                embedding=slots[0].embedding,
            )
        )
    return tuple(plans)


def check_model(model: object) -> None:
    """Refuse what is no torch module.

    Raises
    ------
    DataError
        Saying what was found.
    """
    if not isinstance(model, nn.Module):
        raise DataError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")


def check_rank(rank: Rank | Sequence[int]) -> tuple[int, int]:
    """Return ``rank`` as a pair (p, q).

    Raises
    ------
    RankError
        If it is no pair of positive integers.
    """
    pair = tuple(rank) if isinstance(rank, list | tuple) else (rank, rank)
    if len(pair) != 2 or not all(_is_count(r) for r in pair):
        raise RankError(f"rank is {rank!r}; expected a positive integer or a pair (p, q) of them")
    return int(pair[0]), int(pair[1])


def check_grouping(group_by: str) -> None:
    """Refuse a grouping that is no string.

    Raises
    ------
    OptionError
        Naming what was found.
    """
    if not isinstance(group_by, str):
        raise OptionError(
            f"group_by is {group_by!r}; expected 'type', 'shape' or patterns such as "
            "'qv=query|value'"
        )


def check_numbers(alpha: float | None, dropout: float, *, prefix: str = "") -> None:
    """Refuse an alpha or a dropout that has no meaning.

    Raises
    ------
    OptionError
        Naming the argument and its value.
    """
    if alpha is not None and not (_is_real(alpha) and math.isfinite(alpha)):
        raise OptionError(f"{prefix}alpha is {alpha!r}; expected a finite number")
    if not (_is_real(dropout) and 0.0 <= dropout < 1.0):
        raise OptionError(f"{prefix}dropout is {dropout!r}; expected a number 0 ≤ p < 1")


def scale_of(rank: tuple[int, int], alpha: float, *, rslora: bool = False) -> float:
    """Return alpha / r, or alpha / √r where ``rslora``, with r = √(p q)."""
    mean = math.sqrt(rank[0] * rank[1])
    return alpha / (math.sqrt(mean) if rslora else mean)


def _way_out(missing: str, layers: Mapping[str, Layer]) -> str:
    """What to do about a layer of an adapter that a model does not have."""
    if matched_names([missing], layers)[missing] in layers:
        return (
            "its name is that of a compiled or wrapped model: lotrtensor.load it and save it anew, "
            "which takes the wrapper off"
        )
    return fused_hint(missing, layers) or "the adapter was made for another model"


def check_plans(plans: Iterable[GroupPlan], layers: Mapping[str, Layer]) -> None:
    """Check plans that were read from a file against a model, its layers and experts by path.

    Raises
    ------
    FormatError
        If layers are missing: the adapter was made for another model.
    ShapeError
        If a layer has another shape.
    """
    for plan in plans:
        missing = [name for name in plan.modules if name not in layers]
        if missing:
            raise FormatError(
                f"group {plan.name!r} adapts {missing[0]!r}, which this model does not have "
                f"({len(missing)} of {len(plan.modules)} layers are missing); "
                + _way_out(missing[0], layers)
            )
        for name in plan.modules:
            slot = slot_of(name, layers[name])
            if (slot.shape, slot.embedding) != (plan.shape, plan.embedding):
                raise ShapeError(
                    f"{name} is {slot.shape[0]} × {slot.shape[1]} in this model and "
                    f"{plan.shape[0]} × {plan.shape[1]} in the adapter (group {plan.name!r}); "
                    "the adapter was made for another model"
                )


def select(model: nn.Module, patterns: str | Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers of ``model`` that ``patterns`` name, by path.

    Parameters
    ----------
    model : nn.Module
        The model.
    patterns : str or iterable of str
        One string: a regular expression for the whole path. Several: ends of paths, ``"query"``
        or ``"attention.output.dense"``.

    Raises
    ------
    OptionError
        If they are no text.
    FormatError
        If one of them matches nothing, or is no regular expression.
    """
    named = {name: module for name, module in model.named_modules() if name}
    tests = [patterns] if isinstance(patterns, str) else _texts(patterns)
    if not tests:
        raise FormatError("patterns is empty; expected ends of module paths, such as 'query'")
    found: dict[str, nn.Module] = {}
    for test in tests:
        whole = isinstance(patterns, str)
        hits = {n: m for n, m in named.items() if (_matches if whole else _ends)(test, n)}
        if not hits:
            raise FormatError(
                f"pattern {test!r} matches none of the {len(named)} modules of "
                f"{type(model).__name__}, such as {next(iter(named), '(none)')!r}"
            )
        found |= hits
    return {name: module for name, module in named.items() if name in found}


def slot_of(name: str, layer: Layer) -> Slot:
    """Return what grouping needs to know of a layer.

    Raises
    ------
    UnsupportedAdapterError
        If the layer is neither linear nor an embedding, or an embedding that is given something
        other than the rows to look up.
    """
    if isinstance(layer, ExpertSlice):
        return Slot(name, layer.shape)
    if isinstance(layer, nn.Embedding):
        if not _looks_up_its_input(layer):
            raise UnsupportedAdapterError(
                f"{name} is a {type(layer).__name__}, an embedding that works out itself which "
                "rows it looks up, so that an update would look up others: leave it out of the "
                "target modules"
            )
        return Slot(name, (layer.embedding_dim, layer.num_embeddings), embedding=True)
    if is_transposed(layer):
        n, m = layer.weight.shape  # type: ignore[misc]
        return Slot(name, (m, n))
    for out_name, in_name in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        shape = (getattr(layer, out_name, None), getattr(layer, in_name, None))
        if isinstance(shape[0], int) and isinstance(shape[1], int):
            return Slot(name, (shape[0], shape[1]))
    raise UnsupportedAdapterError(
        f"{name} is a {type(layer).__name__}, which has no LoTR form; expected a linear layer, "
        "a Conv1D of transformers or an embedding: leave it out of the target modules"
    )


def is_transposed(layer: Layer) -> bool:
    """Whether a layer is transformers' Conv1D, a linear layer whose weight is n × m."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _looks_up_its_input(layer: nn.Embedding) -> bool:
    """Whether the layer gives the rows that its input names, or those times its ``embed_scale``.

    Learned positions of OPT, BART and others are given a mask, tokens or a length instead.
    """
    kind = type(layer)
    plain = kind.forward is nn.Embedding.forward or hasattr(layer, "embed_scale")
    # Those of bitsandbytes read quantised rows; one of them normalises what it has read.
    quantised = kind.__module__.startswith("bitsandbytes.") and kind.__name__ != "StableEmbedding"
    return plain or quantised


def _texts(patterns: Iterable[str]) -> list[str]:
    try:
        found = list(patterns)
    except TypeError:
        found = [patterns]  # type: ignore[list-item]
    if all(isinstance(text, str) for text in found):
        return found
    raise OptionError(
        f"patterns is {patterns!r}; expected ends of module paths, such as ['query', 'value'], or "
        "one regular expression"
    )


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise FormatError(f"pattern {pattern!r} is no regular expression ({error})") from error


def _ends(end: str, name: str) -> bool:
    return name == end or name.endswith("." + end)
