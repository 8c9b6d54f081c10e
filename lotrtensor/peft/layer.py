"""The layers of the PEFT method: several adapters on one frozen layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from lotrtensor.errors import DataError
from lotrtensor.peft.mixed import add_mixed
from lotrtensor.peft.quantized import restore_order
from lotrtensor.torch.factors import SharedFactors, Transposed
from lotrtensor.torch.functional import (
    add_projected,
    add_rows,
    dense_private,
    dense_update,
    project,
)
from lotrtensor.torch.groups import is_transposed, slot_of
from lotrtensor.torch.linear import factor_options, private_factors
from lotrtensor.torch.watch import Watched


class LotrLayer(Watched, BaseTunerLayer):
    """What linear layers and embeddings have in common.

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
        self.lotr_tied: dict[str, LotrLayer] = {}
        self.lotr_scale: dict[str, float] = {}
        self.lotr_trains_factors: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    @property
    def base_parameter(self) -> Tensor:
        """The weight that the update belongs to, as it is stored."""
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        return weight

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

    def tie_to(self, owner: LotrLayer, adapter_name: str, *, dropout: float = 0.0) -> None:
        """Take the update of another layer of the same weight, transposed where it is used so.

        Parameters
        ----------
        owner : LotrLayer
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

    def owner_of(self, adapter_name: str) -> LotrLayer:
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

    def _lies_across(self, owner: LotrLayer) -> bool:
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

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return ΔW_k of an adapter in the layout of the base weight: m × n, or n × m."""
        delta = torch.zeros(
            self.out_features,
            self.in_features,
            device=factor_options(self.get_base_layer())["device"],
        )
        factors, private = self.lotr_shared.get(adapter_name), self.private(adapter_name)
        if factors is not None:
            core, scale = self.core(adapter_name), self.lotr_scale[adapter_name]
            delta = dense_update(factors.left, core, factors.right, scale)
        if private is not None:
            delta = delta + dense_private(*private).to(delta.device)
        return delta.T if self.stores_transposed else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW_k of adapters to the base weight.

        Raises
        ------
        DataError
            If ``safe_merge`` and the sum is not finite; the weight is as it was.
        """
        if safe_merge:
            self.check_finite("the layer", adapter_names)
        for name in check_adapters_to_merge(self, adapter_names):
            if self.carries(name):
                self._write([name])
                self.merged_adapters.append(name)

    @torch.no_grad()
    def check_finite(self, layer: str, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge what would make the base weight NaN or infinite.

        Raises
        ------
        DataError
            Naming the layer as ``layer``.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not torch.isfinite(self._sum([name for name in names if self.carries(name)])).all():
            raise DataError(
                "NaNs detected in the merged weights. The adapter "
                f"{', '.join(names)} seems to be broken: merged into {layer} it gives NaN or "
                "infinite values. Every weight is left as it was; take an earlier checkpoint."
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged ΔW_k off the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if self.carries(name):
                self._write([name], -1)

    def _write(self, names: Sequence[str], sign: int = 1) -> None:
        """Put the sum in the place of the base weight, unless the owner of the update does so."""
        weight = self.get_base_layer().weight
        for name in names:
            owner = self.owner_of(name)
            if owner is self or owner.get_base_layer().weight is not weight:
                self.set_base_weight(self._sum([name], sign))

    def get_base_weight(self) -> Tensor:
        """Return the base weight, dequantised."""
        restore_order(self.get_base_layer())
        return super().get_base_weight()

    def _sum(self, names: Sequence[str], sign: int = 1) -> Tensor:
        """Return the base weight, dequantised, plus or minus ΔW_k of adapters."""
        weight = self.get_base_weight()
        total = weight
        for name in names:
            total = total + sign * self.get_delta_weight(name).to(weight.device)
        return total.to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's ``convert_to_lora`` may be used: ΔW is additive."""
        return True

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Return base(x) + Σ scale · x V G_kᵀ Uᵀ + x Q_k P_kᵀ over the active adapters.

        With ``adapter_names``, one a row of x, every row gets the update of its own adapter.
        """
        self.lotr_ran = True
        if self._disable_adapters or self.merged_adapters:
            if adapter_names is not None and not self._disable_adapters:
                raise DataError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call "
                    "`unmerge_adapter` first."
                )
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        if adapter_names is not None:
            return add_mixed(self, y, x, adapter_names)
        for name in self.active_adapters:
            if self.carries(name):
                y = self._add(y, x, name)
        return y

    def _add(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        factors, private = self.lotr_shared.get(name), self.private(name)
        if factors is None:
            return y if private is None else self.add_private(y, x, private, name)
        left: Tensor = factors.left
        right: Tensor = factors.right
        core = self.core(name)
        if left.device != y.device:  # layers of a group may be spread over devices
            left, core, right = (x.to(y.device) for x in (left, core, right))
        if private is None:
            return add_projected(y, self.project(x, right, name), left, core, self.scale(name))
        # Both parts see the same x, dropout included.
        both = self.project(x, torch.cat([right, private[1].to(right.dtype)], dim=1), name)
        h, own = both[:, : right.shape[1]], both[:, right.shape[1] :]
        y = add_projected(y, h, left, core, self.scale(name))
        return add_rows(y, own, private[0].T.contiguous(), self.output_scale())

    def add_private(
        self, y: Tensor, x: Tensor, private: tuple[Tensor, Tensor], name: str
    ) -> Tensor:
        """Return y + x Q Pᵀ for the private part (P, Q) of an adapter."""
        left, right = private
        own = self.project(x, right, name)
        return add_rows(y, own, left.T.contiguous(), self.output_scale())

    def scale(self, name: str) -> float:
        """Return the scale of an adapter's shared part, that of the output included."""
        return self.lotr_scale[name] * self.output_scale()

    def output_scale(self) -> float:
        """What the layer multiplies its output by."""
        return 1.0

    def project(self, x: Tensor, right: Tensor, name: str) -> Tensor:
        """Return the rows of x V (t × q)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Quantisation backend for ``repr``."""
        return quantization_extra_repr(self)  # type: ignore[arg-type]


class Linear(LotrLayer, nn.Module):
    """LoTR on a linear layer or transformers' Conv1D."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **quantization: Any) -> None:
        nn.Module.__init__(self)
        LotrLayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name

    def project(self, x: Tensor, right: Tensor, name: str) -> Tensor:
        """Return the rows of x V (t × q)."""
        if name in self.lotr_dropout:
            x = self.lotr_dropout[name](x)
        # Autocast chooses the type itself; a cast before it would only be undone.
        if x.dtype != right.dtype and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, right.dtype)
        return project(x, right)


class Embedding(LotrLayer, nn.Module):
    """LoTR on an embedding: x V is a look-up of rows of V; ΔW is m × n, the weight n × m."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **quantization: Any) -> None:
        nn.Module.__init__(self)
        LotrLayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name

    def project(self, x: Tensor, right: Tensor, name: str) -> Tensor:
        """Return the rows of V (t × q) that x names."""
        base: Any = self.get_base_layer()
        return F.embedding(
            x.reshape(-1),
            right,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )

    def output_scale(self) -> float:
        """What the model multiplies the embedding's output by; the update has to follow."""
        scale = self._get_embed_scale()  # type: ignore[no-untyped-call]
        return 1.0 if scale is None else float(scale)
