"""What a model with several LoTR adapters can do: mix, add, tie and delete them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from lotrtensor.errors import DataError, UnsupportedAdapterError
from lotrtensor.peft.config import LotrConfig, version_of, write_group
from lotrtensor.peft.experts import Experts
from lotrtensor.peft.factors import fill_adapter, tie_equal
from lotrtensor.peft.hooks import mixed_batch_hooks
from lotrtensor.peft.layer import LotrLayer
from lotrtensor.peft.planning import AdapterPlan, trained
from lotrtensor.peft.undo import Snapshot
from lotrtensor.peft.weighted import check_weighted, weighted_config, weighted_sum
from lotrtensor.torch.factors import FactorTable
from lotrtensor.torch.groups import GroupPlan


class SeveralAdapters(BaseTuner):
    """The part of a LoTR tuner that goes from one adapter to many.

    Attributes
    ----------
    lotr_factors : nn.ModuleDict
        Table of the shared factors of each adapter, their one owner.
    """

    lotr_factors: nn.ModuleDict
    _lotr_plans: dict[str, AdapterPlan]
    # Configs as the adapters were made; in peft_config is the user's own object.
    _lotr_configs: dict[str, LotrConfig]
    _lotr_pending: dict[str, Snapshot]

    def factor_table(self, adapter_name: str) -> FactorTable:
        """Return the shared factors of an adapter, by group."""
        table = self.lotr_factors[adapter_name]
        assert isinstance(table, FactorTable)
        return table

    def _sync_factors(self) -> None:
        for module in self.model.modules():
            if isinstance(module, LotrLayer):
                module.sync_factors()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and its factors unless another adapter shares them."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        if adapter_name in self.lotr_factors:
            del self.lotr_factors[adapter_name]
        self._lotr_plans.pop(adapter_name, None)
        self._lotr_configs.pop(adapter_name, None)
        self._lotr_pending.pop(adapter_name, None)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | tuple[int, int] | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str | None = None,
    ) -> float:
        """Add the adapter Σ w_a ΔW_a, without building a ΔW.

        Parameters
        ----------
        adapters : list of str
            Adapters of this model.
        weights : list of float
            Weight of each.
        adapter_name : str
            Name of the new adapter, which is not made active.
        combination_type : str
            ``"cat"``: exact; ranks add up, but for adapters that share factors. ``"linear"``: the
            cores are added, exactly, where the adapters share factors, and refused where not.
            ``"svd"``: the exact sum, rounded to ``svd_rank`` by HOSVD and HOOI.
        svd_rank : int or (int, int), optional
            Ranks (p, q) for ``"svd"``; the largest of the adapters if not given.
        svd_full_matrices, majority_sign_method
            Ignored, as no such SVD and no vote takes place.
        svd_clamp, svd_driver, density
            Of LoRA's method; refused.

        Returns
        -------
        float
            Relative error of the new adapter against the weighted sum, as stored.

        Raises
        ------
        FormatError, DataError, RankError, UnsupportedAdapterError
            If names, weights, rank or combination have no meaning; nothing has changed then.
        """
        unused: dict[str, object] = {
            "svd_clamp": svd_clamp,
            "svd_driver": svd_driver,
            "density": density,
        }
        if combination_type != "svd":
            unused["svd_rank"] = svd_rank
        chosen = check_weighted(
            self.peft_config, adapters, weights, adapter_name, combination_type, unused
        )
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, LotrLayer)}
        groups, error = weighted_sum(layers, chosen, combination_type, svd_rank)
        self.peft_config[adapter_name] = weighted_config(self._lotr_configs[adapters[0]], groups)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self._lotr_pending.pop(adapter_name)
        fill_adapter(self.model, self.factor_table(adapter_name), adapter_name, groups)
        return error

    def plans(self, adapter_name: str) -> tuple[GroupPlan, ...]:
        """Return the groups of an adapter."""
        return self._lotr_plans[adapter_name].groups

    def retrained(self, adapter_name: str) -> None:
        """Note that an adapter has other numbers: its cores may have any rank, and no fit."""
        groups = tuple(map(trained, self.plans(adapter_name)))
        config = self._lotr_configs[adapter_name]
        config.groups = [write_group(group) for group in groups]
        config.format_version = version_of(groups)
        given: Any = self.peft_config[adapter_name]
        given.settle(config)
        self._lotr_plans[adapter_name] = AdapterPlan(groups)

    def tie_factors(self) -> int:
        """Let adapters whose factors are equal to the bit hold one copy of them.

        Adapters that were trained on one basis and saved apart (``lotr unpack`` writes such) then
        take the memory of one, and run in one mixed batch at little more than its cost.

        Returns
        -------
        int
            Number of pairs U, V that were let go.
        """
        layers = [module for module in self.model.modules() if isinstance(module, LotrLayer)]
        return tie_equal([self.factor_table(adapter) for adapter in self.lotr_factors], layers)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise DataError(
                "Cannot pass `adapter_names` when the model is in training mode. Call eval() first."
            )
        experts = next((n for n, m in self.model.named_modules() if isinstance(m, Experts)), None)
        if experts is not None:
            raise UnsupportedAdapterError(
                f"{experts} has fused experts, whose tokens do not tell which row of the batch "
                "they are of; run the rows of each adapter by themselves (set_adapter)"
            )
        unknown = sorted(set(names) - set(self.lotr_factors) - {"__base__"})
        if unknown:
            raise DataError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model "
                f"has {', '.join(self.lotr_factors)}, and '__base__' for none."
            )
        with mixed_batch_hooks(self, list(names), kwargs.get("num_beams")):
            yield
