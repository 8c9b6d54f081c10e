"""Reading PEFT LoRA directories: ΔW is PEFT's own; what is no plain BA is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    DTYPES,
    PREFIX,
    Peft,
    assert_same_modules,
    bert_pairs,
    dense,
    dense_lora,
    edit_config,
    largest_distance,
    lora_config,
    lora_tensors,
    quiet,
    read_arrays,
    shard,
    write_adapter,
    write_lora,
)
from lotrtensor import DataError, FormatError, LoraAdapter, UnsupportedAdapterError

QUERY = "encoder.layer.0.attention.self.query"


# --- against the real peft, on real architectures -------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    """The real thing."""
    return Peft()


CASES = {
    "plain": {"target_modules": ["query", "value", "intermediate.dense"]},
    "rslora": {"target_modules": ["query", "key"], "use_rslora": True},
    "rank_pattern": {
        "target_modules": ["query", "value"],
        "rank_pattern": {"value": 2, "layer.1.attention.self.query": 7},
    },
    "alpha_pattern": {
        "target_modules": ["query", "value"],
        "alpha_pattern": {"value": 11, "encoder.layer.10.attention.self.query": 1},
    },
    "regex_patterns": {
        "target_modules": ["query", "value"],
        "rank_pattern": {r"encoder\.layer\.1\.attention.*value": 3, r".*\.1[01]\..*query": 5},
        "alpha_pattern": {r"layer\.[0-4]\..*(query|value)": 9},
    },
    "anchored_pattern": {
        "target_modules": ["query"],
        "rank_pattern": {"^encoder.layer.3.attention.self.query": 2},
    },
    "overlapping_patterns": {
        "target_modules": ["query"],
        # PEFT sorts them when it saves: the order in the file is the one that counts.
        "alpha_pattern": {"query": 3, "layer.2.attention.self.query": 5},
    },
    "rslora_with_patterns": {
        "target_modules": ["query", "value"],
        "use_rslora": True,
        "rank_pattern": {"value": 2},
        "alpha_pattern": {"query": 3},
    },
    "embedding": {"target_modules": ["word_embeddings", "query"], "rank_pattern": {"query": 2}},
    "layers_to_transform": {
        "target_modules": ["query", "value"],
        "layers_to_transform": [1, 2, 10],
        "layers_pattern": "layer",
    },
    "layer_replication": {"target_modules": ["query"], "layer_replication": [(0, 3), (1, 4)]},
    "regex_target": {"target_modules": r".*\.(query|output\.dense)"},
    "negative_alpha": {"target_modules": ["query"], "lora_alpha": -3},
    "zero_alpha": {"target_modules": ["query", "value"], "alpha_pattern": {"query": 0}},
    "float_alpha": {"target_modules": ["query"], "lora_alpha": 2.5},
    "gaussian": {"target_modules": ["query"], "init_lora_weights": "gaussian"},
    "rank_above_the_matrix": {"target_modules": ["query"], "r": 40},
}


@quiet
@pytest.mark.parametrize("case", CASES)
def test_delta_is_pefts(peft, tmp_path, case):
    adapted = peft.adapt(peft.bert(), tmp_path / "a", **CASES[case])
    found = lt.load(tmp_path / "a")
    assert isinstance(found, LoraAdapter)
    if case == "overlapping_patterns":
        adapted = peft.load(peft.bert(), tmp_path / "a")
    assert_same_modules(dense(found), peft.deltas(adapted))


@quiet
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_storage_types(peft, tmp_path, dtype):
    peft.adapt(peft.bert(2), tmp_path / "a", dtype=dtype, target_modules=["query", "value"])
    adapter = lt.load(tmp_path / "a")
    assert adapter.dtype == DTYPES[dtype]
    # float32 arithmetic on what is stored, as PEFT does with a float32 base.
    assert_same_modules(dense(adapter), peft.deltas(peft.load(peft.bert(2), tmp_path / "a")))


@quiet
def test_conv1d_of_gpt2(peft, tmp_path):
    adapted = peft.adapt(
        peft.gpt2(),
        tmp_path / "a",
        target_modules=["c_attn", "mlp.c_proj"],
        fan_in_fan_out=True,
        rank_pattern={"c_attn": 3},
    )
    adapter = lt.load(tmp_path / "a")
    assert {m.shape for m in adapter.modules} == {(96, 32), (32, 128)}
    assert_same_modules(dense(adapter), peft.deltas(adapted))


@quiet
def test_embedding_that_peft_saves_with_its_base_layer(peft, tmp_path):
    adapted = peft.adapt(peft.llama(), tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    assert any("base_layer" in key for key in read_arrays(tmp_path / "a"))
    adapter = lt.load(tmp_path / "a")
    assert_same_modules(dense(adapter), peft.deltas(adapted))
    assert [m.name for m in adapter.modules if m.embedding] == ["model.embed_tokens"]
    assert [key for key in adapter.extras if "embed_tokens.base_layer" in key]


@quiet
def test_modules_to_save_and_tokens_are_carried(peft, tmp_path):
    adapted = peft.adapt(
        peft.llama(),
        tmp_path / "a",
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [1, 2, 5]},
    )
    adapter = lt.load(tmp_path / "a")
    assert_same_modules(dense(adapter), peft.deltas(adapted))
    stored = read_arrays(tmp_path / "a")
    expected = {key for key in stored if "lora_" not in key}
    assert any("trainable_tokens_delta" in key for key in expected)
    assert any("lm_head" in key for key in expected)
    assert set(adapter.extras) == expected
    for key in expected:
        np.testing.assert_array_equal(adapter.extras[key], stored[key])


@quiet
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_carried(peft, tmp_path, bias):
    adapted = peft.adapt(peft.bert(2), tmp_path / "a", target_modules=["query"], bias=bias)
    adapter = lt.load(tmp_path / "a")
    stored = read_arrays(tmp_path / "a")
    assert set(adapter.extras) == {key for key in stored if key.endswith(".bias")}
    assert len(adapter.extras) >= 2
    assert_same_modules(dense(adapter), peft.deltas(adapted))


@quiet
@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_2"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_pefts_own_variants_are_refused(peft, tmp_path, fields, word):
    peft.adapt(peft.bert(2), tmp_path / "a", target_modules=["query"], **fields)
    with pytest.raises(UnsupportedAdapterError, match=word):
        lt.load(tmp_path / "a")


@quiet
def test_a_pissa_that_was_saved_as_the_message_says_is_read(peft, tmp_path):
    config = peft.peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa")
    original = {n: p.detach().clone() for n, p in peft.bert(2).named_parameters()}
    adapted = peft.peft.get_peft_model(peft.bert(2), config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * peft.torch.randn_like(parameter)
    adapted.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    merged = dict(adapted.merge_and_unload().named_parameters())
    found = dense(lt.load(tmp_path / "a"))
    expected = {n: merged[n + ".weight"] - original[n + ".weight"] for n in found}
    expected = {n: delta.detach().double().numpy() for n, delta in expected.items()}
    assert_same_modules(found, expected, tolerance=1e-5)


@quiet
def test_another_method_of_peft_is_refused(peft, tmp_path):
    config = peft.peft.LoHaConfig(target_modules=["query"])
    peft.peft.get_peft_model(peft.bert(2), config).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedAdapterError, match="LOHA"):
        lt.load(tmp_path / "a")


# --- by hand: keys, shards, types -----------------------------------------------------------------


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("tail", [".weight", ".default.weight", ".default", ".my-adapter.weight"])
def test_every_way_to_write_a_key(tmp_path, prefix, tail):
    pairs = bert_pairs(layers=2)
    tensors = lora_tensors(pairs, prefix=prefix, tail=tail)
    adapter = lt.load(write_adapter(tmp_path / "a", lora_config(3), tensors))
    expected = {name: 2.0 * b.astype(float) @ a.astype(float) for name, (b, a) in pairs.items()}
    assert largest_distance(dense(adapter), expected) < 1e-6
    assert not adapter.extras


def test_modules_come_in_layer_order(tmp_path):
    adapter = lt.load(write_lora(tmp_path / "a"))
    layers = [int(m.name.split(".")[2]) for m in adapter.modules]
    assert layers == sorted(layers)
    assert layers[-1] == 11


def test_embedding_factors_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(6, 2)), rng.normal(size=(2, 50))
    key = f"{PREFIX}embeddings.word_embeddings.lora_embedding_"
    tensors = {key + "A": a.astype("float32"), key + "B": b.astype("float32")}
    adapter = lt.load(write_adapter(tmp_path / "a", lora_config(2, lora_alpha=3), tensors))
    (module,) = adapter.modules
    assert (module.name, module.shape, module.embedding) == (
        "embeddings.word_embeddings",
        (6, 50),
        True,
    )
    assert largest_distance(dense(adapter), {module.name: 1.5 * b @ a}) < 1e-6


def test_two_adapters_in_one_file_are_refused(tmp_path):
    pairs = bert_pairs(layers=1)
    tensors = lora_tensors(pairs, tail=".one.weight") | lora_tensors(
        {name.replace("0", "1"): pair for name, pair in pairs.items()}, tail=".two.weight"
    )
    with pytest.raises(FormatError, match=r"one.*two"):
        lt.load(write_adapter(tmp_path / "a", lora_config(3), tensors))


def test_the_same_factor_under_two_keys_is_refused(tmp_path):
    pairs = bert_pairs(layers=1)
    tensors = lora_tensors(pairs) | lora_tensors(pairs, prefix="")
    with pytest.raises(FormatError, match="same tensor"):
        lt.load(write_adapter(tmp_path / "a", lora_config(3), tensors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_the_whole(tmp_path, dtype):
    whole = lt.load(write_lora(tmp_path / "a", dtype=dtype))
    parts = lt.load(shard(write_lora(tmp_path / "b", dtype=dtype)))
    assert [m.name for m in whole.modules] == [m.name for m in parts.modules]
    for one, other in zip(whole.modules, parts.modules, strict=True):
        np.testing.assert_array_equal(one.B, other.B)
        np.testing.assert_array_equal(one.A, other.A)
    assert parts.dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_half_types_are_read_exactly(tmp_path, dtype):
    path = write_lora(tmp_path / "a", dtype=dtype)
    adapter = lt.load(path)
    assert adapter.dtype == DTYPES[dtype]
    assert largest_distance(dense(adapter), dense_lora(path, 2.0)) < (
        1e-15 if dtype == "float64" else 1e-7
    )


@pytest.mark.parametrize(
    ("one", "other", "widest"),
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
        ("float64", "bfloat16", "float64"),
        ("float64", "float32", "float64"),
    ],
)
def test_mixed_types(tmp_path, one, other, widest):
    tensors = lora_tensors(bert_pairs(layers=2))
    mixed = {
        key: x.astype(DTYPES[one if "query" in key or "lora_A" in key else other])
        for key, x in tensors.items()
    }
    path = write_adapter(tmp_path / "a", lora_config(3), mixed)
    adapter = lt.load(path)
    assert adapter.dtype == DTYPES[widest]
    assert largest_distance(dense(adapter), dense_lora(path, 2.0)) < 1e-7


def test_bytes_of_mixed_types_are_those_of_the_file(tmp_path):
    tensors = lora_tensors(bert_pairs(layers=2))
    mixed = {
        key: x.astype(DTYPES["bfloat16" if "query" in key else "float32"])
        for key, x in tensors.items()
    }
    adapter = lt.load(write_adapter(tmp_path / "a", lora_config(3), mixed))
    assert adapter.parameters == sum(x.size for x in mixed.values())
    stored = sum(x.nbytes for x in mixed.values())
    assert adapter.bytes == stored
    assert lt.convert(adapter, rank=2).source_bytes == stored


def test_the_config_is_kept_as_read(tmp_path):
    path = write_lora(tmp_path / "a", revision="main", base_model_name_or_path="org/model")
    assert lt.load(path).config == json.loads((path / "adapter_config.json").read_text())


# --- by hand: carried along, or refused by name ---------------------------------------------------

CARRIED = {
    "modules_to_save": (
        {"modules_to_save": ["classifier", "pooler.dense"]},
        {f"{PREFIX}classifier.weight": (2, 12), f"{PREFIX}bert.pooler.dense.bias": (12,)},
    ),
    "bias": ({"bias": "all"}, {f"{PREFIX}encoder.layer.0.attention.self.query.bias": (12,)}),
    "bias_of_a_base_layer": (
        {"bias": "lora_only"},
        {f"{PREFIX}encoder.layer.0.attention.self.query.base_layer.bias": (12,)},
    ),
    "tokens": (
        {"trainable_token_indices": [3, 5]},
        {f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta": (2, 12)},
    ),
    "embeddings": ({}, {f"{PREFIX}model.embed_tokens.weight": (50, 12)}),
}


@pytest.mark.parametrize("case", CARRIED)
def test_carried_unchanged(tmp_path, case):
    fields, shapes = CARRIED[case]
    rng = np.random.default_rng(5)
    extras = {key: rng.normal(size=shape).astype("float32") for key, shape in shapes.items()}
    extras["base_model.model.lm_head.weight"] = np.arange(6, dtype=np.float16).reshape(2, 3)
    adapter = lt.load(write_lora(tmp_path / "a", extras=extras, **fields))
    assert set(adapter.extras) == set(extras)
    for key, value in extras.items():
        assert adapter.extras[key].dtype == value.dtype
        np.testing.assert_array_equal(adapter.extras[key], value)


@pytest.mark.parametrize(
    "key",
    [
        "mystery",
        f"{PREFIX}classifier.scale",
        f"{PREFIX}{QUERY}.bias",
        f"{PREFIX}{QUERY}.weight",
        f"{PREFIX}{QUERY}.lora_C.weight",
        f"{PREFIX}{QUERY}.lora_E",
        f"{PREFIX}{QUERY}.vera_lambda_b",
        f"{PREFIX}{QUERY}.lora_ga_scale",
        f"{PREFIX}{QUERY}.unheard_of.weight",
        f"{PREFIX}{QUERY.replace('0', '40')}.unheard_of.weight",
        f"{PREFIX}pooler.dense.unheard_of_A.weight",
        f"{PREFIX}pooler.dense.scaling_vector",
    ],
)
def test_unknown_tensors_are_refused_by_name(tmp_path, key):
    extras = {key: np.ones((3, 3), dtype="float32")}
    with pytest.raises(UnsupportedAdapterError) as caught:
        lt.load(write_lora(tmp_path / "a", extras=extras))
    assert key in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"{PREFIX}{QUERY}.lora_magnitude_vector", "DoRA"),
        (f"{PREFIX}{QUERY}.lora_magnitude_vector.default.weight", "DoRA"),
        (f"{PREFIX}{QUERY}.lora_B.bias", "lora_bias"),
    ],
)
def test_variants_are_seen_in_the_tensors_too(tmp_path, key, method):
    extras = {key: np.ones(12, dtype="float32")}
    with pytest.raises(UnsupportedAdapterError, match=method) as caught:
        lt.load(write_lora(tmp_path / "a", extras=extras))
    assert key in str(caught.value)


def test_a_variant_tensor_inside_a_saved_module_is_refused(tmp_path):
    extras = {f"{PREFIX}classifier.lora_magnitude_vector": np.ones(12, dtype="float32")}
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        lt.load(write_lora(tmp_path / "a", extras=extras, modules_to_save=["classifier"]))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 2}}, "MonteCLoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "OLoRA"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": "lora2"}, "lora2"),
        ({"peft_type": None}, "None"),
    ],
)
def test_configs_that_are_no_plain_lora(tmp_path, fields, word):
    path = write_lora(tmp_path / "a", **fields)
    with pytest.raises(UnsupportedAdapterError, match=word) as caught:
        lt.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone(tmp_path, init):
    assert lt.load(write_lora(tmp_path / "a", init_lora_weights=init)).modules


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_convolution_is_refused_by_name(tmp_path, side):
    pairs = bert_pairs(layers=1)
    tensors = lora_tensors(pairs)
    key = f"{PREFIX}{QUERY}.lora_{side}.weight"
    tensors[key] = tensors[key][:, :, None, None]
    with pytest.raises(UnsupportedAdapterError) as caught:
        lt.load(write_adapter(tmp_path / "a", lora_config(3), tensors))
    assert key in str(caught.value)


def test_data_errors_are_data_errors(tmp_path):
    tensors = lora_tensors(bert_pairs(layers=1))
    key = f"{PREFIX}{QUERY}.lora_A.weight"
    for bad in (np.full((3, 10), np.nan), np.full((3, 10), np.inf), np.ones((3, 10), dtype=int)):
        bad = bad.astype("float32") if bad.dtype == float else bad
        with pytest.raises(DataError) as caught:
            lt.load(write_adapter(tmp_path / "a", lora_config(3), tensors | {key: bad}))
        assert key in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_infinities_in_half_types_are_seen(tmp_path, dtype):
    tensors = lora_tensors(bert_pairs(layers=1), dtype)
    key = f"{PREFIX}{QUERY}.lora_B.weight"
    tensors[key] = np.full_like(tensors[key], np.inf)
    with pytest.raises(DataError, match="lora_B"):
        lt.load(write_adapter(tmp_path / "a", lora_config(3), tensors))


def test_use_rslora_by_hand(tmp_path):
    path = write_lora(tmp_path / "a", bert_pairs(layers=1))
    edit_config(path, use_rslora=True, lora_alpha=6)
    assert largest_distance(dense(lt.load(path)), dense_lora(path, 6 / np.sqrt(3))) < 1e-6
