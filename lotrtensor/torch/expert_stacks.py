"""Fused parameters of a plan: all experts of one have to be slices of one group, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lotrtensor.errors import FormatError, UnsupportedAdapterError
from lotrtensor.torch.expert_slices import ExpertSlice, Layer, check_experts, split_name
from lotrtensor.torch.groups import GroupPlan

Stack = tuple[nn.Module, str]
"""A module of experts, and the name of a fused parameter in it."""


def expert_stacks(
    plans: Iterable[GroupPlan], layers: Mapping[str, Layer]
) -> dict[Stack, GroupPlan]:
    """Return the group of every fused parameter that plans adapt.

    Parameters
    ----------
    plans : iterable of GroupPlan
        What is to be adapted.
    layers : mapping of str to nn.Module or ExpertSlice
        Layers and experts of the model by path.

    Raises
    ------
    FormatError
        If experts of one parameter are in several groups, or some are in none.
    UnsupportedAdapterError
        If an expert has private factors, or cannot be adapted.
    """
    found: dict[Stack, GroupPlan] = {}
    counts: dict[Stack, int] = {}
    for plan in plans:
        for name in plan.modules:
            layer = layers[name]
            if not isinstance(layer, ExpertSlice):
                continue
            if plan.private_ranks or not min(plan.rank):
                raise UnsupportedAdapterError(
                    f"{name} is an expert of a fused parameter and has private factors, as "
                    "compressed adapters do, which fused experts do not take; convert the adapter "
                    "to LoTR first (lotr export, lotr convert)"
                )
            stack = layer.experts, layer.parameter
            if found.setdefault(stack, plan) is not plan:
                raise FormatError(
                    f"experts of {path_of(name)} are in the groups {found[stack].name!r} and "
                    f"{plan.name!r}; all experts of a fused parameter share one U and one V: "
                    "choose a grouping that does not divide them"
                )
            counts[stack] = counts.get(stack, 0) + 1
            if counts[stack] == 1:
                check_experts(layer.experts, path_of(name), layer.parameter)
    for (experts, parameter), plan in found.items():
        whole = len(getattr(experts, parameter))
        if counts[experts, parameter] != whole:
            first = next(n for n in plan.modules if _is_of(layers[n], experts, parameter))
            raise FormatError(
                f"group {plan.name!r} adapts {counts[experts, parameter]} of the {whole} experts "
                f"of {path_of(first)}; a fused parameter is adapted as a whole"
            )
    return found


def path_of(name: str) -> str:
    """Return the path of the fused parameter that an expert belongs to.

    >>> path_of("layers.0.mlp.experts.3.down_proj")
    'layers.0.mlp.experts.down_proj'
    """
    parts = split_name(name)
    assert parts is not None
    return f"{parts[0]}.{parts[2]}"


def _is_of(layer: Layer, experts: nn.Module, parameter: str) -> bool:
    return (
        isinstance(layer, ExpertSlice)
        and layer.experts is experts
        and (layer.parameter == parameter)
    )
