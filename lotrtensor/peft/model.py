"""LotrModel: LoTR as a tuner of PEFT."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from peft import PeftConfig
from peft.tuners import tuners_utils
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import replicate_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
)
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from lotrtensor.peft.config import LotrConfig, version_of, write_group
from lotrtensor.peft.experts import Experts
from lotrtensor.peft.factors import fill_adapter, make_table, source_groups
from lotrtensor.peft.layer import Embedding, Linear, LotrLayer
from lotrtensor.peft.merging import check_merge
from lotrtensor.peft.planning import (
    base_layers,
    check_carried,
    check_groups,
    check_names,
    check_sharing,
    expert_targets,
    plan_adapter,
    refuse_injection,
)
from lotrtensor.peft.saved import SavedAdapters
from lotrtensor.peft.tying import owners, tied_layers
from lotrtensor.peft.undo import Snapshot
from lotrtensor.torch.expert_slices import Layer
from lotrtensor.torch.fastpath import leave_fast_path
from lotrtensor.torch.groups import GroupPlan
from lotrtensor.torch.init import INITS
from lotrtensor.torch.shared_weights import replace_everywhere
from lotrtensor.torch.watch import watch
from lotrtensor.torch.weight_reads import check_called


class LotrModel(SavedAdapters):
    """Low tensor rank adaptation (arXiv 2402.01376): W_k + scale · U G_k Vᵀ.

    ``lotr_factors[adapter]`` is the table of the shared factors of an adapter, the one owner of U
    and V; the layers own the cores G_k and refer to the factors.

    Parameters
    ----------
    model : nn.Module
        The base model.
    peft_config : dict of str to LotrConfig
        Config of the first adapter, by its name.
    adapter_name : str
        Its name.
    low_cpu_mem_usage : bool
        Make the adapter on the meta device, for a file that is about to be read.
    state_dict : dict, optional
        As for every tuner of PEFT.

    Raises
    ------
    UnsupportedAdapterError
        If ``peft_config`` is a bare config, as ``inject_adapter_in_model`` passes it: the tuner is
        let go then, and the factors with it.
    """

    uses_shared_state = False  # it does; PEFT's refusal of that tells no way to load a directory
    prefix = "lotr_"
    tuner_layer_cls = LotrLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if isinstance(peft_config, PeftConfig):
            refuse_injection(model)
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.lotr_factors = nn.ModuleDict()
        self._lotr_plans = {}
        self._lotr_arguments = frozenset(inspect.signature(type(model).forward).parameters)
        self._lotr_configs = {}
        # Adapters that were made for a file whose tensors have not come yet, and what the model
        # was before: a failed load takes the adapter out again.
        self._lotr_pending = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model, without the arguments that are None and that it does not name.

        PEFT's classes for tasks pass ``input_ids=None`` to models that take features or images,
        which hand it on and then have two.
        """
        named = self._lotr_arguments
        given = {k: v for k, v in kwargs.items() if v is not None or k in named}
        return self.model(*args, **given)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter; ``add_adapter`` calls this without PEFT's injection hooks.

        Raises
        ------
        FormatError, RankError, ShapeError, UnsupportedAdapterError, DataError
            If the adapter does not fit the model, which is as it was.
        """
        given: Any = self.peft_config[adapter_name]
        config: LotrConfig = given.fresh()  # what is written into it belongs to this model alone
        check_groups(config)
        check_sharing(config, adapter_name, self.lotr_factors)
        before = Snapshot(model)
        self.peft_config[adapter_name] = config
        try:
            self._inject(
                model, adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )
        except Exception:
            self._forget(adapter_name)
            before.restore()
            raise
        finally:
            self.peft_config[adapter_name] = given
        given.settle(config)
        self._lotr_configs[adapter_name] = config
        if given.groups is not None:
            self._lotr_pending[adapter_name] = before
        self._sync_factors()
        watch(model)

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        config: LotrConfig,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        maps = [getattr(c, "layer_replication", None) for c in self._others(adapter_name)]
        if config.layer_replication and config.layer_replication not in maps:
            replicate_layers(model, config.layer_replication)
        layers = base_layers(model)
        shared = None
        if config.share_factors and config.groups is None:
            shared = self._lotr_plans[config.share_factors].groups
        plan = plan_adapter(config, layers, self._targets(model, config, layers), shared)
        plan = plan.with_experts(layers)
        check_carried(config, model)
        adapted = [name for group in plan.groups for name in group.modules]
        names = [name for name in adapted if isinstance(layers[name], nn.Module)]
        check_called(model, names)
        tied = {}
        if config.ensure_weight_tying:  # which may be meant for modules_to_save alone
            tied = tied_layers(model, names, warn=not config.modules_to_save)
        if plan.groups:
            owner = config.share_factors if config.groups is None else None
            table = self.factor_table(owner) if owner else None
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                options = get_quantization_kwargs(self)
                self.lotr_factors[adapter_name] = make_table(config, plan, layers, table, options)
            self._lotr_plans[adapter_name] = plan
            config.groups = [write_group(group) for group in plan.groups]
            config.format_version = version_of(plan.groups)
            if plan.experts and config.target_parameters is None:
                stacks = ((path, name) for path, own in plan.experts.items() for name in own)
                config.target_parameters = sorted(f"{path}.{name}" for path, name in stacks)
            if config.target_modules is None:
                config.target_modules = set(names)
            config.keys = frozenset((*names, *plan.experts))
            config.init = config.init if config.init in INITS else "orthogonal"
            if config.share_factors:
                config.train, config.share_factors = "cores", None
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        self._fill_from_source(adapter_name)
        for name in (*names, *plan.experts):
            base = layers[name]
            assert isinstance(base, nn.Module)
            replace_everywhere(model, base, model.get_submodule(name))
        self._tie(adapter_name, tied)
        leave_fast_path(model, names)

    def _others(self, adapter_name: str) -> list[Any]:
        return [config for name, config in self.peft_config.items() if name != adapter_name]

    def _targets(
        self, model: nn.Module, config: LotrConfig, layers: Mapping[str, Layer]
    ) -> list[str]:
        if config.groups is not None or config.source or config.share_factors:
            return []
        experts = expert_targets(config, layers)
        if experts and config.target_modules is None:
            config.target_modules = set()
        check_names(config, layers)
        self._prepare_adapter_config(config, self.get_model_config(model))
        # Name lists like "all-linear" are expanded in place; a copy keeps the user's word.
        named = tuners_utils._maybe_include_all_linear_layers(copy.copy(config), model)
        found = [
            name
            for name, layer in layers.items()
            if isinstance(layer, nn.Module) and self._check_target_module_exists(named, name)
        ]
        return [*(owners(model, found) if config.ensure_weight_tying else found), *experts]

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = tuners_utils.check_target_module_exists(peft_config, key)
        excluded = isinstance(found, tuners_utils._ExcludedModule)
        if peft_config.groups is None or excluded:
            return found
        return key in peft_config.keys

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None and peft_config.groups is not None:
            peft_config.target_modules = set()  # the groups say it
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan = self._lotr_plans[adapter_name]
        if current_key in plan.experts:
            self._adapt_experts(peft_config, adapter_name, target, target_name, parent, current_key)
            return
        group = plan.group_of(current_key)
        table = self.factor_table(adapter_name)
        factors = table.of(group.name) if min(group.rank) else None
        options = _options(peft_config, group) | {"private_rank": group.private.get(current_key, 0)}
        if isinstance(target, LotrLayer):
            target.update_layer(adapter_name, factors, **options)
            return
        kind = Embedding if group.embedding else Linear
        layer = kind(target, adapter_name, **get_quantization_kwargs(self))
        layer.update_layer(adapter_name, factors, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _adapt_experts(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Add an adapter to the fused parameters of one module."""
        experts = target if isinstance(target, Experts) else Experts(target)
        for parameter, group in self._lotr_plans[adapter_name].experts[current_key].items():
            update = experts.update_of(parameter, adapter_name)
            factors = self.factor_table(adapter_name).of(group.name)
            update.update_layer(adapter_name, factors, **_options(peft_config, group))
            if adapter_name not in self.active_adapters:
                update.requires_grad_(False)
        if experts is not target:
            self._replace_module(parent, target_name, experts, target)

    def _inject_parameters(self, peft_config: Any, *_: Any, **__: Any) -> list[str]:
        """Nothing: experts are adapted as the modules that hold them."""
        return list(peft_config.target_parameters)

    def _tie(self, adapter_name: str, tied: Mapping[str, str]) -> None:
        """Give every layer of ``tied`` the update of the layer whose weight it shares."""
        for name, owner in tied.items():
            parent, target, attribute = _get_submodules(self.model, name)
            if not isinstance(target, LotrLayer):
                kind = Embedding if isinstance(target, nn.Embedding) else Linear
                layer = kind(target, adapter_name, **get_quantization_kwargs(self))
                self._replace_module(parent, attribute, layer, target)
                target = layer
            config: Any = self.peft_config[adapter_name]
            dropout = config.lotr_dropout
            target.tie_to(self.model.get_submodule(owner), adapter_name, dropout=dropout)
            target.set_adapter(self.active_adapters)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        # Layers are tied by their weights here; PEFT does so by the names that it knows.
        if not peft_config.ensure_weight_tying or peft_config.modules_to_save:
            super()._check_tied_modules(model, peft_config)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: Any) -> None:
        """Nothing: `tied_layers` finds them."""

    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
            return
        # What is unloaded has its own weight. PEFT would assign the wrapper's to it, which is no
        # parameter where the wrapper computes it: trainable tokens do.
        setattr(parent, child_name, new_module)

    def _fill_from_source(self, adapter_name: str) -> None:
        """Write the numbers that an adapter starts from, if it does not start from zero."""
        plan = self._lotr_plans.get(adapter_name)
        if plan is not None and plan.source is not None:
            table = self.factor_table(adapter_name)
            fill_adapter(self.model, table, adapter_name, source_groups(plan))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and adapter_name in self.lotr_factors:
            for factor in self.lotr_factors[adapter_name].parameters():
                if factor.dtype in (torch.float16, torch.bfloat16):
                    factor.data = factor.data.float()
            self._fill_from_source(adapter_name)  # half precision has rounded its numbers
        if adapter_name in self._lotr_plans:  # PEFT casts an adapter once, when it is new
            self._lotr_plans[adapter_name] = self._lotr_plans[adapter_name]._replace(source=None)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base weights.

        Raises
        ------
        UnsupportedAdapterError
            If another layer uses one of the weights and does not carry the same update.
        DataError
            If ``safe_merge`` and a merged weight would not be finite. No weight has changed then.
        """
        check_merge(self.model, adapter_names, safe=safe_merge)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            check_merge(self.model, adapter_names, safe=safe_merge)
        kinds = Linear | Embedding | Experts
        layers = [module for module in self.model.modules() if isinstance(module, kinds)]
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, adapter_names=adapter_names
        )
        for layer in layers:
            replace_everywhere(self.model, layer, layer.get_base_layer())
        return model

    def _check_merge_allowed(self) -> None:
        """Leave it to `lotrtensor.peft.merging.check_merge`, which knows the adapters."""


def _options(config: Any, group: GroupPlan) -> dict[str, Any]:
    """Options of a layer's new adapter."""
    return {
        "scale": group.scale,
        "dropout": config.lotr_dropout,
        "trains_factors": config.train == "all",
        "init_weights": config.init_weights,
        "inference_mode": config.inference_mode,
    }
