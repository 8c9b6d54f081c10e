"""LotrLinear: a frozen linear layer with an update of a shared and a private part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lotrtensor.errors import DataError, UnsupportedAdapterError
from lotrtensor.torch.expert_slices import ExpertSlice, Layer
from lotrtensor.torch.factors import SharedFactors
from lotrtensor.torch.functional import (
    add_rows,
    add_update,
    dense_private,
    dense_update,
    project,
)
from lotrtensor.torch.groups import is_transposed, slot_of
from lotrtensor.torch.watch import Watched


class LotrLinear(Watched, nn.Module):
    """A frozen layer and its update: y = base(x) + scale · x V G_kᵀ Uᵀ + x Q_k P_kᵀ.

    That is W + ΔW_k with ΔW_k = scale · U G_k Vᵀ + P_k Q_kᵀ. `apply_lotr` makes the shared part
    alone; layers of a compressed adapter may have either part, both or none.

    ====  =========  ==========================================
    x     (..., n)   input
    y     (..., m)   output
    V     n × q      ``factors.right``, shared by the group
    G_k   p × q      ``lotr_core``, this layer's own, zero at first
    U     m × p      ``factors.left``, shared by the group
    P_k   m × c      ``lotr_private_left``, this layer's own, zero at first
    Q_k   n × c      ``lotr_private_right``, this layer's own, zero at first
    ====  =========  ==========================================

    Parameters
    ----------
    base : nn.Linear or Conv1D
        The layer to adapt; it is frozen.
    factors : SharedFactors or None
        U and V. They are referred to, not registered: a `FactorTable` of the model owns them. None
        where there is no shared part; ``lotr_core`` is None then.
    scale : float
        Scale of the shared part.
    dropout : float
        Probability of dropping an entry of x on the way into the update, in training.
    private_rank : int
        Width c of P_k and Q_k, which are None where it is 0.
    dtype : torch.dtype, optional
        Of P_k and Q_k; if not given, that of the base weight.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> model[0].lotr_core.shape, model[0].delta_weight().shape
    (torch.Size([2, 2]), torch.Size([8, 8]))
    """

    lotr_core: nn.Parameter | None
    lotr_private_left: nn.Parameter | None
    lotr_private_right: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        factors: SharedFactors | None,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        private_rank: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        core = None if factors is None else nn.Parameter(factors.left.new_zeros(factors.rank))
        self.register_parameter("lotr_core", core)
        sides = private_factors(base, private_rank, dtype)
        self.register_parameter("lotr_private_left", sides[0])
        self.register_parameter("lotr_private_right", sides[1])
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.merged = False
        self._shared = (factors,)  # a tuple: nn.Module would register a bare module

    @property
    def factors(self) -> SharedFactors | None:
        """The shared factors U and V; None where there is no shared part."""
        return self._shared[0]

    @property
    def private_rank(self) -> int:
        """Width c of the private part."""
        return 0 if self.lotr_private_left is None else self.lotr_private_left.shape[1]

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, which some models read."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) and the update of x, or base(x) where the update is merged."""
        self.lotr_ran = True
        y: Tensor = self.base(x, *args, **kwargs)
        core, private = self.lotr_core, self.lotr_private_left
        own = core if core is not None else private
        if self.merged or own is None:
            return y
        if self.dropout is not None:
            x = self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(own.dtype)
        factors, other = self._shared[0], self.lotr_private_right
        if factors is not None and core is not None:
            y = add_update(y, x, factors.left, core, factors.right, self.scale)
        if private is not None and other is not None:
            y = add_rows(y, project(x, other), private.T.contiguous(), 1.0)
        return y

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW_k = scale · U G_k Vᵀ + P_k Q_kᵀ (m × n)."""
        factors, core = self.factors, self.lotr_core
        delta = torch.zeros(slot_of("the layer", self.base).shape, device=self.weight.device)
        if factors is not None and core is not None:
            delta = dense_update(factors.left, core, factors.right, self.scale)
        if self.lotr_private_left is not None and self.lotr_private_right is not None:
            delta = delta + dense_private(self.lotr_private_left, self.lotr_private_right)
        return delta

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
        rank = (0, 0) if self.lotr_core is None else tuple(self.lotr_core.shape)
        own = f", private_rank={self.private_rank}" if self.private_rank else ""
        return f"rank={rank}{own}, scale={self.scale:g}, merged={self.merged}"


def factor_options(base: Layer) -> dict[str, Any]:
    """Return the type and device of factors beside a base layer, which may be quantised."""
    weights = [base.weight] if isinstance(base, ExpertSlice) else list(base.parameters())
    found = next((w for w in weights if w.is_floating_point()), None)
    return {
        "dtype": torch.float32 if found is None else found.dtype,
        "device": weights[0].device if weights else None,
    }


def private_factors(
    base: nn.Module, rank: int, dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter] | tuple[None, None]:
    """Return P (m × c) and Q (n × c) of zeros for a base layer; None where c is 0."""
    if not rank:
        return None, None
    options = factor_options(base) | ({"dtype": dtype} if dtype is not None else {})
    m, n = slot_of("the layer", base).shape
    left, right = (nn.Parameter(torch.zeros(side, rank, **options)) for side in (m, n))
    return left, right


def _kind(weight: Tensor) -> str:
    kind = type(weight.data).__name__
    return f"{kind} of {weight.dtype}"
