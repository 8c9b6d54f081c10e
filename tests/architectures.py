"""Tiny models of many kinds, each with random weights, an input, and a version tuned in full."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 64,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaForCausalLM", TEXT | {"num_key_value_heads": 4}),
    "llama, tied": (
        "LlamaForCausalLM",
        TEXT | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "gpt2, tied": ("GPT2LMHeadModel", GPT2 | TOKENS),
    "gpt2": ("GPT2LMHeadModel", GPT2 | TOKENS | {"tie_word_embeddings": False}),
    "phi": ("PhiForCausalLM", TEXT | TOKENS),
    "bert": ("BertForMaskedLM", TEXT),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
        | TOKENS,
    ),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"vocab_size": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32},
    ),
    "gemma3": ("Gemma3ForCausalLM", TEXT | {"num_key_value_heads": 4, "head_dim": 8}),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        TEXT
        | {"relative_attention": True, "position_buckets": 8, "max_relative_positions": 16}
        | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "none"}
        | {"position_biased_input": False},
    ),
    "wavlm": (
        "WavLMForCTC",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 12}
        | {"intermediate_size": 48, "conv_dim": (16, 16), "conv_stride": (5, 4)}
        | {"conv_kernel": (10, 8), "num_feat_extract_layers": 2, "num_buckets": 16}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    ),
    "mamba": (
        "MambaForCausalLM",
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64},
    ),
    # Its head is called output, as are parts of all its blocks.
    "git": (
        "GitForCausalLM",
        TEXT
        | {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}}
        | TOKENS,
    ),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ | {"max_position_embeddings": 32} | TOKENS),
}


def build(name: str) -> nn.Module:
    """A model of `CONFIGS`, or of two that see pictures; the same every time."""
    torch.manual_seed(0)
    if name == "llava":
        vision = CLIPVisionConfig(
            **{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=28, patch_size=14
        )
        text = LlamaConfig(**TEXT, num_key_value_heads=4)
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=60
        )
        return transformers.LlavaForConditionalGeneration(config).eval()
    if name == "qwen2-vl":
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        config = transformers.Qwen2VLConfig(
            text_config=TEXT | {"num_key_value_heads": 4, "rope_scaling": rope},
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
            | {"mlp_ratio": 2, "patch_size": 14},
        )
        return transformers.Qwen2VLForConditionalGeneration(config).eval()
    class_name, fields = CONFIGS[name]
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**fields)).eval()


def output(model: nn.Module) -> torch.Tensor:
    """Logits on a fixed input, in float64."""
    ids = torch.arange(16).reshape(2, 8) + 3
    if model.main_input_name == "input_values":
        generator = torch.Generator().manual_seed(1)
        inputs = {"input_values": torch.randn(1, 2000, generator=generator)}
    else:
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids.flip(0)
    with torch.no_grad():
        return model(**inputs).logits.double()


def tune(model: nn.Module, size: float = 0.2) -> nn.Module:
    """Add an update of rank 1 to every matrix, in place; a shared one moves once."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.endswith(".weight"):
                m, n = parameter.shape
                parameter += size * torch.randn(m, 1) @ torch.randn(1, n)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance."""
    return float((found - expected).norm() / expected.norm())
