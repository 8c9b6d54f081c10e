"""The fields of PEFT's LoRA config: each is honoured, carried, refused or idle, and of its type."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    Peft,
    assert_refused,
    bert_pairs,
    dense,
    dense_lora,
    document,
    edit_config,
    largest_distance,
    lotr,
    quiet,
    read_config,
    write_lora,
)
from lotrtensor import FormatError, LotrWarning, UnsupportedAdapterError
from lotrtensor.adapters.formats.lora_config import CARRIED_FIELDS, FIELDS


def with_role(role):
    return sorted(name for name, field in FIELDS.items() if field.role == role)


def test_every_field_of_the_installed_peft_is_classified():
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert len(fields) > 30
    assert sorted(fields - set(FIELDS)) == []


def test_defaults_of_the_installed_peft_are_of_the_fields_types():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], task_type="CAUSAL_LM").to_dict()
    for name, value in config.items():
        value = sorted(value) if isinstance(value, set) else value
        assert value is None or FIELDS[name].holds(value), name


# Of every carried field a value that is not the default.
VALUES = {
    "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers"},
    "base_model_name_or_path": "tiny/bert",
    "bias": "all",
    "ensure_weight_tying": True,
    "exclude_modules": ["decoder"],
    "fan_in_fan_out": True,
    "inference_mode": True,
    "layer_replication": [[0, 2], [1, 3]],
    "layers_pattern": ["layer"],
    "layers_to_transform": [0, 1],
    "modules_to_save": ["classifier"],
    "revision": "main",
    "target_modules": ["query", "value", "dense"],
    "target_parameters": ["experts.down_proj"],
    "task_type": "FEATURE_EXTRACTION",
    "trainable_token_indices": {"embed": [1, 2]},
}


@pytest.mark.parametrize("field", CARRIED_FIELDS)
def test_a_carried_field_survives_every_verb(tmp_path, field):
    source = write_lora(tmp_path / "a", bert_pairs(layers=2), **{field: VALUES[field]})
    document("truncate", source, "-o", tmp_path / "small", "--rank", 2)
    document("convert", source, "-o", tmp_path / "lotr", "--rank", 4)
    document("truncate", tmp_path / "lotr", "-o", tmp_path / "lower", "--rank", 2)
    document("export", tmp_path / "lower", "-o", tmp_path / "back")
    for name in ("small", "lotr", "lower", "back"):
        assert read_config(tmp_path / name)[field] == VALUES[field]


WRONG = [
    (field, value)
    for field in sorted(set(FIELDS) - {"peft_type"})
    for value in ("false", 3, 2.5, True, [1.5], {"a": [None]})
    if not FIELDS[field].holds(value)
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_value_of_another_type_is_refused_by_name(tmp_path, field, value):
    source = write_lora(tmp_path / "a", bert_pairs(layers=1), **{field: value})
    with pytest.raises(FormatError, match=f"{field} is .*; expected") as caught:
        lt.load(source)
    assert str(source) in str(caught.value)


def test_the_command_line_writes_nothing_of_a_config_with_a_wrong_type(tmp_path):
    source = write_lora(tmp_path / "a", bert_pairs(layers=1), bias="some")
    found = lotr("convert", source, "-o", tmp_path / "o", "--rank", 2)
    assert_refused(found, source, "bias is 'some'; expected 'none', 'all' or 'lora_only'")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("field", ["use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"])
def test_a_switch_in_quotes_is_not_taken_for_on_or_off(tmp_path, field):
    for value in ("false", "true", "False", 0, 1):
        path = write_lora(tmp_path / f"{value}", bert_pairs(layers=1))
        edit_config(path, **{field: value})
        with pytest.raises(FormatError, match=f"{field} is .*expected true or false"):
            lt.load(path)


@pytest.mark.parametrize("field", ["fan_in_fan_out", "ensure_weight_tying", "modules_to_save"])
def test_fields_of_a_lotr_are_checked_too(tmp_path, field):
    document(
        "convert", write_lora(tmp_path / "a", bert_pairs(2)), "-o", tmp_path / "b", "--rank", 2
    )
    edit_config(tmp_path / "b", **{field: "false"})
    assert_refused(lotr("inspect", tmp_path / "b"), field, "false")


@pytest.mark.parametrize("field", with_role("refused"))
def test_refused_fields_are_refused_where_they_are_set(tmp_path, field):
    value = True if FIELDS[field].holds(True) else ["a"]
    path = write_lora(tmp_path / "a", bert_pairs(layers=1), **{field: value})
    with pytest.raises(UnsupportedAdapterError, match=FIELDS[field].method):
        lt.load(path)
    edit_config(path, **{field: None})
    assert lt.load(path).modules


def test_idle_fields_change_nothing(tmp_path):
    values = {
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
        "velora_config": {"num_groups": 2},
        "eva_config": {"rho": 2.0},
        "runtime_config": {"ephemeral_gpu_offload": False},
        "peft_version": "99.0",
        "qalora_group_size": 32,
        "megatron_core": "megatron.core",
    }
    path = write_lora(tmp_path / "a", bert_pairs(layers=1), **values)
    assert largest_distance(dense(lt.load(path)), dense_lora(path, 2.0)) < 1e-6


def test_an_unknown_field_that_is_set_is_told_by_name(tmp_path):
    path = write_lora(tmp_path / "a", bert_pairs(layers=1), use_next_year=True, of_no_use=None)
    with pytest.warns(LotrWarning, match="use_next_year") as caught:
        lt.load(path)
    assert len(caught) == 1
    assert "of_no_use" not in str(caught[0].message)
    found = lotr("inspect", path)
    assert found.code == 0
    assert "use_next_year" in found.err


@quiet
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], r".*(embed_tokens|q_proj)"])
def test_tied_embeddings_stay_tied(tmp_path, targets):
    """With ensure_weight_tying PEFT gives the head the embedding's update: before and after."""
    peft = Peft()

    def llama():
        peft.torch.manual_seed(0)
        config = peft.transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            tie_word_embeddings=True,
        )
        return peft.transformers.LlamaForCausalLM(config)

    adapted = peft.adapt(llama(), tmp_path / "a", target_modules=targets, ensure_weight_tying=True)
    expected, plain = peft.outputs(adapted), peft.outputs(llama().eval())
    assert np.abs(expected - plain).max() > 0.1
    lotr_adapter = lt.convert(lt.load(tmp_path / "a"), tolerance=1e-6)
    lotr_adapter.save(tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "back")
    lt.truncate(lt.load(tmp_path / "a"), rank=4).save(tmp_path / "same")
    scale = np.abs(expected).max()
    for name in ("a", "same", "back"):
        found = peft.outputs(peft.load(llama(), tmp_path / name))
        np.testing.assert_allclose(found, expected, atol=1e-4 * scale)


def test_no_warning_for_what_the_installed_peft_writes(tmp_path):
    peft = Peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.adapt(peft.bert(2), tmp_path / "a", target_modules=["query"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lt.load(tmp_path / "a").modules
