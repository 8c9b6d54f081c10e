"""Tiny randomly initialised models with fused experts, and a dense oracle for their updates."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", "5.0", reason="no fused experts before 5")

COMMON = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=64,
)


def mixtral():
    config = transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe(num_experts=4):
    config = transformers.Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=16,
        num_experts=num_experts,
        num_experts_per_tok=2,
        head_dim=8,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        **COMMON,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.GptOssForCausalLM(config)


MODELS = {f.__name__: f for f in (mixtral, qwen3_moe, deepseek_v3, gpt_oss)}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.arange(24).reshape(2, 12) * 5 % 64


def tiny(name, dtype=torch.float64, seed=0, **sizes):
    """A model whose parameters are all random: biases and routers start at zero otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](**sizes).to(dtype).eval()
        model.set_experts_implementation("eager")  # one expert after the other, in any type
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def randomise(model, std=0.3, seed=1):
    """Fill all that trains with random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=std)
    return model


def experts_of(model):
    """Modules with fused experts, by path."""
    return {n: m for n, m in model.named_modules() if n.endswith("mlp.experts")}


def with_dense(model, deltas):
    """Return a copy of a model with ΔW_e, m × n by ``experts.e.parameter``, added to its weights.

    Written without the library: the layout is the model's own.
    """
    dense = copy.deepcopy(model)
    transposed = "GptOss" in type(model).__name__
    for name, delta in deltas.items():
        path, expert, parameter = name.rsplit(".", 2)
        weight = getattr(dense.get_submodule(path), parameter).data[int(expert)]
        delta = delta.T if transposed else delta
        assert weight.shape == delta.shape
        weight += delta.to(weight.dtype)
    return dense


def logits(model, tokens=TOKENS, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits
