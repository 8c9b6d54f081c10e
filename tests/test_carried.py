"""What PEFT saves beside an update: read, carried byte by byte, and loaded again by PEFT."""

from __future__ import annotations

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import PREFIX, Peft, quiet, read_arrays, read_config, write_lora
from lotrtensor import UnsupportedAdapterError
from lotrtensor.adapters.formats.carried import carried_tensors, is_method_key

QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def peft():
    """The real thing."""
    return Peft()


def llama(peft, *, tied=False):
    config = peft.transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    return peft.transformers.LlamaForCausalLM(config)


def tied_llama(peft):
    return llama(peft, tied=True)


def neox(peft):
    config = peft.transformers.GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
    )
    return peft.transformers.GPTNeoXForCausalLM(config)


def phi(peft):
    config = peft.transformers.PhiConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        pad_token_id=0,  # early releases of transformers 5 read it without a default
    )
    return peft.transformers.PhiForCausalLM(config)


def bert(peft):
    config = peft.transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return peft.transformers.BertForMaskedLM(config)


def opt(peft):
    config = peft.transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=16,
        word_embed_proj_dim=32,
    )
    return peft.transformers.OPTForCausalLM(config)


EMBEDDINGS = {"save_embedding_layers": True}
CASES = {
    "llama resized": (llama, {"target_modules": ["q_proj"]}, EMBEDDINGS),
    "neox embed_out": (neox, {"target_modules": ["query_key_value"]}, EMBEDDINGS),
    "phi with a bias": (phi, {"target_modules": ["q_proj"]}, EMBEDDINGS),
    "bert decoder": (bert, {"target_modules": ["query"]}, EMBEDDINGS),
    "opt tied": (opt, {"target_modules": ["q_proj"]}, EMBEDDINGS),
    "embeddings adapted": (llama, {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "head adapted": (llama, {"target_modules": ["lm_head", "q_proj"]}, {}),
    "head with a bias adapted": (phi, {"target_modules": ["lm_head", "q_proj"]}, {}),
    "norms by the end of a name": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {},
    ),
    "norms with biases": (
        bert,
        {"target_modules": ["query"], "modules_to_save": ["Norm", "decoder"]},
        {},
    ),
    "a whole block": (bert, {"target_modules": ["query"], "modules_to_save": ["cls"]}, {}),
    "saved and embeddings": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        EMBEDDINGS,
    ),
    "all biases": (bert, {"target_modules": ["query"], "bias": "all"}, {}),
    "own biases": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}, {}),
    "own biases and a head": (
        phi,
        {"target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["lm_head"]},
        {},
    ),
    "saved and tied": (
        tied_llama,
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        {},
    ),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, {}),
    "tokens and a tied head": (
        tied_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {},
    ),
    "tokens and embeddings": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        EMBEDDINGS,
    ),
}


