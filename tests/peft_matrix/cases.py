"""LoTR's cases for the lists that PEFT's tests are parametrised over."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from lotrtensor.peft import LotrConfig

# The linear layers of PEFT's MLP are 10 -> 20 -> 2 wide: ranks above 2 suit the first alone. PEFT's
# learning rates and tolerances are chosen for a scale about 1, which alpha = r gives.
_MLP: dict[str, dict[str, Any]] = {
    "one pattern": {"target_modules": "lin0"},
    "one layer": {"target_modules": ["lin0"]},
    "narrow layer": {"target_modules": ["lin1"], "r": 2, "lotr_alpha": 2},
    "two groups": {"target_modules": ["lin0", "lin1"], "r": 2, "lotr_alpha": 2},
    "all-linear": {"target_modules": "all-linear", "r": 1, "lotr_alpha": 1},
    "modules_to_save": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    "modules_to_save that is a target": {
        "target_modules": ["lin0", "lin1"],
        "modules_to_save": ["lin1"],
        "r": 2,
        "lotr_alpha": 2,
    },
    "alpha and dropout": {"target_modules": ["lin0"], "lotr_alpha": 4, "lotr_dropout": 0.1},
    "pair of ranks": {"target_modules": ["lin0"], "r": (3, 5)},
    "rslora": {"target_modules": ["lin0"], "use_rslora": True},
    "svd": {"target_modules": ["lin0"], "init": "svd"},
    "paper": {"target_modules": ["lin0"], "init": "paper"},
    "cores": {"target_modules": ["lin0"], "train": "cores"},
    "bias": {"target_modules": ["lin0"], "bias": "lotr_only"},
    "every bias": {"target_modules": ["lin0"], "bias": "all"},
    "exclude_modules": {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]},
}
# The embedding is 100 x 5, the Conv1D 5 -> 1.
_EMBEDDING: dict[str, dict[str, Any]] = {
    "Conv1D": {"target_modules": ["conv1d"], "r": 1},
    "Conv1D, fan_in_fan_out": {"target_modules": ["conv1d"], "r": 1, "fan_in_fan_out": True},
    "embedding": {"target_modules": ["emb"], "r": (3, 2), "lotr_alpha": 256},
    "embedding and Conv1D": {"target_modules": ["emb", "conv1d"], "r": 1},
    "trainable tokens": {
        "target_modules": ["conv1d"],
        "r": 1,
        "trainable_token_indices": {"emb": [0, 10]},
    },
}

CUSTOM: list[tuple[Any, ...]] = [
    (f"LoTR {name}", model, LotrConfig, kwargs)
    for model, rows in (("MLP", _MLP), ("EmbConv1D", _EMBEDDING))
    for name, kwargs in rows.items()
]
# PEFT has no case of a trained bias for LoRA; these show what its tests make of one.
CUSTOM += [
    ("LoRA bias", "MLP", LoraConfig, {"target_modules": ["lin0"], "bias": "lora_only"}),
    ("LoRA every bias", "MLP", LoraConfig, {"target_modules": ["lin0"], "bias": "all"}),
]

_RANDOM: dict[str, Any] = {"r": 2, "init_weights": False}


def _pair(name: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, ...]:
    """Two adapters that are active together."""
    kind = "lora+trainable_tokens" if "trainable_token_indices" in first else "lotr"
    return (f"LoTR {name}", kind, LotrConfig, {**_RANDOM, **first}, {**_RANDOM, **second})


MULTIPLE = [
    _pair("same layer", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    _pair("other layer", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    _pair("other ranks", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "r": (3, 5)}),
    _pair(
        "trainable tokens",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
]

MIXED = [
    (
        "LoTR mixed adapter",
        LotrConfig(target_modules=["lin0"], init_weights=False),
        LotrConfig(target_modules=["lin0"], r=(5, 7), init_weights=False),
    ),
]


# Options for models of transformers; ranks up to their hidden size of 32.
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "alpha and dropout": {"r": 8, "lotr_alpha": 32, "lotr_dropout": 0.05, "bias": "none"},
    "pair of ranks": {"r": (4, 6), "use_rslora": True},
    "cores": {"r": 4, "train": "cores", "init": "svd"},
    "trainable tokens": {"r": 8, "trainable_token_indices": [0, 1, 3]},
}


def _of_task(task: str) -> list[Any]:
    """Cases for models of transformers, at the layers that LoRA adapts by default."""
    common = {"task_type": task, "target_modules": None}
    return [
        pytest.param(LotrConfig, {**common, **kwargs}, id=f"LoTR {name}")
        for name, kwargs in _TRANSFORMERS.items()
    ]


LEFT_OUT = ("trl-internal-testing/tiny-Llama4ForCausalLM",)
"""Models whose cases are left out, LoRA's too. Llama 4's fused experts do not follow the interface
that tells how experts compute: LoTR refuses them by name."""

# Names of the layers of GPT-OSS.
_EXPERTS: dict[str, dict[str, Any]] = {
    "one parameter": {"target_parameters": ["mlp.experts.down_proj"], "r": 4},
    "a parameter a layer": {
        "target_parameters": ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
    },
    "both parameters": {
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        "lotr_alpha": 32,
    },
    "pair of ranks": {"target_parameters": ["mlp.experts.down_proj"], "r": (3, 5)},
    "beside modules": {
        "target_parameters": ["mlp.experts.down_proj"],
        "target_modules": ["q_proj", "v_proj"],
    },
}


def _of_experts() -> list[Any]:
    """Cases for a model with fused experts."""
    model, task = "trl-internal-testing/tiny-GptOssForCausalLM", {"task_type": "CAUSAL_LM"}
    return [
        pytest.param(model, LotrConfig, {**task, **kwargs}, id=f"LoTR {name}")
        for name, kwargs in _EXPERTS.items()
    ]


LISTS: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM,
        "ALL_PEFT_CONFIG_CLASSES": [LotrConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": MULTIPLE,
        "MIXED_ADAPTER_TEST_CASES": MIXED,
    },
    "test_decoder_models": {"ALL_CONFIGS": _of_task("CAUSAL_LM")},
    "test_target_parameters": {"ALL_CONFIGS": _of_experts()},
    "test_encoder_decoder_models": {"ALL_CONFIGS": _of_task("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": _of_task("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": _of_task("SEQ_CLS")},
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": _of_task("TOKEN_CLS"),
        "QA_CONFIGS": _of_task("QUESTION_ANS"),
    },
    "test_quantization": {
        "TEST_CASES": [
            (LotrConfig, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
            (LotrConfig, {"r": (3, 5), "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ]
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(LotrConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(LotrConfig, {})],
    },
}

_SHARED_FIELDS = ("target_modules", "modules_to_save", "trainable_token_indices", "task_type")


def twin(value: Any) -> Any:
    """Return the LoTR value that stands beside a LoRA one in a list; None if there is none."""
    if value is LoraConfig:
        return LotrConfig
    if isinstance(value, list | tuple):
        twins = [twin(entry) for entry in value]
        if all(entry is None for entry in twins):
            return None
        return type(value)(v if t is None else t for v, t in zip(value, twins, strict=True))
    if type(value) is not LoraConfig or value.use_dora:
        return None
    fields = {name: getattr(value, name) for name in _SHARED_FIELDS}
    return LotrConfig(**fields, r=1, lotr_alpha=1, init_weights=value.init_lora_weights)
