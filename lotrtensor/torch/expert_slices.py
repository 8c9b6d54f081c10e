"""Experts that are slices of a 3-D parameter, as models with fused experts hold them.

transformers marks modules that follow its experts interface by attributes (``has_gate``,
``has_bias``, ``is_transposed``) and the method ``_apply_gate``; they say how the experts compute,
so that no model's code is copied here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lotrtensor.errors import FormatError, OptionError, ShapeError, UnsupportedAdapterError

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ExpertSlice(NamedTuple):
    """One expert's matrix of a fused parameter.

    Attributes
    ----------
    experts : nn.Module
        The module that holds the parameter.
    parameter : str
        Name of the parameter in it, ``"gate_up_proj"`` say.
    number : int
        Number of the expert.
    """

    experts: nn.Module
    parameter: str
    number: int

    @property
    def weight(self) -> Tensor:
        """The expert's weight as m × n."""
        return oriented(self.experts, self.parameter)[self.number]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n)."""
        m, n = self.weight.shape
        return m, n


Layer = nn.Module | ExpertSlice
"""What an update belongs to: a layer, or one expert of a fused parameter."""


def oriented(experts: nn.Module, parameter: str) -> Tensor:
    """Return a fused parameter as K × m × n, whichever way it is stored."""
    weight: Tensor = getattr(experts, parameter)
    return weight.mT if getattr(experts, "is_transposed", False) else weight


def slice_name(experts: str, index: int, parameter: str) -> str:
    """Return the path of one expert's matrix, as a model with a list of experts has it.

    >>> slice_name("layers.0.mlp.experts", 3, "down_proj")
    'layers.0.mlp.experts.3.down_proj'
    """
    return f"{experts}.{index}.{parameter}"


def split_name(name: str) -> tuple[str, int, str] | None:
    """Return experts, index and parameter of a path of `slice_name`; None of any other."""
    head, _, parameter = name.rpartition(".")
    experts, _, index = head.rpartition(".")
    return (experts, int(index), parameter) if experts and index.isdecimal() else None


def select_experts(model: nn.Module, target_parameters: Iterable[str]) -> dict[str, ExpertSlice]:
    """Return every expert of the parameters that are named, by the path of `slice_name`.

    Parameters
    ----------
    model : nn.Module
        The model.
    target_parameters : iterable of str
        Ends of parameter paths, such as ``"experts.gate_up_proj"``.

    Raises
    ------
    OptionError
        If they are no list of texts.
    FormatError
        If one of them names no parameter.
    ShapeError, UnsupportedAdapterError
        If a parameter is no 3-D parameter of experts that can be adapted; the message names it.
    """
    return find_experts(dict(model.named_modules()), target_parameters)


def find_experts(
    modules: Mapping[str, nn.Module], target_parameters: Iterable[str]
) -> dict[str, ExpertSlice]:
    """Return what `select_experts` does, for the modules of a model by path."""
    found: dict[str, ExpertSlice] = {}
    parameters = dict(_parameters(modules))
    for end in check_targets(target_parameters):
        hits = {p: held for p, held in parameters.items() if p == end or p.endswith("." + end)}
        if not hits:
            raise FormatError(
                f"target_parameters has {end!r}, which is not found among the {len(parameters)} "
                f"parameters of the model, such as {next(iter(parameters), '(none)')!r}"
            )
        for path, (experts, parameter) in hits.items():
            check_experts(experts, path, parameter)
            found |= slices_of(experts, path.rpartition(".")[0], parameter)
    return found


def check_targets(target_parameters: Iterable[str]) -> list[str]:
    """Return ``target_parameters`` as a list.

    Raises
    ------
    OptionError
        If they are no list of texts.
    """
    targets: list[Any] = []
    if isinstance(target_parameters, list | tuple | set | frozenset):
        targets = sorted(target_parameters, key=str)
    if not targets or not all(isinstance(text, str) and text for text in targets):
        raise OptionError(
            f"target_parameters is {target_parameters!r}; expected a list of ends of parameter "
            "paths, such as ['experts.gate_up_proj', 'experts.down_proj']"
        )
    return targets


def slices_of(experts: nn.Module, path: str, parameter: str) -> dict[str, ExpertSlice]:
    """Return the experts of one parameter by the path of `slice_name`."""
    count = len(getattr(experts, parameter))
    return {
        slice_name(path, k, parameter): ExpertSlice(experts, parameter, k) for k in range(count)
    }


def layers_by_name(model: nn.Module) -> dict[str, Layer]:
    """Return the modules of a model by path, and the experts of its fused parameters."""
    found: dict[str, Layer] = {name: module for name, module in model.named_modules() if name}
    return with_slices(found)


def with_slices(modules: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return modules by path, and the experts of those that hold fused parameters."""
    found = dict(modules)
    for name, module in modules.items():
        if isinstance(module, nn.Module) and follows_interface(module):
            for parameter in adaptable(module):
                weight = module._parameters.get(parameter)
                if weight is not None and weight.ndim == 3:
                    found |= slices_of(module, name, parameter)
    return found


def follows_interface(module: nn.Module) -> bool:
    """Whether a module says how its experts compute, as transformers' experts interface has it."""
    return all(hasattr(module, name) for name in _INTERFACE)


def adaptable(experts: Any) -> tuple[str, str]:
    """Return the names of the two fused parameters that the interface multiplies by."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def check_experts(experts: nn.Module, path: str, parameter: str) -> None:
    """Refuse a parameter that is no stack of experts, or whose experts compute in another way.

    Raises
    ------
    ShapeError
        If the parameter has other than three dimensions.
    UnsupportedAdapterError
        If its numbers are quantised, its module does not follow the experts interface of
        transformers or does not use the parameter as the interface says, or the experts are
        spread over devices.
    """
    weight: Tensor = getattr(experts, parameter)
    if weight.dtype not in _PLAIN or type(weight.data) is not Tensor:
        raise UnsupportedAdapterError(
            f"{path} is quantised ({type(weight.data).__name__} of {weight.dtype}), and experts "
            "are adapted in floating point alone; load the model dequantised, or leave it out of "
            "target_parameters"
        )
    if weight.ndim != 3 or 0 in weight.shape:
        raise ShapeError(
            f"{path} is {tuple(weight.shape)}; target_parameters takes 3-D parameters, a matrix an "
            "expert: name layers that are modules in target_modules instead"
        )
    kind = type(experts).__name__
    if not follows_interface(experts):
        raise UnsupportedAdapterError(
            f"{path} belongs to a {kind}, which does not follow the experts interface of "
            "transformers (integrations.moe), so that nothing tells how its experts compute; "
            "leave it out of target_parameters"
        )
    if parameter not in adaptable(experts):
        raise UnsupportedAdapterError(
            f"{path} is no matrix that the experts of {kind} multiply by; expected "
            f"{' or '.join(adaptable(experts))}"
        )
    if "." not in path:
        raise UnsupportedAdapterError(
            f"{path} belongs to the model itself, which cannot be replaced in itself; adapt a "
            "model that holds it"
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise UnsupportedAdapterError(
            f"{path} is spread over devices, expert by expert, which is not adapted; load the "
            "model without expert parallelism"
        )


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Every parameter by path, with its module and its name in it."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{path}.{name}" if path else name), (module, name)
