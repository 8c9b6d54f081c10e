"""LotrLinear: a frozen linear layer with a LoTR update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lotrtensor.errors import DataError, UnsupportedAdapterError
from lotrtensor.torch.factors import SharedFactors
from lotrtensor.torch.functional import add_update, dense_update
from lotrtensor.torch.groups import is_transposed
from lotrtensor.torch.watch import Watched


class LotrLinear(Watched, nn.Module):
    """A frozen layer and its update: y = base(x) + scale · x V G_kᵀ Uᵀ.

    That is W + ΔW_k with ΔW_k = scale · U G_k Vᵀ.

    ====  =========  ==========================================
    x     (..., n)   input
    y     (..., m)   output
    V     n × q      ``factors.right``, shared by the group
    G_k   p × q      ``lotr_core``, this layer's own, zero at first
    U     m × p      ``factors.left``, shared by the group
    ====  =========  ==========================================

    Parameters
    ----------
    base : nn.Linear or Conv1D
        The layer to adapt; it is frozen.
    factors : SharedFactors
        U and V. They are referred to, not registered: a `FactorTable` of the model owns them.
    scale : float
        Scale of the update.
    dropout : float
        Probability of dropping an entry of x on the way into the update, in training.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> model[0].lotr_core.shape, model[0].delta_weight().shape
    (torch.Size([2, 2]), torch.Size([8, 8]))
    """

    def __init__(
        self,
        base: nn.Module,
        factors: SharedFactors,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lotr_core = nn.Parameter(factors.left.new_zeros(factors.rank))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.merged = False
        self._shared = (factors,)  # a tuple: nn.Module would register a bare module

    @property
    def factors(self) -> SharedFactors:
        """The shared factors U and V."""
        return self._shared[0]

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, which some models read."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) + scale · x V G_kᵀ Uᵀ, or base(x) where the update is merged."""
        self.lotr_ran = True
        y: Tensor = self.base(x, *args, **kwargs)
        if self.merged:
            return y
        factors, core = self._shared[0], self.lotr_core
        if self.dropout is not None:
            x = self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(core.dtype)
        return add_update(y, x, factors.left, core, factors.right, self.scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW_k = scale · U G_k Vᵀ (m × n)."""
        factors = self.factors
        return dense_update(factors.left, self.lotr_core, factors.right, self.scale)

    @torch.no_grad()
    def merge(self, *, safe: bool = False) -> None:
        """Add ΔW_k to the base weight; the layer then costs what its base costs.

        Parameters
        ----------
        safe : bool
            Refuse to write a weight that is not finite.

        Raises
        ------
        DataError
            If ``safe`` is given and W + ΔW_k is not finite; the weight is as it was.
        UnsupportedAdapterError
            If the base weight is quantised.
        """
        if not self.merged:
            self.check_merge(safe=safe)
            self.weight.copy_(self._sum(1))
            self.merged = True

    @torch.no_grad()
    def check_merge(self, *, safe: bool = False) -> None:
        """Raise what `merge` would raise, and change nothing."""
        weight = self.weight
        if self.merged:
            return
        if not weight.is_floating_point() or type(weight.data) is not Tensor:
            raise UnsupportedAdapterError(
                f"the base weight is no plain floating-point tensor ({_kind(weight)}), so that an "
                "update cannot be added to it; for quantised layers use lotrtensor.peft"
            )
        if safe and not torch.isfinite(self._sum(1)).all():
            raise DataError(
                "merging would write NaN or infinite values; the weight is left as it was: "
                "the adapter has diverged, take an earlier checkpoint"
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take ΔW_k off the base weight again, which comes back up to rounding."""
        if self.merged:
            self.weight.copy_(self._sum(-1))
            self.merged = False

    def _sum(self, sign: int) -> Tensor:
        """Return W ± ΔW_k in the layout and type of W."""
        delta = self.delta_weight()
        delta = delta.T if is_transposed(self.base) else delta
        return (self.weight + sign * delta).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Ranks and scale for ``repr``."""
        return f"rank={tuple(self.lotr_core.shape)}, scale={self.scale:g}, merged={self.merged}"


def _kind(weight: Tensor) -> str:
    kind = type(weight.data).__name__
    return f"{kind} of {weight.dtype}"