def save_adapted(peft, case, path):
    """Adapt, change everything that is trained, save; return the model's logits."""
    make, fields, options = CASES[case]
    peft.torch.manual_seed(0)
    model = make(peft).eval()
    adapted = peft.peft.get_peft_model(model, peft.peft.LoraConfig(r=4, **fields)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * peft.torch.randn_like(parameter)
    if options:  # as after a resize: the embeddings are other ones than the base model's
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for name, parameter in layer.named_parameters():
                if "original_module" not in name:
                    parameter.data += 0.1
    adapted.save_pretrained(path, **options)
    return logits(peft, adapted)


def logits(peft, model):
    ids = peft.torch.arange(16).reshape(2, 8)
    with peft.torch.no_grad():
        return model.eval()(input_ids=ids).logits.numpy()


def loaded(peft, case, path):
    """Logits of the base model with the adapter in ``path``, as PEFT loads it."""
    peft.torch.manual_seed(0)
    return logits(peft, peft.peft.PeftModel.from_pretrained(CASES[case][0](peft), path))


@quiet
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_before_and_after(peft, tmp_path, case):
    expected = save_adapted(peft, case, tmp_path / "a")
    np.testing.assert_allclose(loaded(peft, case, tmp_path / "a"), expected, atol=1e-5)
    source = lt.load(tmp_path / "a")
    stored = {k: v for k, v in read_arrays(tmp_path / "a").items() if "lora_" not in k}
    assert stored
    lt.truncate(source, rank=4).save(tmp_path / "truncated")
    lotr = lt.convert(source, tolerance=1e-6)
    lotr.save(tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "back")
    for name in ("truncated", "lotr", "back"):
        found = read_arrays(tmp_path / name)
        for key, value in stored.items():
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
        assert set(lt.load(tmp_path / name).extras) == set(stored)
    scale = np.abs(expected).max()
    pytest.importorskip("lotrtensor.peft")
    for name in ("truncated", "lotr", "back"):
        np.testing.assert_allclose(loaded(peft, case, tmp_path / name), expected, atol=1e-4 * scale)


@quiet
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", CASES)
def test_every_carried_tensor_names_a_parameter_of_the_base(peft, tmp_path, case):
    save_adapted(peft, case, tmp_path / "a")
    adapter = lt.load(tmp_path / "a")
    base = CASES[case][0](peft).state_dict()
    carried = carried_tensors(adapter.extras, adapter.config)
    assert carried.keys() == adapter.extras.keys()
    for key, (module, parameter, kind) in carried.items():
        if kind == "tokens":
            assert f"{module}.weight" in base
        else:
            assert base[f"{module}.{parameter}"].shape == adapter.extras[key].shape, key


@pytest.mark.parametrize(
    ("key", "fields", "expected"),
    [
        ("lm_head.weight", {}, ("lm_head", "weight", "weight")),
        ("lm_head.bias", {}, ("lm_head", "bias", "bias")),
        ("lm_head.base_layer.weight", {}, ("lm_head", "weight", "base")),
        ("x.query.base_layer.bias", {"bias": "all"}, ("x.query", "bias", "bias")),
        ("x.query.base_layer.bias", {}, ("x.query", "bias", "base")),
        ("x.ln.weight", {"modules_to_save": ["ln"]}, ("x.ln", "weight", "saved")),
        ("x.my_ln.weight", {"modules_to_save": ["ln"]}, ("x.my_ln", "weight", "saved")),
        ("score.0.net.scale", {"modules_to_save": ["score"]}, ("score", "0.net.scale", "saved")),
        ("ln.original_module.weight", {"modules_to_save": ["ln"]}, ("ln", "weight", "base")),
        (
            "embed.token_adapter.trainable_tokens_delta",
            {},
            ("embed", "trainable_tokens_delta", "tokens"),
        ),
        ("embed.token_adapter.base_layer.weight", {}, ("embed", "weight", "base")),
        (
            "blocks.0.diff_b",
            {"single_file": {"style": "peft"}},
            ("blocks.0", "diff_b", "difference"),
        ),
    ],
)
def test_kinds_of_carried_tensors(key, fields, expected):
    assert carried_tensors({PREFIX + key: np.ones(1)}, fields)[PREFIX + key] == expected


def test_the_parameters_of_every_method_of_peft_are_known_as_such():
    pytest.importorskip("peft")
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefixes = sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values()))
    assert len(prefixes) > 10
    assert [p for p in prefixes if not is_method_key(f"model.q_proj.{p}weight.default")] == []


@pytest.mark.parametrize("saved", [["classifier"], ["fier"], [PREFIX + "classifier"]])
def test_a_saved_module_may_hold_parameters_of_any_name(tmp_path, saved):
    extras = {f"{PREFIX}classifier.deep.running_mean": np.arange(3, dtype="int64")}
    adapter = lt.load(write_lora(tmp_path / "a", extras=extras, modules_to_save=saved))
    (found,) = adapter.extras.values()
    np.testing.assert_array_equal(found, np.arange(3))


@pytest.mark.parametrize(
    "key",
    [
        "classifier.hada_w1_a",
        "classifier.deep.vera_lambda_b",
        "classifie.running_mean",
        "classifier_2.running_mean",
        f"{QUERY}.base_layer.weight.absmax",
    ],
)
def test_what_no_saved_module_explains_is_refused(tmp_path, key):
    extras = {PREFIX + key: np.ones(3, "float32")}
    with pytest.raises(UnsupportedAdapterError, match=key.replace(".", r"\.")):
        lt.load(write_lora(tmp_path / "a", extras=extras, modules_to_save=["classifier"]))


@quiet
def test_biases_of_a_lotrs_own_layers_are_a_loras_own(peft, tmp_path):
    method = pytest.importorskip("lotrtensor.peft")
    config = method.LotrConfig(r=4, target_modules=["query"], bias="lotr_only")
    adapted = peft.peft.get_peft_model(bert(peft), config)
    adapted.save_pretrained(tmp_path / "a")
    lt.load(tmp_path / "a").to_lora().save(tmp_path / "o")
    assert read_config(tmp_path / "o")["bias"] == "lora_only"
    assert len(lt.load(tmp_path / "o").extras) == 2
