"""How a LoTR tuner and the file of an adapter come together, whichever way PEFT goes."""

from __future__ import annotations

from typing import Any

from peft.tuners import tuners_utils
from torch import Tensor, nn

from lotrtensor.adapters.formats.wrappers import matched_names
from lotrtensor.errors import LotrError
from lotrtensor.peft import state as keys
from lotrtensor.peft.several import SeveralAdapters


class SavedAdapters(SeveralAdapters):
    """The part of a LoTR tuner that PEFT calls when it saves an adapter or loads one.

    PEFT calls most of it on the class, with a model that the tuner is somewhere in.
    """

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # The config is written next: with the groups of this model, should it serve several.
        tuner = next((m for m in model.modules() if isinstance(m, cls)), None)
        if tuner is not None and adapter_name in tuner._lotr_configs:
            config.settle(tuner._lotr_configs[adapter_name])
        # The state may be that of a wrapper around the model, whose name leads its keys.
        names = matched_names(state_dict, model.state_dict().keys())
        state_dict = {names[key]: value for key, value in state_dict.items()}
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return keys.split_cores(found)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        found = keys.file_key(key, adapter_name)
        if found is not None:
            return found
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tuner = next((m for m in model.modules() if isinstance(m, cls)), None)
        try:
            expected = cls.expected(model, adapter_name)
            state_dict = keys.dequantise(state_dict, expected, f"adapter {adapter_name!r}")
            state_dict = keys.multiply_cores(state_dict)
            places = keys.split_cores(expected)
            # Biases of the base model have the model's own keys.
            names = matched_names(state_dict, {**places, **model.state_dict()}.keys())
            state_dict = {names[key]: value for key, value in state_dict.items()}
            keys.check_state(state_dict, {key: x.shape for key, x in places.items()})
            state_dict = keys.join_cores(state_dict, expected)
        except LotrError:
            if tuner is not None and adapter_name in tuner._lotr_pending:
                tuner._take_out(adapter_name)
            raise
        if tuner is not None:
            tuner._lotr_pending.pop(adapter_name, None)
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return keys.add_aliases(found, dict(model.named_parameters(remove_duplicate=False)))

    @classmethod
    def expected(cls, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Return the parameters of an adapter by the keys of its file."""
        prefixes = tuners_utils._get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        own = tuners_utils._filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
        return {
            cls._remove_adapter_name_from_key(key, adapter_name): value
            for key, value in own.items()
        }

    def _take_out(self, adapter_name: str) -> None:
        """Undo an injection whose file turned out not to fit."""
        before = self._lotr_pending.pop(adapter_name)
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            before.restore()
