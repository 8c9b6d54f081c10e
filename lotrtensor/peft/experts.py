"""The PEFT method on fused experts: several adapters on the 3-D parameters of one module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lotrtensor.errors import DataError
from lotrtensor.peft.layer import LotrLayer
from lotrtensor.torch.expert_products import ExpertsTerm, experts_arguments, experts_forward
from lotrtensor.torch.expert_slices import oriented, slice_name
from lotrtensor.torch.factors import SharedFactors
from lotrtensor.torch.functional import dense_update


class ExpertsUpdate(LotrLayer, nn.Module):
    """Adapters of one fused parameter: ``lotr_core[adapter]`` holds a core an expert, K × p × q.

    It computes nothing by itself: `Experts`, which holds it, does.
    """

    lotr_called_by_holder = True

    def __init__(self, base_layer: nn.Module, parameter: str, adapter_name: str) -> None:
        nn.Module.__init__(self)
        self.parameter = parameter
        self._experts = (base_layer,)  # a tuple: nn.Module would register a bare module
        self._active_adapter = adapter_name
        self.quantization_backend = None
        self._hold_adapters()
        _, self.out_features, self.in_features = oriented(base_layer, parameter).shape

    @property
    def base_layer(self) -> nn.Module:  # type: ignore[override]
        """The module that holds the parameter, which `Experts` registers."""
        return self._experts[0]

    @property
    def base_parameter(self) -> Tensor:
        """The fused parameter, as it is stored."""
        weight: Tensor = getattr(self.base_layer, self.parameter)
        return weight

    @property
    def weight(self) -> Tensor:
        """The fused parameter, which `lotrtensor.torch.check_adapted` looks for."""
        return self.base_parameter

    def _new_core(self, factors: SharedFactors, init_weights: bool) -> Tensor:
        core = factors.left.new_zeros(len(self.base_parameter), *factors.rank)
        if not init_weights:
            for own in core:
                nn.init.kaiming_uniform_(own, a=math.sqrt(5))
        return core

    def term(self, name: str) -> ExpertsTerm:
        """Return an adapter's updates as `experts_forward` takes them."""
        factors = self.lotr_shared[name]
        left, core, right = factors.left, self.core(name), factors.right
        device = self.base_parameter.device
        if left.device != device:  # layers of a group may be spread over devices
            left, core, right = (x.to(device) for x in (left, core, right))
        dropout = dict(self.lotr_dropout.items()).get(name)
        return ExpertsTerm(left, core, right, self.lotr_scale[name], dropout)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        device = self.base_parameter.device if device is None else device
        core = self.lotr_core[adapter_name]
        if not core.is_meta and device.type != "meta":
            core.data = core.data.to(device)
            factors = self.lotr_shared[adapter_name]
            assert isinstance(factors, SharedFactors)
            factors.to(device)

    def delta_of(self, adapter_name: str, expert: int) -> Tensor:
        """Return ΔW_e (m × n) of one expert."""
        factors, core = self.lotr_shared[adapter_name], self.core(adapter_name)[expert]
        return dense_update(factors.left, core, factors.right, self.lotr_scale[adapter_name])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return every ΔW_e of an adapter in the layout of the parameter; for inspection alone."""
        deltas = [self.delta_of(adapter_name, k) for k in range(len(self.base_parameter))]
        found = torch.stack(deltas)
        return found.mT if getattr(self.base_layer, "is_transposed", False) else found

    @torch.no_grad()
    def check_finite(self, layer: str, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge what would make a weight NaN or infinite.

        Raises
        ------
        DataError
            Naming the parameter as ``layer``.
        """
        names = check_adapters_to_merge(self, adapter_names)
        carried = [name for name in names if self.carries(name)]
        for k, weight in enumerate(oriented(self.base_layer, self.parameter)):
            if not torch.isfinite(self._sum_of(weight, k, carried, 1)).all():
                raise DataError(
                    "NaNs detected in the merged weights. The adapter "
                    f"{', '.join(names)} seems to be broken: merged into expert {k} of {layer} it "
                    "gives NaN or infinite values. Every weight is left as it was; take an earlier "
                    "checkpoint."
                )

    def _write(self, names: Sequence[str], sign: int = 1) -> None:
        """Add or take off the updates, one expert at a time."""
        for k, weight in enumerate(oriented(self.base_layer, self.parameter)):
            weight.data.copy_(self._sum_of(weight, k, names, sign))

    def _sum_of(self, weight: Tensor, expert: int, names: Sequence[str], sign: int) -> Tensor:
        total = weight
        for name in names:
            total = total + sign * self.delta_of(name, expert).to(weight.device)
        return total.to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts layers one by one, and knows no experts."""
        return False

    def extra_repr(self) -> str:
        """Shape for ``repr``."""
        return f"experts={len(self.base_parameter)}, parameter={self.parameter!r}"


class Experts(nn.Module):
    """Fused experts as the model calls them, with an `ExpertsUpdate` for each adapted parameter.

    PEFT's own functions go through the updates, which are layers of a tuner each; this module is
    what computes, and what is put back when adapters are unloaded.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._names = experts_arguments(base_layer)

    def get_base_layer(self) -> nn.Module:
        """Return the experts."""
        return self.base_layer

    @property
    def updates(self) -> dict[str, ExpertsUpdate]:
        """Updates by the name of their parameter."""
        children = self._modules.items()
        return {name: x for name, x in children if isinstance(x, ExpertsUpdate)}

    def update_of(self, parameter: str, adapter_name: str) -> ExpertsUpdate:
        """Return the updates of a parameter, made where there are none yet."""
        if parameter not in self._modules:
            self.add_module(parameter, ExpertsUpdate(self.base_layer, parameter, adapter_name))
        return self.updates[parameter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the parameters."""
        for update in self.updates.values():
            update.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        """Return what the experts return when every W_e is W_e + Σ ΔW_e of active adapters."""
        terms: dict[str, list[ExpertsTerm]] = {}
        for name, update in self.updates.items():
            update.lotr_ran = True
            if update.disable_adapters:
                if update.merged:
                    update.unmerge()
            elif not update.merged_adapters:
                active = [a for a in update.active_adapters if update.carries(a)]
                terms[name] = [update.term(adapter) for adapter in active]
        if not any(terms.values()):
            found: Tensor = self.base_layer(*args, **kwargs)
            return found
        given = [*args, *(kwargs[name] for name in self._names[len(args) :])]
        return experts_forward(self.base_layer, given[0], given[1], given[2], terms)


def cores_of(path: str, layer: LotrLayer, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the cores of a layer, or of the experts of a parameter, by path."""
    core = layer.core(adapter_name)
    if isinstance(layer, ExpertsUpdate):
        experts, _, parameter = path.rpartition(".")
        for k, own in enumerate(core):
            yield slice_name(experts, k, parameter), own
    else:
        yield path, core


def cores_by_name(model: nn.Module, adapter_name: str) -> Mapping[str, Tensor]:
    """Return every core of an adapter in ``model`` by the path of its layer or expert."""
    return {
        name: core
        for path, layer in model.named_modules()
        if isinstance(layer, LotrLayer) and adapter_name in layer.lotr_core
        for name, core in cores_of(path, layer, adapter_name)
    }
