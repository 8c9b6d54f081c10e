"""The PEFT method on models that read, tie or share weights."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    DebertaV2Config,
    DebertaV2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaModel,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from lotrtensor.peft import LotrLayer  # noqa: E402
from lotrtensor.torch.weight_reads import weight_reads  # noqa: E402
from tests.peft_models import (  # noqa: E402
    THIRD_PARTY,
    bert,
    config,
    gpt2,
    ids,
    output,
    randomize,
    weighted,
)
from tests.test_torch_reads import Hidden, forward_warnings  # noqa: E402

pytestmark = pytest.mark.filterwarnings(THIRD_PARTY)

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def wavlm() -> nn.Module:
    convolutions = {"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (8,)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return WavLMModel(WavLMConfig(num_hidden_layers=2, **SIZES, **convolutions, **positions))


def deberta() -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    return DebertaV2Model(DebertaV2Config(vocab_size=60, num_hidden_layers=2, **SIZES, **relative))


def mamba() -> nn.Module:
    return MambaModel(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=60))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def whisper() -> nn.Module:
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 60, **heads}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    wide = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 20}
    return WhisperForConditionalGeneration(
        WhisperConfig(**sizes, **wide, **tokens, max_target_positions=20, num_mel_bins=8)
    ).eval()


@pytest.mark.parametrize(
    ("make", "targets", "reader"),
    [
        (wavlm, ["q_proj", "v_proj"], "WavLMAttention"),
        (mamba, ["in_proj", "dt_proj"], "MambaMixer"),
        (deberta, ["query_proj", "rel_embeddings"], "DebertaV2Encoder"),
        (encoder, ["linear1", "out_proj"], "MultiheadAttention"),
    ],
)
def test_a_model_that_reads_a_weight_is_refused_and_left(make, targets, reader: str) -> None:
    for adapt in (
        lambda base: get_peft_model(base, config(target_modules=targets, r=2)),
        lambda base: lotr.apply_lotr(base, targets, rank=2),
    ):
        if adapt.__code__.co_names[0] == "lotr" and make is deberta:
            continue  # plain torch adapts no embedding at all
        base = make()
        before = copy.deepcopy(base.state_dict())
        # The first releases of transformers 5 call dt_proj on another path, which is told instead.
        told = (lt.UnsupportedAdapterError, lt.LotrWarning) if make is mamba else ()
        with pytest.raises(
            told or lt.UnsupportedAdapterError,
            match=rf"{reader}\.\w+ (reads the weight|calls this)",
        ):
            adapt(base)
        assert list(base.state_dict()) == list(before)
        assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
        assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("make", [bert, gpt2, whisper])
def test_models_that_call_their_layers_are_not_accused(make) -> None:
    model = make()
    assert weight_reads(model, [name for name, _ in model.named_modules() if name]) == {}


def test_the_first_forward_of_a_peft_model_tells() -> None:
    model = get_peft_model(Hidden(), config(target_modules=["first", "second"], group_by="shape"))
    (told,) = forward_warnings(model.train())
    assert told.startswith("second of the adapted layers did not run in the forward of Hidden")
    assert forward_warnings(model.eval()) == []
    with pytest.raises(lt.UnsupportedAdapterError, match=r"model\.second .*took the we"):
        lotr.check_adapted(model, torch.randn(2, 4))
    model.add_adapter("other", config(target_modules=["first"], group_by="shape"))
    assert len(forward_warnings(model)) == 1


def gemma(tie: bool = True) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 60}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **sizes, **tokens, tie_word_embeddings=tie)
    ).eval()


EMBEDDINGS = {gemma: ("model.embed_tokens", "lm_head"), gpt2: ("transformer.wte", "lm_head")}
TIED = pytest.mark.parametrize("make", EMBEDDINGS)
COMPLICATIONS = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def untied(model: nn.Module, targets: list[str], deltas: dict[str, torch.Tensor]) -> nn.Module:
    """The oracle: a plain model in which every one of ``targets`` has W + ΔW of its own."""
    for name in targets:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    for name, delta in deltas.items():
        with torch.no_grad():
            model.get_submodule(name).weight += delta
    return model


def dense(model: nn.Module, name: str, adapter: str = "default") -> torch.Tensor:
    """ΔW of an embedding (n × m) by hand."""
    layer = model.get_submodule(name)
    factors, core = layer.lotr_shared[adapter], layer.lotr_core[adapter]
    delta = layer.lotr_scale[adapter] * factors.left @ core @ factors.right.T
    return delta.T.detach()


def same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@TIED
@COMPLICATIONS
@pytest.mark.parametrize("safe", [False, True])
def test_an_update_of_the_embedding_alone_is_not_merged_into_a_tied_head(make, safe: bool) -> None:
    embedding, head = EMBEDDINGS[make]
    model = get_peft_model(make(), config(target_modules=[embedding.split(".")[-1]]))
    randomize(model)
    delta = dense(model.base_model.model, embedding)
    expected = untied(make(), [embedding, head], {embedding: delta})
    torch.testing.assert_close(output(model), output(expected), rtol=1e-4, atol=1e-5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for merge in (
        lambda: model.merge_adapter(safe_merge=safe),
        lambda: model.merge_and_unload(safe_merge=safe),
    ):
        with pytest.raises(lt.UnsupportedAdapterError, match=rf"{embedding} shares .*{head}"):
            merge()
        assert same_bits(model, before)
    torch.testing.assert_close(output(model), output(expected), rtol=1e-4, atol=1e-5)


@TIED
@COMPLICATIONS
def test_after_untying_as_the_message_says_the_merge_is_right(make) -> None:
    embedding, head = EMBEDDINGS[make]
    base = untied(make(), [head], {})
    base.config.tie_word_embeddings = False
    model = get_peft_model(base, config(target_modules=[embedding.split(".")[-1]]))
    randomize(model)
    expected = output(model)
    plain = model.merge_and_unload()
    torch.testing.assert_close(output(plain), expected, rtol=1e-4, atol=1e-4)


@TIED
@pytest.mark.parametrize("target", [0, 1, None], ids=["embedding", "head", "both"])
def test_tied_layers_take_the_same_update(make, target: int | None, tmp_path: Path) -> None:
    embedding, head = names = EMBEDDINGS[make]
    targets = [n.split(".")[-1] for n in (names if target is None else [names[target]])]
    options = {"target_modules": targets, "ensure_weight_tying": True}
    model = get_peft_model(make(), config(**options))
    m, n = 32, 60
    assert model.get_nb_trainable_parameters()[0] == 3 * m + 4 * n + 3 * 4
    randomize(model)
    delta = dense(model.base_model.model, embedding)
    expected = output(untied(make(), names, {embedding: delta, head: delta}))
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    # Mixed batches, the second adapter that is not there, and what no adapter changes.
    rows = ["default", "__base__", "default", "__base__"]
    mixed = output(model, adapter_names=rows)
    torch.testing.assert_close(mixed[::2], expected[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1::2], output(make())[1::2], rtol=1e-5, atol=1e-6)
    # One weight is written once, stays tied, and comes back.
    weight = make().get_submodule(embedding).weight
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    layers = [model.base_model.model.get_submodule(name) for name in names]
    assert layers[0].base_layer.weight is layers[1].base_layer.weight
    torch.testing.assert_close(layers[0].base_layer.weight, weight + delta)
    with model.disable_adapter():
        torch.testing.assert_close(output(model), output(make()), rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(layers[1].base_layer.weight, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    # The file has it once, and makes the same model of a new one.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save_embedding_layers")
        model.save_pretrained(str(tmp_path / "saved"))
    assert (
        sum("lotr" in key for key in load_file(tmp_path / "saved/adapter_model.safetensors")) == 3
    )
    again = PeftModel.from_pretrained(make(), str(tmp_path / "saved"))
    torch.testing.assert_close(output(again), expected, rtol=1e-4, atol=1e-5)
    plain = again.merge_and_unload()
    assert plain.get_submodule(embedding).weight is plain.get_submodule(head).weight
    torch.testing.assert_close(output(plain), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_tied_layers_are_those_of_one_dense_weight() -> None:
    model = get_peft_model(
        gpt2(), config(target_modules=["wte"], ensure_weight_tying=True, init="paper")
    )
    randomize(model)
    weighted(model(ids())[0]).backward()
    layer = model.base_model.model.transformer.wte
    factors = layer.lotr_shared["default"]
    plain = gpt2()
    plain.transformer.wte.weight.data += dense(model.base_model.model, "transformer.wte")
    weighted(plain(ids())[0]).backward()
    gradient = layer.lotr_scale["default"] * plain.transformer.wte.weight.grad.T
    core = layer.lotr_core["default"]
    expected = {
        core: factors.left.T @ gradient @ factors.right,
        factors.left: gradient @ factors.right @ core.T,
        factors.right: gradient.T @ factors.left @ core,
    }
    for parameter, value in expected.items():
        torch.testing.assert_close(parameter.grad, value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("transform", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_tied_layers_is_tied_within_itself(transform) -> None:
    options = {"target_modules": ["wte"], "ensure_weight_tying": True}
    model = transform(get_peft_model(gpt2(), config(**options)))
    randomize(model)
    delta = dense(model.base_model.model, "transformer.wte")
    expected = untied(gpt2(), ["lm_head"], {"transformer.wte": delta, "lm_head": delta})
    torch.testing.assert_close(output(model), output(expected), rtol=1e-4, atol=1e-5)


def test_two_adapters_of_which_one_is_tied() -> None:
    tied = config(target_modules=["wte"], ensure_weight_tying=True)
    model = get_peft_model(gpt2(), tied)
    model.add_adapter("other", config(target_modules=["c_attn"]))
    randomize(model), randomize(model, "other", seed=1)
    base = model.base_model.model
    both = {"transformer.wte": dense(base, "transformer.wte")} | {
        "lm_head": dense(base, "transformer.wte")
    }
    model.base_model.set_adapter(["default", "other"])
    attention = {
        f"transformer.h.{k}.attn.c_attn": dense(base, f"transformer.h.{k}.attn.c_attn", "other")
        for k in range(2)
    }
    expected = output(untied(gpt2(), list(both), both | attention))
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("other")
    torch.testing.assert_close(
        output(model), output(untied(gpt2(), [], attention)), rtol=1e-4, atol=1e-5
    )
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already unmerged"):  # the layers of the other
        model.unmerge_adapter()
    model.delete_adapter("default")
    assert not base.lm_head.lotr_tied and not base.transformer.wte.lotr_core
    torch.testing.assert_close(
        output(model), output(untied(gpt2(), [], attention)), rtol=1e-4, atol=1e-5
    )


def test_nothing_to_tie_is_told() -> None:
    with pytest.warns(lt.LotrWarning, match="no layer shares the weight"):
        get_peft_model(bert(), config(ensure_weight_tying=True))


class Shared(nn.Module):
    """Linear layers of one weight, or one layer in two places."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
        if module:
            self.layers[2] = self.layers[0]
        else:
            self.layers[2].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_shared_weight_is_merged_by_neither_way() -> None:
    model = get_peft_model(Shared(False), config(target_modules=r"layers\.[01]", r=2))
    plain = lotr.apply_lotr(Shared(False), r"layers\.[01]", rank=2)
    for one, merge in ((model, model.merge_and_unload), (plain, lambda: lotr.merge(plain))):
        before = {key: value.clone() for key, value in one.state_dict().items()}
        with pytest.raises(lt.UnsupportedAdapterError, match=r"layers\.0 shares its weight"):
            merge()
        assert same_bits(one, before)


