"""What a new adapter of a PEFT model will consist of, decided before the model is touched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lotrtensor.adapters.formats.carried import PREFIX
from lotrtensor.adapters.formats.wrappers import matched_names
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.parts import group_parts
from lotrtensor.errors import FormatError, LotrWarning, UnsupportedAdapterError
from lotrtensor.packs.files import is_pack
from lotrtensor.packs.members import first_cluster
from lotrtensor.packs.pack import Pack
from lotrtensor.peft.config import LotrConfig
from lotrtensor.peft.experts import Experts
from lotrtensor.torch.apply import check_train
from lotrtensor.torch.expert_slices import ExpertSlice, Layer, find_experts, with_slices
from lotrtensor.torch.expert_stacks import expert_stacks
from lotrtensor.torch.groups import GroupPlan, check_plans, check_rank, plan_groups, scale_of
from lotrtensor.torch.init import INITS
from lotrtensor.torch.sources import as_lotr
from lotrtensor.torch.state import parts_plans


class AdapterPlan(NamedTuple):
    """Groups of a new adapter, and the numbers it starts from if it does not start from zero.

    ``experts`` has the group of every fused parameter, by the path of its module and its name.
    """

    groups: tuple[GroupPlan, ...]
    source: LotrAdapter | None = None
    experts: Mapping[str, Mapping[str, GroupPlan]] = {}

    def group_of(self, module: str) -> GroupPlan:
        """Return the group that adapts ``module``."""
        return next(group for group in self.groups if module in group.modules)

    def with_experts(self, layers: Mapping[str, Layer]) -> AdapterPlan:
        """Return the plan with the fused parameters that its groups adapt.

        Raises
        ------
        FormatError, ShapeError, UnsupportedAdapterError
            As `lotrtensor.torch.expert_stacks.expert_stacks`.
        """
        paths = {id(layer): name for name, layer in layers.items()}
        found: dict[str, dict[str, GroupPlan]] = {}
        for (experts, parameter), group in expert_stacks(self.groups, layers).items():
            found.setdefault(paths[id(experts)], {})[parameter] = group
        return self._replace(experts=found)


def plan_adapter(
    config: LotrConfig,
    layers: Mapping[str, Layer],
    targets: Iterable[str],
    shared: tuple[GroupPlan, ...] | None = None,
) -> AdapterPlan:
    """Plan an adapter.

    Parameters
    ----------
    config : LotrConfig
        Its config.
    layers : mapping of str to nn.Module or ExpertSlice
        Every base layer and expert of the model by path.
    targets : iterable of str
        Paths that ``target_modules`` and ``target_parameters`` match.
    shared : tuple of GroupPlan, optional
        Groups of the adapter whose factors are to be used.

    Raises
    ------
    FormatError, ShapeError
        If the groups of a file, or an adapter to start from, do not fit the model.
    RankError, ShapeError, UnsupportedAdapterError
        As `lotrtensor.torch.groups.plan_groups`.
    """
    if config.groups is not None:
        groups = config.plans()
        if not (config.modules_to_save or config.trainable_token_indices):
            # PEFT looks for these by the file's own keys, and would not find them.
            groups = tuple(_in_this_wrapper(group, layers) for group in groups)
        check_plans(groups, layers)
        check_train(config.train, cores=any(min(group.rank) for group in groups))
        return AdapterPlan(groups if config.inference_mode else tuple(map(trained, groups)))
    if shared is not None:
        # Private parts, and groups that have nothing else, stay the owner's own.
        own = (replace(group, private_ranks=()) for group in shared if min(group.rank))
        found = AdapterPlan(tuple(map(trained, own)))
        check_train("cores", cores=bool(found.groups))
        return found
    if config.source is not None:
        return _from_source(config, layers)
    plans = plan_groups(
        {name: layers[name] for name in targets},
        rank=check_rank(config.r),
        group_by=config.group_by,
        alpha=config.alpha,
        rslora=config.use_rslora,
    )
    return AdapterPlan(plans)


def _in_this_wrapper(group: GroupPlan, layers: Mapping[str, Layer]) -> GroupPlan:
    """Return a group with its layers by the paths that this model, compiled or not, has."""
    names = matched_names(group.modules, layers.keys())
    return replace(group, modules=tuple(names[name] for name in group.modules))


def base_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the modules and experts of ``model`` by path, adapted ones as they were before."""
    layers: dict[str, Layer] = {}
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in wrapped):
            continue
        if isinstance(module, BaseTunerLayer | Experts):
            wrapped.append(name + ".")
            layers[name] = module.get_base_layer()
        else:
            layers[name] = module
    return with_slices(layers)


