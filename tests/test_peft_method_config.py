"""The config of the PEFT method: whose it is, and what its file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import PeftModel, get_peft_model  # noqa: E402

import lotrtensor as lt  # noqa: E402
from lotrtensor.peft import LotrConfig  # noqa: E402
from tests.peft_models import (  # noqa: E402
    THIRD_PARTY,
    bert,
    config,
    lotr_layers,
    output,
    randomize,
)

pytestmark = [
    pytest.mark.filterwarnings(THIRD_PARTY),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def test_one_config_serves_two_models(tmp_path: Path) -> None:
    """A model keeps the very object; what it makes of it is in its file, and in no other model."""
    own = config(init="svd", target_modules="all-linear", r=2)
    given = own.to_dict()
    models = {layers: get_peft_model(bert(layers=layers), own) for layers in (2, 3)}
    for layers, model in models.items():
        randomize(model)
        assert model.peft_config["default"] is own
        model.save_pretrained(tmp_path / str(layers))
        again = PeftModel.from_pretrained(bert(layers=layers), tmp_path / str(layers))
        assert torch.equal(output(again), output(model))
        read = LotrConfig.from_pretrained(tmp_path / str(layers))
        assert sum(len(group["modules"]) for group in read.groups) == 6 * layers
    # What PEFT writes into the config of any method.
    changed = {"base_model_name_or_path", "auto_mapping", "target_modules"}
    assert {k: v for k, v in own.to_dict().items() if k not in changed} == {
        k: v for k, v in given.items() if k not in changed
    }


def test_one_config_serves_two_adapters_and_their_sum(tmp_path: Path) -> None:
    own = config(r=(3, 4))
    model = get_peft_model(bert(), own, adapter_name="a")
    model.add_adapter("b", own)
    randomize(model)
    model.add_weighted_adapter(["a", "b"], [1.0, -2.0], "sum", combination_type="cat")
    model.save_pretrained(tmp_path)
    assert own.groups is None
    for name, rank in (("a", [3, 4]), ("b", [3, 4]), ("sum", [6, 8])):
        read = LotrConfig.from_pretrained(tmp_path / name)
        assert all(group["rank"] == rank for group in read.groups)
        model.set_adapter(name)
        again = PeftModel.from_pretrained(bert(), tmp_path / name)
        torch.testing.assert_close(output(again), output(model))


def test_a_config_is_what_its_file_holds(tmp_path: Path) -> None:
    own = config(r=(3, 4), exclude_modules=["pooler"])
    own.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written == own.to_dict()
    assert LotrConfig.from_pretrained(tmp_path).to_dict() == written


def test_the_config_of_another_method_is_read_as_that(tmp_path: Path) -> None:
    peft.LoraConfig(target_modules=["query"], r=5).save_pretrained(tmp_path)
    found = LotrConfig.from_pretrained(tmp_path)
    assert (type(found), found.r) == (peft.LoraConfig, 5)


def test_init_weights_false_draws_cores_that_change_the_model() -> None:
    torch.manual_seed(0)
    model = get_peft_model(bert(), config(init_weights=False))
    for layer in lotr_layers(model).values():
        core = layer.lotr_core["default"].detach()
        assert 0 < core.abs().max() <= core.shape[1] ** -0.5
    assert not torch.allclose(output(model), output(bert()), atol=1e-3)


def test_init_weights_and_a_source_contradict_each_other() -> None:
    with pytest.raises(lt.OptionError, match="init_weights is False"):
        config(init="some/directory", init_weights=False)
