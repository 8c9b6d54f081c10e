"""Names that wrappers put into keys: taken off, told once, never at the price of a real module."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lotrtensor as lt
from adapters_fixtures import (
    PREFIX,
    Peft,
    assert_refused,
    assert_same_modules,
    bert_pairs,
    dense,
    document,
    lora_config,
    lora_tensors,
    lotr,
    quiet,
    read_arrays,
    read_config,
    write_adapter,
    write_lora,
)
from lotrtensor import FormatError, LotrWarning
from lotrtensor.adapters.formats.wrappers import unwrapped

PRIVATE = [
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_fpw_module", "_forward_module", "_module"),
]
OUTSIDE = [
    *("_orig_mod.base_model.model.", "module.base_model.model.", "base_model.model._orig_mod."),
    *("module.module.base_model.model.", "_orig_mod.module.base_model.model.module."),
    *("base_model.model._fsdp_wrapped_module.", "base_model.model.base_model.model."),
    *("base_model.model.module.", "module.base_model.model._orig_mod.", "module."),
    *("base_model.model._orig_mod.module.", "_orig_mod."),
    *("model.base_model.model.", "policy.net.base_model.model._orig_mod."),
]


def renamed(path, rename):
    """The adapter of `write_lora` under other keys."""
    source = write_lora(path, bert_pairs(layers=2))
    tensors = {rename(key.removeprefix(PREFIX)): x for key, x in read_arrays(source).items()}
    return write_adapter(path, read_config(source), tensors)


@pytest.mark.parametrize("prefix", OUTSIDE)
def test_wrappers_around_the_model_are_taken_off_with_one_warning(tmp_path, prefix):
    expected = lt.load(write_lora(tmp_path / "plain", bert_pairs(layers=2)))
    source = renamed(tmp_path / "a", lambda path: prefix + path)
    with pytest.warns(LotrWarning) as caught:
        found = lt.load(source)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(source) in message
    assert prefix + "encoder.layer.0" in message
    assert_same_modules(dense(found), dense(expected), 0.0)


@pytest.mark.parametrize("wrapper", PRIVATE)
def test_wrappers_around_inner_blocks_are_taken_off(tmp_path, wrapper):
    expected = lt.load(write_lora(tmp_path / "plain", bert_pairs(layers=2)))
    inner = renamed(
        tmp_path / "a", lambda path: PREFIX + path.replace("layer.1.", f"layer.1.{wrapper}.")
    )
    with pytest.warns(LotrWarning, match=wrapper) as caught:
        found = lt.load(inner)
    assert len(caught) == 1
    assert_same_modules(dense(found), dense(expected), 0.0)


PARTS = st.sampled_from(["layers", "0", "7", "self_attn", "q_proj", "orig_mod", "model"])


@given(data=st.data(), path=st.lists(PARTS, min_size=2, max_size=5))
@settings(max_examples=200)
def test_any_nesting_of_private_wrappers_comes_off(data, path):
    """Private names between the parts of a path, in front of PEFT's prefix and behind it."""
    wrappers = st.lists(st.sampled_from(PRIVATE), max_size=2)
    before = [part for part in data.draw(wrappers)]
    parts = ["base_model", "model"]
    for part in path:
        parts += [*data.draw(wrappers), part]
    key = ".".join([*before, *parts, "lora_A", "weight"])
    plain = PREFIX + ".".join([*path, "lora_A", "weight"])
    other = PREFIX + "model.elsewhere.lora_A.weight"
    if key == plain:
        assert unwrapped([key, other], "file") == {key: plain, other: other}
        return
    with pytest.warns(LotrWarning):
        assert unwrapped([key, other], "file") == {key: plain, other: other}


@pytest.mark.parametrize(
    "names",
    [("module.q", "head.q", "out.q"), ("layers.0.module.q", "layers.1.module.q", "net.module.q")],
)
def test_a_part_of_the_model_called_module_stays_with_a_word(tmp_path, names):
    pairs = dict(zip(names, bert_pairs(1).values(), strict=True))
    with pytest.warns(LotrWarning, match="has a part called module, which is kept") as caught:
        found = lt.load(write_lora(tmp_path / "a", pairs))
    assert len(caught) == 1
    assert {m.name for m in found.modules} == set(names)


def test_two_keys_that_become_one_are_refused(tmp_path):
    pairs = bert_pairs(layers=1)
    tensors = lora_tensors(pairs) | lora_tensors(pairs, prefix=PREFIX + "_orig_mod.")
    source = write_adapter(tmp_path / "a", lora_config(3), tensors)
    with pytest.raises(FormatError, match=r"_orig_mod.*the same tensor"):
        lt.load(source)
    assert_refused(lotr("inspect", source), source, "_orig_mod", "same tensor")


def test_patterns_of_the_config_speak_of_the_wrapped_paths(tmp_path):
    pairs = bert_pairs(layers=2)
    source = write_adapter(
        tmp_path / "a",
        lora_config(
            3,
            alpha_pattern={r"^_orig_mod\.encoder\.layer\.0\..*": 30},
            target_modules=["_orig_mod.encoder.layer.0.intermediate.dense", "query", "value"],
        ),
        lora_tensors(pairs, prefix=PREFIX + "_orig_mod."),
    )
    with pytest.warns(LotrWarning):
        found = lt.load(source)
    expected = {
        name: (10.0 if ".0." in name else 2.0) * b.astype(float) @ a.astype(float)
        for name, (b, a) in pairs.items()
    }
    assert_same_modules(dense(found), expected)
    assert found.config["target_modules"][0] == "encoder.layer.0.intermediate.dense"


