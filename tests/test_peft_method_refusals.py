"""Bad input to the PEFT method: one sentence, and the model as it was."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import get_peft_model, inject_adapter_in_model  # noqa: E402
from torch import nn  # noqa: E402

import lotrtensor as lt  # noqa: E402
from tests.peft_models import (  # noqa: E402
    CORES,
    FACTORS,
    THIRD_PARTY,
    bert,
    config,
    output,
    randomize,
)

pytestmark = pytest.mark.filterwarnings(THIRD_PARTY)


def unchanged(model: nn.Module) -> bool:
    plain = bert()
    same = all(torch.equal(plain.state_dict()[k], v) for k, v in model.state_dict().items())
    trainable = all(p.requires_grad for p in model.parameters())
    assert model.config.num_hidden_layers == plain.config.num_hidden_layers
    return same and trainable and list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["quary"]}, lt.FormatError, "'quary'.*not found"),
        ({"target_modules": ["query", "valeu"]}, lt.FormatError, "'valeu'.*not found"),
        ({"target_modules": "quary"}, ValueError, "quary.*not found"),
        ({"layers_to_transform": [9]}, ValueError, "not found"),
        ({"init": "orthogonl"}, lt.FormatError, "init is 'orthogonl'; expected 'orthogonal'"),
        ({"group_by": "types"}, lt.FormatError, "'types' matches none"),
        ({"r": 99, "layer_replication": [[0, 3], [0, 3]]}, lt.RankError, "exceeds the layers"),
        ({"r": 33}, lt.RankError, r"exceeds the layers of group"),
        ({"group_by": "all=."}, lt.ShapeError, "together"),
        ({"group_by": "x=nothing"}, lt.FormatError, "matches none"),
        (
            {"target_modules": ["LayerNorm"]},
            lt.UnsupportedAdapterError,
            r"LayerNorm is a LayerNorm",
        ),
        ({"share_factors": "nobody"}, lt.FormatError, "'nobody'"),
    ],
)
def test_refusals(options, error, message) -> None:
    base = bert()
    with pytest.raises(error, match=message):
        get_peft_model(base, config(**options))
    assert unchanged(base)
    model = get_peft_model(bert(), config())
    before = output(model)
    with pytest.raises(error, match=message):
        model.add_adapter("second", config(**options))
    assert list(model.base_model.lotr_factors) == list(model.peft_config) == ["default"]
    assert not any("second" in key for key in model.state_dict())
    assert torch.equal(output(model), before)
    assert model.get_nb_trainable_parameters()[0] == CORES + FACTORS


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": 0}, lt.RankError),
        ({"r": (1, 2, 3)}, lt.RankError),
        ({"train": "some"}, lt.OptionError),
        ({"bias": "some"}, lt.OptionError),
        ({"r": True}, lt.RankError),
        ({"r": 2.0}, lt.RankError),
        ({"group_by": 3}, lt.OptionError),
        ({"lotr_dropout": 1.5}, lt.OptionError),
        ({"lotr_dropout": "0.1"}, lt.OptionError),
        ({"lotr_alpha": float("nan")}, lt.OptionError),
        ({"lotr_alpha": "32"}, lt.OptionError),
        ({"format_version": 3}, lt.FormatError),
        ({"groups": [{"name": "query"}]}, lt.FormatError),
    ],
)
def test_config_refusals(options, error) -> None:
    with pytest.raises(error):
        config(**options)


@pytest.mark.parametrize("name", ["left", "train", "keys", "a.b"])
def test_a_name_that_is_part_of_the_keys_is_refused(name: str) -> None:
    base = bert()
    with pytest.raises(lt.FormatError, match=f"cannot be named '{name}'"):
        get_peft_model(base, config(), adapter_name=name)
    assert unchanged(base)


def test_injection_without_a_tuner_is_refused() -> None:
    base = bert()
    with pytest.raises(lt.UnsupportedAdapterError, match=r"shared state.*get_peft_model"):
        inject_adapter_in_model(config(), base)
    assert unchanged(base)


SEQ2SEQ = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64},
    **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0},
}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("OPT", {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "vocab_size": 64}),
        ("BioGpt", {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}),
        ("MBart", SEQ2SEQ),
        ("Marian", SEQ2SEQ),
        # Its config refuses that num_hidden_layers be set, on the way back too.
        ("ProphetNet", {"hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}),
    ],
)
def test_an_embedding_that_works_out_its_rows_is_refused(kind, sizes) -> None:
    """It is called with a mask, tokens or a shape: their update would come from other rows."""
    transformers = pytest.importorskip("transformers")
    heads = {} if kind == "ProphetNet" else {"num_attention_heads": 4}
    settings = getattr(transformers, f"{kind}Config")(**heads, **sizes)
    model = getattr(transformers, f"{kind}Model")(settings)
    with pytest.raises(lt.UnsupportedAdapterError, match=r"embed.* is a .*target modules"):
        get_peft_model(
            model, config(r=2, target_modules=r".*(embed_positions|position_embeddings)")
        )


def test_an_embedding_that_scales_its_rows_is_adapted() -> None:
    """Its update is scaled as its rows are, and merges into them."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.MBartConfig(**SEQ2SEQ, scale_embedding=True, tie_word_embeddings=False)
    model = transformers.MBartModel(settings)
    # Of their own weights each, as after untying: a shared one is not merged for one of its uses.
    for side in (model.encoder, model.decoder):
        side.embed_tokens.weight = nn.Parameter(model.shared.weight.detach().clone())
    targets = ["encoder.embed_tokens", "decoder.embed_tokens"]
    before = output(model)
    adapted = get_peft_model(model, config(r=2, target_modules=targets))
    randomize(adapted)
    expected = output(adapted)
    assert float((expected - before).norm() / before.norm()) > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)
