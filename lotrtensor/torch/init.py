"""Initial U and V; the cores start at zero, so that ΔW is exactly zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lotrtensor.core.linalg import leading_left
from lotrtensor.core.options import check_choice
from lotrtensor.torch.expert_slices import Layer
from lotrtensor.torch.factors import SharedFactors
from lotrtensor.torch.groups import is_transposed

INITS = ("orthogonal", "paper", "svd")


def check_init(init: str) -> str:
    """Return ``init``.

    Raises
    ------
    OptionError
        If it is none of ``"orthogonal"``, ``"paper"`` and ``"svd"``.
    """
    return check_choice(init, "init", INITS)


@torch.no_grad()
def init_factors(factors: SharedFactors, init: str, weights: Sequence[Tensor] = ()) -> None:
    """Fill U and V.

    Parameters
    ----------
    factors : SharedFactors
        To be filled in place; factors on the meta device are left alone.
    init : str
        ``"orthogonal"``: random orthonormal columns. ``"paper"``: entries from N(0, 1).
        ``"svd"``: the leading left singular vectors of [W_1 … W_K] and of [W_1ᵀ … W_Kᵀ], the
        HOSVD of the base weights.
    weights : sequence of tensor (m, n)
        Base weights W_k of the group, for ``"svd"``.

    Raises
    ------
    OptionError
        If ``init`` is not known.
    """
    check_init(init)
    if factors.left.is_meta:
        return
    if init == "svd":
        for factor, side in ((factors.left, weights), (factors.right, [w.T for w in weights])):
            wide = torch.cat([w.detach().to(torch.float64) for w in side], dim=1)
            vectors, _ = leading_left(wide, factor.shape[1], squared=True)
            factor.copy_(vectors)
        return
    for factor in (factors.left, factors.right):
        if init == "paper":
            nn.init.normal_(factor)
        else:
            # QR has no half-precision kernel.
            wide = torch.empty(factor.shape, dtype=torch.float32, device=factor.device)
            factor.copy_(nn.init.orthogonal_(wide))


def base_weight(layer: Layer) -> Tensor:
    """Return the weight of a linear layer, Conv1D, embedding or expert as m × n."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_transposed(layer) or isinstance(layer, nn.Embedding) else weight
