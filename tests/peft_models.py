"""Small models for the tests of the PEFT method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import lotrtensor.peft as lotr

# PEFT 0.21 asks transformers 5 for a name that the latter is about to drop.
THIRD_PARTY = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"

TARGETS = ["query", "value", "intermediate.dense"]

# Trained numbers of `config` on `bert`: nine layers in three groups, at rank (3, 4).
CORES = 9 * 3 * 4
FACTORS = 2 * 32 * (3 + 4) + 48 * 3 + 32 * 4


def bert(layers: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    """A BERT encoder of hidden size 32."""
    torch.manual_seed(seed)
    return BertModel(_bert_config(layers, **options), add_pooling_layer=False).eval()


def classifier(layers: int = 2, seed: int = 0, labels: int = 2) -> nn.Module:
    """The same with a classification head."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(_bert_config(layers, num_labels=labels)).eval()


def _bert_config(layers: int, **options: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return BertConfig(**{"vocab_size": 60, "num_hidden_layers": layers, **sizes, **options})


def gpt2(seed: int = 0) -> nn.Module:
    """A GPT-2, whose linear layers are Conv1D."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return GPT2LMHeadModel(config).eval()


def ids(rows: int = 4, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Token numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 60, (rows, length), generator=generator)


def output(model: nn.Module, x: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """First output of a model in evaluation."""
    with torch.no_grad():
        return model.eval()(ids() if x is None else x, **options)[0]


def weighted(y: torch.Tensor) -> torch.Tensor:
    """A loss with gradients: the sum of squares of a normalised output has none."""
    generator = torch.Generator().manual_seed(5)
    return (y * torch.randn(y.shape, generator=generator)).sum()


def config(**options: Any) -> lotr.LotrConfig:
    """A config of small rank."""
    return lotr.LotrConfig(**{"r": (3, 4), "target_modules": TARGETS, **options})


def randomize(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    """Give the cores of an adapter values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f"lotr_core.{adapter}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def lotr_layers(model: nn.Module) -> dict[str, lotr.LotrLayer]:
    """Adapted layers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lotr.LotrLayer)}


def trained(**options) -> nn.Module:
    """A small BERT with an adapter of random numbers."""
    model = get_peft_model(bert(), config(**options))
    randomize(model)
    return model


def saved(path: Path, **options) -> Path:
    """The directory of such an adapter."""
    trained(**options).save_pretrained(path)
    return path
