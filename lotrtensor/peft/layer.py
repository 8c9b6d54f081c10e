"""The layers of the PEFT method: several adapters on one frozen layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from lotrtensor.errors import DataError
from lotrtensor.peft.held import HeldAdapters
from lotrtensor.peft.mixed import add_mixed
from lotrtensor.peft.quantized import restore_order
from lotrtensor.torch.functional import (
    add_projected,
    add_rows,
    dense_private,
    dense_update,
    project,
)
from lotrtensor.torch.linear import factor_options
from lotrtensor.torch.watch import Watched


class LotrLayer(Watched, HeldAdapters):
    """What linear layers and embeddings have in common.

    `HeldAdapters` says what a layer holds of an adapter.
    """

    @property
    def base_parameter(self) -> Tensor:
        """The weight that the update belongs to, as it is stored."""
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        return weight

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
