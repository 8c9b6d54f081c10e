"""LotrExperts: frozen fused experts with an update for every expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lotrtensor.errors import DataError
from lotrtensor.torch.expert_products import ExpertsTerm, experts_arguments, experts_forward
from lotrtensor.torch.expert_slices import oriented
from lotrtensor.torch.factors import SharedFactors
from lotrtensor.torch.functional import dense_update
from lotrtensor.torch.watch import Watched


class LotrExpertsUpdate(Watched, nn.Module):
    """The updates of all experts of one fused parameter: ΔW_e = scale · U G_e Vᵀ.

    ====  =========  ==========================================
    V     n × q      ``factors.right``, shared by the group
    G     K × p × q  ``lotr_core``, a core an expert, zero at first
    U     m × p      ``factors.left``, shared by the group
    ====  =========  ==========================================

    Parameters
    ----------
    experts : nn.Module
        The module that holds the parameter. It is referred to, not registered.
    parameter : str
        The parameter's name in it.
    factors : SharedFactors
        U and V, referred to likewise.
    scale : float
        Scale of the updates.
    dropout : float
        Probability of dropping an entry of the experts' input on its way into the update.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> from lotrtensor.torch.examples import tiny_experts
    >>> model = lotr.apply_lotr(tiny_experts(), target_parameters=["experts.down_proj"], rank=2)
    >>> update = model.experts.down_proj
    >>> update.lotr_core.shape, update.delta_weight(3).shape
    (torch.Size([4, 2, 2]), torch.Size([8, 6]))
    """

    lotr_core: nn.Parameter
    lotr_called_by_holder = True

    def __init__(
        self,
        experts: nn.Module,
        parameter: str,
        factors: SharedFactors,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.parameter = parameter
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.merged = False
        self._experts = (experts,)  # tuples: nn.Module would register bare modules
        self._shared = (factors,)
        count = len(self.weight)
        self.lotr_core = nn.Parameter(factors.left.new_zeros(count, *factors.rank))

    @property
    def factors(self) -> SharedFactors:
        """The shared factors U and V."""
        return self._shared[0]

    @property
    def private_rank(self) -> int:
        """Width of private factors, which experts do not have."""
        return 0

    @property
    def weight(self) -> Tensor:
        """The fused parameter, as it is stored."""
        weight: Tensor = getattr(self._experts[0], self.parameter)
        return weight

    def term(self) -> ExpertsTerm:
        """Return the updates as `experts_forward` takes them."""
        factors = self.factors
        return ExpertsTerm(factors.left, self.lotr_core, factors.right, self.scale, self.dropout)

    @torch.no_grad()
    def delta_weight(self, expert: int) -> Tensor:
        """Return ΔW_e = scale · U G_e Vᵀ (m × n) of one expert."""
        factors = self.factors
        return dense_update(factors.left, self.lotr_core[expert], factors.right, self.scale)

    @torch.no_grad()
    def merge(self, *, safe: bool = False) -> None:
        """Add every ΔW_e to its expert's weight, one expert at a time.

        Parameters
        ----------
        safe : bool
            Refuse to write weights that are not finite.

        Raises
        ------
        DataError
            If ``safe`` is given and a sum is not finite; the weights are as they were.
        """
        if not self.merged:
            self.check_merge(safe=safe)
            self._write(1)
            self.merged = True

    @torch.no_grad()
    def check_merge(self, *, safe: bool = False) -> None:
        """Raise what `merge` would raise, and change nothing."""
        if self.merged or not safe:
            return
        for k, weight in enumerate(oriented(self._experts[0], self.parameter)):
            if not torch.isfinite((weight + self.delta_weight(k)).to(weight.dtype)).all():
                raise DataError(
                    f"merging expert {k} of {self.parameter} would write NaN or infinite values; "
                    "the weights are left as they were: the adapter has diverged, take an earlier "
                    "checkpoint"
                )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every ΔW_e off its expert's weight again, which comes back up to rounding."""
        if self.merged:
            self._write(-1)
            self.merged = False

    def _write(self, sign: int) -> None:
        for k, weight in enumerate(oriented(self._experts[0], self.parameter)):
            weight.copy_((weight + sign * self.delta_weight(k)).to(weight.dtype))

    def extra_repr(self) -> str:
        """Ranks and scale for ``repr``."""
        count, p, q = self.lotr_core.shape
        return f"experts={count}, rank={(p, q)}, scale={self.scale:g}, merged={self.merged}"


class LotrExperts(nn.Module):
    """Frozen fused experts and the updates of their parameters, as the model calls them.

    The child of each adapted parameter's name, ``gate_up_proj`` or ``down_proj`` say, is its
    `LotrExpertsUpdate`. Where one is not merged, the experts are computed here, by one product an
    expert; no ΔW_e is ever built.

    Parameters
    ----------
    base : nn.Module
        The experts, which follow the experts interface of transformers; they are frozen.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> from lotrtensor.torch.examples import tiny_experts
    >>> model = tiny_experts()
    >>> names = ["experts.gate_up_proj", "experts.down_proj"]
    >>> model = lotr.apply_lotr(model, target_parameters=names, rank=2)
    >>> type(model.experts).__name__, model(torch.ones(3, 8)).shape
    ('LotrExperts', torch.Size([3, 8]))
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self._names = experts_arguments(base)

    def add(self, update: LotrExpertsUpdate) -> None:
        """Take an update over, under its parameter's name."""
        self.add_module(update.parameter, update)

    @property
    def updates(self) -> dict[str, LotrExpertsUpdate]:
        """Updates by the name of their parameter."""
        children = self._modules.items()
        return {name: x for name, x in children if isinstance(x, LotrExpertsUpdate)}

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        """Return what the experts return when every W_e is W_e + ΔW_e."""
        updates = self.updates
        for update in updates.values():
            update.lotr_ran = True
        terms = {name: [x.term()] for name, x in updates.items() if not x.merged}
        if not terms:
            found: Tensor = self.base(*args, **kwargs)
            return found
        given = [*args, *(kwargs[name] for name in self._names[len(args) :])]
        return experts_forward(self.base, given[0], given[1], given[2], terms)
