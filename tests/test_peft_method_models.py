"""The PEFT method on models that read, tie or share weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    DebertaV2Config,
    DebertaV2Model,
    MambaConfig,
    MambaModel,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from lotrtensor.torch.weight_reads import weight_reads  # noqa: E402
from tests.peft_models import THIRD_PARTY, bert, config, gpt2  # noqa: E402
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
        with pytest.raises(lt.UnsupportedAdapterError, match=rf"{reader}\.\w+ reads the weight"):
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
