"""What a layer of the PEFT method holds of its adapters, and which of it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from lotrtensor.torch.factors import SharedFactors, Transposed
from lotrtensor.torch.groups import is_transposed, slot_of
from lotrtensor.torch.linear import private_factors


class HeldAdapters(BaseTunerLayer):
    """The adapters of one layer: their cores, factors and private parts, and which of them train.

    ``lotr_core[adapter]`` is G_k (p × q), the layer's own; ``lotr_shared[adapter]`` refers to the
    module that holds U and V, which the `LotrModel` owns. It is a plain dict: what it refers to is
    not registered a second time. ``lotr_tied[adapter]`` is the layer of the same weight whose
    update this one takes instead of having its own; it is a plain dict too.

    ``lotr_private_left[adapter]`` and ``lotr_private_right[adapter]`` are P_k (m × c) and
    Q_k (n × c) of an adapter with private parts; one whose group shares nothing has no core.
    """

    adapter_layer_names = ("lotr_core", "lotr_private_left", "lotr_private_right")
    other_param_names = (
        *("lotr_shared", "lotr_scale", "lotr_dropout", "lotr_trains_factors"),
        "lotr_tied",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self._hold_adapters()
        shape = slot_of("the layer", self.get_base_layer()).shape
        self.out_features, self.in_features = shape

    def _hold_adapters(self) -> None:
        """Make the places that adapters go to, empty."""
        self.lotr_core = nn.ParameterDict({})
        self.lotr_private_left = nn.ParameterDict({})
        self.lotr_private_right = nn.ParameterDict({})
        self.lotr_dropout = nn.ModuleDict({})
        self.lotr_shared: dict[str, SharedFactors | Transposed] = {}
        self.lotr_tied: dict[str, HeldAdapters] = {}
        self.lotr_scale: dict[str, float] = {}
        self.lotr_trains_factors: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(
        self,
        adapter_name: str,
        factors: SharedFactors | None,
        *,
        scale: float,
        private_rank: int = 0,
        dropout: float = 0.0,
        trains_factors: bool = True,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter with a zero core, so that the layer stays what it was.

        Parameters
        ----------
        adapter_name : str
            Its name.
        factors : SharedFactors or None
            U and V of this layer's group, if it shares any.
        scale : float
            ΔW_k = scale · U G_k Vᵀ + P_k Q_kᵀ.
        private_rank : int
            Width c of P_k and Q_k, which are zero until a file fills them.
        dropout : float
            Dropout on the input of the update.
        trains_factors : bool
            Whether U and V, and P_k and Q_k, train with the core.
        init_weights : bool
            False draws the core at random, each entry within ±1/√q as in a linear layer.
        inference_mode : bool
            Whether nothing trains.
        """
        if factors is not None:
            self.lotr_core[adapter_name] = nn.Parameter(self._new_core(factors, init_weights))
            self.lotr_shared[adapter_name] = factors
        left, right = private_factors(self.get_base_layer(), private_rank, None)
        if left is not None and right is not None:
            self.lotr_private_left[adapter_name] = left
            self.lotr_private_right[adapter_name] = right
        if dropout:
            self.lotr_dropout[adapter_name] = nn.Dropout(dropout)
        self.lotr_scale[adapter_name] = scale
        self.lotr_trains_factors[adapter_name] = trains_factors
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _new_core(self, factors: SharedFactors, init_weights: bool) -> Tensor:
        core = factors.left.new_zeros(factors.rank)
        if not init_weights:
            nn.init.kaiming_uniform_(core, a=math.sqrt(5))
        return core

    def tie_to(self, owner: HeldAdapters, adapter_name: str, *, dropout: float = 0.0) -> None:
        """Take the update of another layer of the same weight, transposed where it is used so.

        Parameters
        ----------
        owner : HeldAdapters
            The layer that has the core: an embedding (ΔW is m × n and its weight n × m), say, whose
            weight a head uses as n × m.
        adapter_name : str
            Name of the adapter.
        dropout : float
            Dropout on the input of the update.
        """
        self.lotr_tied[adapter_name] = owner
        factors = owner.lotr_shared.get(adapter_name)
        if factors is not None:
            assert isinstance(factors, SharedFactors)
            across = self._lies_across(owner)
            self.lotr_shared[adapter_name] = Transposed(factors) if across else factors
        self.lotr_scale[adapter_name] = owner.lotr_scale[adapter_name]
        if dropout and adapter_name not in self.lotr_dropout:
            self.lotr_dropout[adapter_name] = nn.Dropout(dropout)

    @property
    def stores_transposed(self) -> bool:
        """Whether the base weight is n × m: an embedding's, or that of a Conv1D."""
        base = self.get_base_layer()
        return is_transposed(base) or isinstance(base, nn.Embedding)

    def carries(self, adapter_name: str) -> bool:
        """Whether the adapter has an update here, its own or a tied one."""
        return any(
            adapter_name in held
            for held in (self.lotr_core, self.lotr_private_left, self.lotr_tied)
        )

    def owner_of(self, adapter_name: str) -> HeldAdapters:
        """Return the layer whose core the adapter uses here: this one, or the one it is tied to."""
        return self.lotr_tied.get(adapter_name, self)

    def core(self, adapter_name: str) -> Tensor:
        """Return G_k (p × q) of an adapter."""
        core: Tensor = self.owner_of(adapter_name).lotr_core._parameters[adapter_name]  # type: ignore[assignment]
        return core.T if isinstance(self.lotr_shared[adapter_name], Transposed) else core

    def private(self, adapter_name: str) -> tuple[Tensor, Tensor] | None:
        """Return P_k (m × c) and Q_k (n × c) of an adapter; None where it has none here."""
        owner = self.owner_of(adapter_name)
        left = owner.lotr_private_left._parameters.get(adapter_name)
        right = owner.lotr_private_right._parameters.get(adapter_name)
        if left is None or right is None:
            return None
        return (right, left) if self._lies_across(owner) else (left, right)

    def _lies_across(self, owner: HeldAdapters) -> bool:
        return self.stores_transposed != owner.stores_transposed

    # PEFT asks the layers to say what trains. Factors follow the cores that they belong to, so
    # that every way of asking (set_adapter, disable_adapter, set_requires_grad) reaches them.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, which train unless ``inference_mode``."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.sync_factors()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Say whether adapters train."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.sync_factors()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        super().enable_adapters(enabled)
        self.sync_factors()

    def sync_factors(self) -> None:
        """Let U and V train where the core of an adapter that trains them does."""
        trains: dict[SharedFactors, bool] = {}
        for name, core in self.lotr_core.items():
            if self.lotr_trains_factors[name]:
                factors = self.lotr_shared[name]
                assert isinstance(factors, SharedFactors)
                trains[factors] = trains.get(factors, False) or core.requires_grad
        for factors, requires_grad in trains.items():
            factors.requires_grad_(requires_grad)
        for held in (self.lotr_private_left, self.lotr_private_right):
            for name, factor in held.items():
                if not self.lotr_trains_factors[name]:
                    factor.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.sync_factors()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name in self.lotr_core:
            core, factors = self.lotr_core[adapter_name], self.lotr_shared[adapter_name]
            assert isinstance(factors, SharedFactors)
            if not factors.left.is_meta and factors.left.device != core.device:
                factors.to(core.device)
