"""The computation of fused experts with updates: x V once a token, cores an expert, U once.

The updates enter before and after the activation, so that the experts are computed here: sorted by
expert, one product each, as the ``grouped_mm`` implementation of transformers' experts interface
does it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lotrtensor.torch.expert_slices import adaptable, oriented
from lotrtensor.torch.functional import add_rows, project
from lotrtensor.torch.grouped import Routing, grouped_product


class ExpertsTerm(NamedTuple):
    """ΔW_e = scale · U G_e Vᵀ for all experts e of one parameter.

    Attributes
    ----------
    left, cores, right : tensor (m, p), (K, p, q), (n, q)
        U, all G_e, and V.
    scale : float
        Scale of the update.
    dropout : callable or None
        Applied to the input of the update.
    """

    left: Tensor
    cores: Tensor
    right: Tensor
    scale: float
    dropout: Callable[[Tensor], Tensor] | None = None


Terms = Mapping[str, Sequence[ExpertsTerm]]
"""Updates of each parameter, by its name."""


def experts_arguments(experts: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward: tokens, choices and weights, in this order."""
    return tuple(inspect.signature(experts.forward).parameters)[:3]


def experts_forward(
    experts: Any, x: Tensor, index: Tensor, weights: Tensor, terms: Terms
) -> Tensor:
    """Return what a module of fused experts returns when every W_e is W_e + Σ ΔW_e.

    Parameters
    ----------
    experts : nn.Module
        The module, which follows the experts interface of transformers.
    x : tensor (t, n)
        Tokens.
    index, weights : tensor (t, k)
        Experts of each token, and how much each counts.
    terms : mapping of str to sequence of ExpertsTerm
        Updates of the parameters.

    Notes
    -----
    On the way up x V is computed once a token, and U once a pair of token and expert, as the
    activation follows. On the way down a V is computed once a pair, and U once a token: a pair's
    weight is multiplied in before, and the sum over the experts of a token taken. Where the
    experts' outputs are normalised one by one, U is computed once a pair there too.
    """
    up, down = adaptable(experts)
    route = Routing.of(index, len(getattr(experts, up)))
    y = _frozen(experts, up, route.spread(x), route)
    for term in terms.get(up, ()):
        h = route.spread(project(_input(x, term), term.right))
        y = add_rows(y, _cores(h, term, route), _wide(term), term.scale)
    a = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    own = weights.reshape(-1)[route.order].unsqueeze(-1)
    if getattr(experts, "has_post_expert_norm", False):
        z = _frozen(experts, down, a, route)
        for term in terms.get(down, ()):
            c = _cores(project(_input(a, term), term.right), term, route)
            z = add_rows(z, c, _wide(term), term.scale)
        return route.collect(experts.post_expert_norm(z) * own).to(x.dtype)
    a = a * own.to(a.dtype)
    out = route.collect(_frozen(experts, down, a, route, own))
    for term in terms.get(down, ()):
        c = _cores(project(_input(a, term), term.right), term, route)
        out = add_rows(out, route.collect(c), _wide(term), term.scale)
    return out.to(x.dtype)


def _frozen(
    experts: nn.Module, parameter: str, rows: Tensor, route: Routing, own: Tensor | None = None
) -> Tensor:
    """Rows (S, n) times the frozen weight of their expert, and its bias times ``own`` (S, 1)."""
    weight = oriented(experts, parameter)
    y = grouped_product(rows.to(weight.dtype), weight.mT, route.ends)
    if getattr(experts, "has_bias", False):
        bias = getattr(experts, f"{parameter}_bias")[route.experts]
        y = y + (bias if own is None else bias * own.to(bias.dtype))
    return y


def _input(x: Tensor, term: ExpertsTerm) -> Tensor:
    if term.dropout is not None:
        x = term.dropout(x)
    # Autocast chooses the type itself; a cast before it would only be undone.
    return x if torch.is_autocast_enabled(x.device.type) else x.to(term.right.dtype)


def _cores(h: Tensor, term: ExpertsTerm, route: Routing) -> Tensor:
    """Rows (S, q) times the core of their expert, (S, p)."""
    return grouped_product(h, term.cores.mT.to(h.dtype), route.ends)


def _wide(term: ExpertsTerm) -> Tensor:
    return term.left.T.contiguous()