def expert_targets(config: LotrConfig, layers: Mapping[str, Layer]) -> list[str]:
    """Return the paths of the experts that ``target_parameters`` names.

    Raises
    ------
    FormatError, ShapeError, UnsupportedAdapterError
        If a name matches nothing, or no parameter that can be adapted; or if layers are chosen by
        number as well, which parameters cannot be.
    """
    if config.target_parameters is None:
        return []
    if config.layers_to_transform is not None:
        raise UnsupportedAdapterError(
            "layers_to_transform does not choose among target_parameters; name the layers in "
            "them: ['layers.0.mlp.experts.down_proj']"
        )
    modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    found = find_experts(modules, config.target_parameters)
    return [n for n in found if not _is_named(n.rsplit(".", 2)[0], config.exclude_modules)]


def _is_named(path: str, names: Iterable[str] | str | None) -> bool:
    """Whether a field names a module: a regular expression, or ends of paths."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, path) is not None
    return any(path == end or path.endswith(f".{end}") for end in names or ())


def trained(group: GroupPlan) -> GroupPlan:
    """What a group becomes in training: its slices may gain rank, and no error holds any more."""
    private = group.private_ranks or (0,) * len(group.modules)
    most = min(group.shape)
    ranks = tuple(max(1, min(most, min(group.rank) + own)) for own in private)
    return replace(group, slice_ranks=ranks, fit=None)


def _from_source(config: LotrConfig, layers: Mapping[str, Layer]) -> AdapterPlan:
    path = Path(str(config.source)).expanduser()
    if not path.is_dir():
        raise FormatError(
            f"init is {config.source!r}; expected {', '.join(map(repr, INITS))}, or the directory "
            "of a trained LoRA or LoTR, or of a pack"
        )
    if is_pack(path):
        return _from_pack(config, Pack(path), layers)
    source = as_lotr(str(config.source), rank=check_rank(config.r), group_by=config.group_by)
    if source.extras:
        raise UnsupportedAdapterError(
            f"{config.source} carries {next(iter(source.extras))!r} besides its update, which "
            "would be lost; load it with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    groups = parts_plans(group_parts(source.groups))
    check_plans(groups, layers)
    rescaled = (
        replace(g, scale=scale_of(g.rank, config.alpha, rslora=config.use_rslora)) for g in groups
    )
    return AdapterPlan(tuple(map(trained, rescaled)), source)


def _from_pack(config: LotrConfig, pack: Pack, layers: Mapping[str, Layer]) -> AdapterPlan:
    """Plan a new adapter on the bases of a pack, its cores zero."""
    for field in ("layers_to_transform", "layers_pattern", "target_parameters"):
        if getattr(config, field) is not None:
            raise UnsupportedAdapterError(
                f"{field} does not choose among the bases of a pack; name layers in target_modules"
            )
    if pack.cells:
        check_names(config, dict.fromkeys(name for cell in pack.cells for name in cell.modules))
    plans, groups = [], []
    for cell in first_cluster(pack.cells):  # the largest cluster
        names = tuple(name for name in cell.modules if name in layers and _is_chosen(config, name))
        if not names:
            continue
        rank = cell.basis.rank
        plan = GroupPlan(
            name=names[0] if len(names) == 1 else f"{names[0]} …",
            modules=names,
            shape=cell.shape,
            rank=rank,
            scale=scale_of(rank, config.alpha, rslora=config.use_rslora),
            slice_ranks=(min(rank),) * len(names),
            embedding=isinstance(layers[names[0]], nn.Embedding),
        )
        left, right = (side.astype(np.float32) for side in cell.basis.factors)
        cores = (np.zeros(rank, np.float32),) * len(names)
        plans.append(trained(plan))
        groups.append(LotrGroup(plan.name, names, left, right, cores, plan.slice_ranks))
    if not plans:
        raise FormatError(
            f"{pack.path} has no bases of modules that are in the model and among target_modules: "
            f"it has {len(pack.cells)} bases"
        )
    check_plans(plans, layers)
    return AdapterPlan(tuple(plans), LotrAdapter(tuple(groups), {}, np.dtype(np.float32)))


def _is_chosen(config: LotrConfig, path: str) -> bool:
    chosen = config.target_modules is None or _is_named(path, config.target_modules)
    return chosen and not _is_named(path, config.exclude_modules)


def check_names(config: LotrConfig, layers: Mapping[str, Layer | None]) -> None:
    """Refuse a list of target modules of which one matches nothing: most often a slip of the pen.

    Experts that the model holds as parameters are no modules: a name that means them is refused,
    and one that modules have as well is warned of, since their experts are left out.

    Raises
    ------
    FormatError
        Naming it.
    """
    paths = [path for path, layer in layers.items() if not isinstance(layer, ExpertSlice)]
    slices = {
        path: x.parameter
        for path, x in layers.items()
        if isinstance(x, ExpertSlice) and not _is_named(path, config.exclude_modules)
    }
    ends = sorted({f"experts.{parameter}" for parameter in slices.values()})
    way_out = f"experts of this model are parameters, which target_parameters names: {ends}"
    if isinstance(config.target_modules, set):
        for name in sorted(config.target_modules):
            if not any(_is_named(path, [name]) for path in paths):
                part = name.removesuffix("_proj")
                meant = any(part in end for end in ends) or name in ("w1", "w2", "w3")
                raise FormatError(
                    f"target_modules has {name!r}, which is not found among {len(paths)} modules, "
                    f"such as {paths[0]!r}; "
                    f"{way_out if ends and meant else 'correct it or leave it out'}"
                )
    if config.target_modules == "all-linear" or config.target_parameters is not None:
        return
    meant_too = {slices[path] for path in slices if _is_named(path, config.target_modules)}
    if meant_too:
        warnings.warn(
            f"target_modules has {min(meant_too)!r}, and experts are left as they are: {way_out}",
            LotrWarning,
            stacklevel=2,
        )


def check_carried(config: LotrConfig, model: nn.Module) -> None:
    """Hold the heads that a file carries in full against those of the model.

    Raises
    ------
    FormatError
        If the file lacks one of their tensors, or has it in another shape.
    """
    if config.carried is None:
        return
    for path, module in model.named_modules():
        if not path.endswith(tuple(config.modules_to_save or ())):
            continue
        plain = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for name, value in plain.state_dict().items():
            found = config.carried.get(f"{PREFIX}{path}.{name}")
            if found != tuple(value.shape):
                raise FormatError(
                    f"{path}.{name} is {tuple(value.shape)} in this model and "
                    f"{'missing' if found is None else found} in the adapter; the adapter was "
                    "made for another head"
                )


def refuse_injection(model: nn.Module) -> NoReturn:
    """Refuse to be injected into a bare model, which would have no place for the factors.

    Raises
    ------
    UnsupportedAdapterError
        Saying what to call instead.
    """
    # transformers notes an adapter before it asks for one, and would look for its config.
    if not hasattr(model, "peft_config"):
        model.__dict__.pop("_hf_peft_config_loaded", None)
    raise UnsupportedAdapterError(
        "a LoTR cannot be injected into a bare model, as transformers' add_adapter, load_adapter "
        "and from_pretrained do: layers have shared state, their factors, which a PeftModel keeps; "
        "use peft.get_peft_model(model, config), PeftModel.from_pretrained(model, directory) or "
        "peft's AutoPeftModel classes"
    )


def check_groups(config: LotrConfig) -> None:
    """Refuse the config of a compressed adapter whose tensors have not been read.

    Raises
    ------
    FormatError
        Saying how to read it.
    """
    if config.is_compressed:
        raise FormatError(
            f"the config has format_version {config.format_version} and no groups, which a "
            "compressed adapter keeps among its tensors; read the config by "
            "LotrConfig.from_pretrained, or leave config out"
        )


def check_sharing(config: LotrConfig, adapter_name: str, existing: Iterable[str]) -> None:
    """Refuse a name or an owner of factors that cannot be.

    Raises
    ------
    FormatError
        If the adapter is named like a part of LoTR's own keys, or the owner does not exist.
    """
    # Adapters are attributes of torch's dicts of modules and parameters.
    taken = hasattr(nn.ModuleDict(), adapter_name) or hasattr(nn.ParameterDict(), adapter_name)
    if adapter_name in ("left", "right", "") or "." in adapter_name or taken:
        raise FormatError(
            f"an adapter cannot be named {adapter_name!r}, which is a part of LoTR's own keys or "
            "of torch's; choose another name"
        )
    owner = config.share_factors
    if owner is not None and config.groups is None and owner not in set(existing) - {adapter_name}:
        raise FormatError(
            f"share_factors names the adapter {owner!r}, which this model does not have; add it "
            "first"
        )
