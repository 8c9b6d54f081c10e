"""Stand-ins for the small random models that PEFT's tests load from a model hub.

They are written once in the layout of the hub's own cache, with the architecture that the name
says, so that every ``from_pretrained`` finds them offline, by LoRA and LoTR alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig

COMMIT = "0" * 40
VOCABULARY = 1024  # PEFT's tests name tokens up to 1000

# Weights this large make the effect of every adapter visible, as PEFT's tests expect it to be.
_LARGE = {"initializer_range": 0.2}
_ENCODER = {
    **_LARGE,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128}
_GPT = {
    **_LARGE,
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
}
# Not among the tokens of the tests' inputs: the embedding of padding is zero.
_SPECIAL = {"bos_token_id": 1020, "eos_token_id": 1021, "pad_token_id": 1022}


def _llama() -> hf.LlamaConfig:
    return hf.LlamaConfig(**_DECODER, **_SPECIAL)


def _opt(layers: int = 4, hidden: int = 32, std: float = 0.2) -> hf.OPTConfig:
    return hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=hidden,
        max_position_embeddings=128,
        init_std=std,
        **_SPECIAL,
    )


MODELS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (hf.OPTForCausalLM, _opt),
    # Quantised in blocks of 64. Twelve layers of large weights would magnify what that loses.
    "peft-internal-testing/opt-125m": (
        hf.OPTForCausalLM,
        lambda: _opt(layers=12, hidden=64, std=0.05),
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(**_GPT, **_SPECIAL),
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        hf.GPTJForCausalLM,
        lambda: hf.GPTJConfig(**_GPT, **_SPECIAL, rotary_dim=4),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, _llama),
    "peft-internal-testing/tiny-dummy-qwen2": (
        hf.Qwen2ForCausalLM,
        # Smaller: PEFT asks how well a LoRA of low rank comes close to other methods on it.
        lambda: hf.Qwen2Config(**{**_DECODER, "initializer_range": 0.1}, **_SPECIAL),
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        hf.Gemma3ForCausalLM,
        lambda: hf.Gemma3TextConfig(**_DECODER, **_SPECIAL),
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(
            **{**_DECODER, "num_hidden_layers": 2, "num_local_experts": 4},
            num_experts_per_tok=2,
            **_SPECIAL,
        ),
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=4,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        ),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            init_std=0.2,
            **_SPECIAL,
            decoder_start_token_id=1021,
            max_position_embeddings=128,
        ),
    ),
    "peft-internal-testing/tiny-random-BertModel": (
        hf.BertModel,
        lambda: hf.BertConfig(**_ENCODER),
    ),
    "peft-internal-testing/tiny-random-RobertaModel": (
        hf.RobertaModel,
        lambda: hf.RobertaConfig(**_ENCODER),
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (
        hf.DebertaModel,
        lambda: hf.DebertaConfig(
            **_ENCODER, relative_attention=True, position_biased_input=False, pos_att_type="c2p|p2c"
        ),
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        hf.DebertaV2Model,
        lambda: hf.DebertaV2Config(
            **_ENCODER, relative_attention=True, position_biased_input=False, pos_att_type="c2p|p2c"
        ),
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        hf.BertForSequenceClassification,
        lambda: hf.BertConfig(**_ENCODER),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        hf.RobertaForSequenceClassification,
        lambda: hf.RobertaConfig(**_ENCODER),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        hf.LlamaForSequenceClassification,
        _llama,
    ),
}


ADAPTER = ("peft-internal-testing/tiny-opt-lora-revision", "test")
"""An adapter of which PEFT's tests read the config alone, and its revision."""


def make_models(hub: Path) -> None:
    """Write what is not there yet into ``hub``, laid out as the hub's cache."""
    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        _write(hub, name, "main", kind(config()).save_pretrained)
    _write(hub, *ADAPTER, LoraConfig(target_modules=["q_proj", "v_proj"]).save_pretrained)


def _write(hub: Path, name: str, revision: str, save: Callable[[Path], None]) -> None:
    repository = hub / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    if not reference.is_file():
        save(repository / "snapshots" / COMMIT)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(COMMIT)  # last: a stopped run leaves no half model behind