@pytest.mark.parametrize("tie", [False, True])
def test_a_layer_in_two_places_is_one_layer(tie: bool, tmp_path: Path) -> None:
    options = {"target_modules": r"layers\.[012]", "r": 2, "ensure_weight_tying": tie}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ensure_weight_tying is set, and no layer")
        model = get_peft_model(Shared(True), config(**options))
        x, expected = torch.randn(3, 6), Shared(True)
        randomize(model)
        for k in range(2):
            delta = dense(model.base_model.model, f"layers.{k}").T
            expected.layers[k].weight.data += delta
        torch.testing.assert_close(model(x), expected(x))
        model.save_pretrained(str(tmp_path / "peft"))
        again = PeftModel.from_pretrained(Shared(True), str(tmp_path / "peft"))
    torch.testing.assert_close(again(x), expected(x))
    plain = again.merge_and_unload()
    assert isinstance(plain.layers[2], nn.Linear) and plain.layers[2] is plain.layers[0]
    torch.testing.assert_close(plain(x), expected(x))
    loaded = lotr.load_lotr(Shared(True), tmp_path / "peft")
    torch.testing.assert_close(loaded(x), expected(x))
    plain = lotr.unload(lotr.merge(loaded))
    assert isinstance(plain.layers[2], nn.Linear) and plain.layers[2] is plain.layers[0]
    torch.testing.assert_close(plain(x), expected(x))


