"""A small model with fused experts, for examples: no framework but torch is needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyExperts(nn.Module):
    """Gated experts in two 3-D parameters, by the experts interface of transformers.

    Parameters
    ----------
    count, hidden, inner : int
        Number of experts K, length n of a token, rows inside an expert.
    """

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, count: int = 4, hidden: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.num_experts = count
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, inner) / inner**0.5)

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of each token's experts, one after the other."""
        out = torch.zeros_like(x)
        for k in range(self.num_experts):
            tokens, place = torch.where(index == k)
            y = self._apply_gate(F.linear(x[tokens], self.gate_up_proj[k]))
            y = F.linear(y, self.down_proj[k]) * weights[tokens, place, None]
            out.index_add_(0, tokens, y)
        return out


class TinyMixture(nn.Module):
    """A router and its experts: two of them a token.

    Parameters
    ----------
    count, hidden, inner : int
        As for `TinyExperts`.
    """

    def __init__(self, count: int = 4, hidden: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, count, bias=False)
        self.experts = TinyExperts(count, hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        """Route every token (t, n) to two experts."""
        weights, index = torch.topk(self.router(x).softmax(dim=-1), 2, dim=-1)
        found: Tensor = self.experts(x, index, weights)
        return found


def tiny_experts(count: int = 4, hidden: int = 8, inner: int = 6) -> TinyMixture:
    """Return a model whose experts are two 3-D parameters, the same every time.

    >>> tiny_experts().experts.gate_up_proj.shape
    torch.Size([4, 12, 8])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyMixture(count, hidden, inner)