def test_carried_tensors_get_their_plain_keys(tmp_path):
    extras = {"module.base_model.model._orig_mod.head.weight": np.ones((2, 3), "float32")}
    tensors = lora_tensors(bert_pairs(layers=1), prefix="module.base_model.model._orig_mod.")
    source = write_adapter(
        tmp_path / "a", lora_config(3, modules_to_save=["head"]), tensors | extras
    )
    with pytest.warns(LotrWarning):
        assert list(lt.load(source).extras) == [PREFIX + "head.weight"]


@quiet
@pytest.mark.parametrize("prefix", OUTSIDE)
def test_what_is_exported_has_effect_in_peft(tmp_path, prefix):
    peft = Peft()
    adapted = peft.adapt(peft.bert(2), tmp_path / "a", target_modules=["query", "value"])
    expected, plain = peft.outputs(adapted), peft.outputs(peft.bert(2))
    tensors = {
        prefix + key.removeprefix(PREFIX): x for key, x in read_arrays(tmp_path / "a").items()
    }
    write_adapter(tmp_path / "a", read_config(tmp_path / "a"), tensors)
    run = lotr("convert", tmp_path / "a", "-o", tmp_path / "lotr", "--tolerance", "1e-6", "--json")
    assert run.code == 0
    assert json.loads(run.out)
    assert "names of wrappers" in run.err
    document("export", tmp_path / "lotr", "-o", tmp_path / "back")
    found = peft.outputs(peft.load(peft.bert(2), tmp_path / "back"))
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def compiled_layers(peft, model):
    """Compile every layer of an encoder by itself."""
    layers = model.encoder.layer
    for k, layer in enumerate(layers):
        layers[k] = peft.torch.compile(layer, backend="eager")
    return model


@quiet
@pytest.mark.filterwarnings("ignore:.*names of wrappers:lotrtensor.errors.LotrWarning")
@pytest.mark.parametrize("bias", ["none", "lotr_only", "all"])
@pytest.mark.parametrize("compiled", ["before", "after", "for the state", "to load", "never"])
def test_a_lotr_goes_from_compiled_models_to_plain_ones_and_back(tmp_path, compiled, bias):
    peft = Peft()
    method = pytest.importorskip("lotrtensor.peft")
    base = peft.bert(2)
    if compiled == "before":
        base = compiled_layers(peft, base)
    config = method.LotrConfig(r=4, target_modules=["query", "value"], bias=bias)
    adapted = peft.peft.get_peft_model(base, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * peft.torch.randn_like(parameter)
    expected = peft.outputs(adapted.eval())
    options = {}
    if compiled == "after":
        compiled_layers(peft, adapted.base_model.model)
    if compiled == "for the state":
        options["state_dict"] = peft.torch.compile(adapted, backend="eager").state_dict()
    adapted.save_pretrained(tmp_path / "a", **options)
    fresh = peft.bert(2)
    if compiled == "to load":
        fresh = compiled_layers(peft, fresh)
    found = peft.outputs(peft.load(fresh, tmp_path / "a"))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@quiet
@pytest.mark.filterwarnings("ignore:.*names of wrappers:lotrtensor.errors.LotrWarning")
def test_what_was_trained_in_full_in_a_compiled_model_is_not_lost_in_silence(tmp_path):
    peft = Peft()
    method = pytest.importorskip("lotrtensor.peft")
    config = method.LotrConfig(r=4, target_modules=["query"], modules_to_save=["LayerNorm"])
    adapted = peft.peft.get_peft_model(compiled_layers(peft, peft.bert(2)), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * peft.torch.randn_like(parameter)
    expected = peft.outputs(adapted.eval())
    adapted.save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=r"compiled or wrapped model.*save it anew"):
        peft.load(peft.bert(2), tmp_path / "a")
    lt.load(tmp_path / "a").save(tmp_path / "anew")
    found = peft.outputs(peft.load(peft.bert(2), tmp_path / "anew"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@quiet
def test_a_lotr_that_was_trained_in_a_compiled_model_is_exported_for_the_plain_one(tmp_path):
    peft = Peft()
    method = pytest.importorskip("lotrtensor.peft")
    config = method.LotrConfig(r=4, target_modules=["query", "value"], modules_to_save=["pooler"])
    inner = peft.bert(2)
    adapted = peft.peft.get_peft_model(peft.torch.compile(inner, backend="eager"), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * peft.torch.randn_like(parameter)
    expected = peft.outputs(adapted.eval())
    adapted.save_pretrained(tmp_path / "a")
    assert any("_orig_mod" in key for key in read_arrays(tmp_path / "a"))
    with pytest.warns(LotrWarning, match="_orig_mod"):
        lt.load(tmp_path / "a").to_lora().save(tmp_path / "o")
    assert not any("_orig_mod" in key for key in read_arrays(tmp_path / "o"))
    found = peft.outputs(peft.load(peft.bert(2), tmp_path / "o"))
    np.testing.assert_allclose(found, expected, atol=1e-4)