def test_linear_layers_of_one_weight_take_one_update(tmp_path: Path) -> None:
    options = {"target_modules": r"layers\.[02]", "ensure_weight_tying": True, "r": 2}
    model, x = get_peft_model(Shared(False), config(**options)), torch.randn(3, 6)
    assert model.get_nb_trainable_parameters()[0] == 6 * 2 + 6 * 2 + 2 * 2
    randomize(model)
    expected, delta = Shared(False), dense(model.base_model.model, "layers.0").T
    expected.layers[0].weight.data += delta
    torch.testing.assert_close(model(x), expected(x))
    model.save_pretrained(str(tmp_path / "tied"))
    with pytest.raises(lt.UnsupportedAdapterError, match="ensure_weight_tying, and layers"):
        lotr.load_lotr(Shared(False), tmp_path / "tied")
    torch.testing.assert_close(model.merge_and_unload()(x), expected(x))


class Borrowed(nn.Module):
    """A head that multiplies with the weight of the embedding, and is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.body(self.embedding(x)), self.embedding.weight)


def test_an_embedding_whose_weight_is_a_head_too_is_not_merged() -> None:
    with pytest.warns(lt.LotrWarning, match="embedding: Borrowed.forward calls this layer in one"):
        model = get_peft_model(Borrowed(), config(target_modules=["embedding"], r=2))
    with pytest.raises(lt.UnsupportedAdapterError, match=r"Borrowed\.forward uses the weight"):
        model.merge_adapter()


@pytest.mark.parametrize("task", [None, "SEQ_2_SEQ_LM"])
def test_all_linear_layers_of_a_model_that_takes_features(task: str | None, tmp_path: Path) -> None:
    model = get_peft_model(whisper(), config(target_modules="all-linear", task_type=task)).eval()
    randomize(model)
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(2, 3)}
    expected = model(**inputs).logits
    names = [n for n, m in model.base_model.model.named_modules() if isinstance(m, LotrLayer)]
    assert len(names) == 2 * (6 + 10) and "proj_out" not in names
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(whisper(), str(tmp_path)).eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    plain = whisper()
    with torch.no_grad():
        for name in names:
            layer = model.base_model.model.get_submodule(name)
            plain.get_submodule(name).weight += layer.get_delta_weight("default")
    torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    model.train()(input_features=inputs["input_features"], labels=ids(2, 3)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.generate(input_features=inputs["input_features"], max_new_tokens=3).shape[0] == 2
