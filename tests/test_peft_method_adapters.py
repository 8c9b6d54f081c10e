"""Several adapters of one model: each alone, together, and one a row of a mixed batch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import get_peft_model  # noqa: E402
from torch import nn  # noqa: E402

import lotrtensor as lt  # noqa: E402
from tests.peft_models import (  # noqa: E402
    CORES,
    FACTORS,
    THIRD_PARTY,
    bert,
    config,
    gpt2,
    ids,
    lotr_layers,
    output,
    randomize,
)

pytestmark = pytest.mark.filterwarnings(THIRD_PARTY)


def two_adapters() -> nn.Module:
    model = get_peft_model(bert(), config())
    model.add_adapter("other", config(r=2, group_by="shape", target_modules=["query", "key"]))
    randomize(model, "default", 1)
    randomize(model, "other", 2)
    return model


def alone(name: str) -> torch.Tensor:
    model = two_adapters()
    model.set_adapter(name)
    return output(model)


def test_each_adapter_has_its_own_shared_factors() -> None:
    model = two_adapters()
    tables = model.base_model.lotr_factors
    own = {name: {id(p) for p in table.parameters()} for name, table in tables.items()}
    assert not own["default"] & own["other"]
    for layer in lotr_layers(model).values():
        for name, factors in layer.lotr_shared.items():
            assert {id(p) for p in factors.parameters()} <= own[name]


def test_set_adapter_switches_outputs_and_gradients() -> None:
    model = two_adapters()
    first = output(model)
    model.set_adapter("other")
    second = output(model)
    assert not torch.allclose(first, second, atol=1e-3)
    for name, table in model.base_model.lotr_factors.items():
        assert all(p.requires_grad == (name == "other") for p in table.parameters())
    model.set_adapter("default")
    assert torch.equal(output(model), first)


def test_adding_an_adapter_changes_nothing_of_the_first() -> None:
    model = get_peft_model(bert(), config())
    randomize(model)
    before = output(model)
    model.add_adapter("other", config(inference_mode=True))
    assert torch.equal(output(model), before)
    assert model.get_nb_trainable_parameters()[0] == CORES + FACTORS


def test_delete_adapter_takes_its_factors_along() -> None:
    model = two_adapters()
    first = output(model)
    model.delete_adapter("other")
    assert list(model.base_model.lotr_factors) == ["default"]
    assert not any(".other" in key for key in model.state_dict())
    assert torch.equal(output(model), first)
    model.delete_adapter("default")
    assert not any("lotr" in key for key in model.state_dict())


def test_factors_outlive_the_adapter_that_brought_them() -> None:
    model = get_peft_model(bert(), config())
    model.add_adapter("user", config(share_factors="default"))
    randomize(model, "user", 4)
    model.set_adapter("user")
    expected = output(model)
    model.delete_adapter("default")
    assert torch.equal(output(model), expected)
    assert not any("default" in key for key in model.state_dict())
    assert model.get_nb_trainable_parameters()[0] == CORES


def test_deleting_the_active_adapter_activates_the_other() -> None:
    model = two_adapters()
    expected = alone("other")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    torch.testing.assert_close(output(model), expected)


def test_two_active_adapters_add_up_as_merged_ones() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    both = output(model)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(output(model), both, rtol=1e-4, atol=1e-4)


def test_mixed_batch_gives_each_row_its_adapter() -> None:
    model = two_adapters()
    x = ids(5)
    names = ["other", "default", "__base__", "default", "other"]
    mixed = output(model, x, adapter_names=names)
    for name in set(names):
        rows = [i for i, n in enumerate(names) if n == name]
        if name == "__base__":
            expected = output(bert(), x)
        else:
            model.set_adapter(name)
            expected = output(model, x)
        torch.testing.assert_close(mixed[rows], expected[rows], rtol=1e-4, atol=1e-5)


def test_mixed_batch_of_adapters_that_share_factors() -> None:
    model = get_peft_model(bert(), config())
    randomize(model)
    for k in range(3):
        model.add_adapter(f"user{k}", config(share_factors="default"))
        randomize(model, f"user{k}", k + 1)
    assert (
        len({id(t.of("attention.self.query")) for t in model.base_model.lotr_factors.values()}) == 1
    )
    names = ["user0", "user2", "user2", "default", "user1", "__base__"]
    x = ids(6)
    mixed = output(model, x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            continue
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], output(model, x)[row], rtol=1e-4, atol=1e-5)
        trained = model.get_nb_trainable_parameters()[0]
        assert trained == (CORES + FACTORS if name == "default" else CORES)
    model.delete_adapter("user0")
    model.set_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == CORES + FACTORS


def test_mixed_batch_refusals() -> None:
    model = two_adapters().eval()
    with pytest.raises(lt.DataError, match=r"non-existing adapter\(s\): nobody"):
        model(ids(2), adapter_names=["nobody", "default"])
    with pytest.raises(lt.DataError, match="1 and 2 respectively"):
        model(ids(2), adapter_names=["default"])
    model.train()
    with pytest.raises(lt.DataError, match="training mode"):
        model(ids(1), adapter_names=["default"])
    model.eval().merge_adapter()
    with pytest.raises(lt.DataError, match="unmerge"):
        model(ids(1), adapter_names=["default"])


def test_mixed_batch_generates_with_beams() -> None:
    model = get_peft_model(gpt2(), config(target_modules=["c_attn"]))
    model.add_adapter("other", config(target_modules=["c_attn"]))
    randomize(model, "default", 1)
    randomize(model, "other", 2)
    model.eval()
    names = ["other", "default", "__base__"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    x = ids(3)
    mask = torch.ones_like(x)
    mixed = model.generate(input_ids=x, attention_mask=mask, adapter_names=names, **options)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        own = model.generate(
            input_ids=x[row : row + 1], attention_mask=mask[row : row + 1], **options
        )
        assert torch.equal(mixed[row, : own.shape[1]], own[0])


def test_equal_factors_are_tied_on_request() -> None:
    model = get_peft_model(bert(), config())
    model.add_adapter("twin", config())
    for name, factors in model.base_model.lotr_factors["twin"].groups():
        factors.load_state_dict(model.base_model.lotr_factors["default"].of(name).state_dict())
    randomize(model, "twin", 3)
    model.set_adapter("twin")
    expected = output(model)
    assert model.base_model.tie_factors() == 3
    assert torch.equal(output(model), expected)
    assert model.base_model.tie_factors() == 0


def test_status_functions_of_peft() -> None:
    model = two_adapters()
    status = peft.get_model_status(model)
    assert status.peft_types == {"default": "LOTR", "other": "LOTR"}
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    layers = peft.get_layer_status(model)
    assert len(layers) == len(lotr_layers(model))
