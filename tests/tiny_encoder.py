"""A tiny BERT of random weights with a tokenizer and a LoRA on it, as directories on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import lotrtensor as lt

WORDS = [f"word{k}" for k in range(60)]
LAYERS, WIDTH, RANK = 2, 32, 4


def write_encoder(path: Path) -> None:
    """The model and its tokenizer as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2 + len(WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(path)
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)


def encoder_lora(task_type: str = "FEATURE_EXTRACTION") -> lt.LoraAdapter:
    """A LoRA on query and value of both layers."""
    rng = np.random.default_rng(0)
    names = [
        f"encoder.layer.{k}.attention.self.{kind}"
        for k in range(LAYERS)
        for kind in ("query", "value")
    ]
    modules = [
        lt.LoraModule(
            name,
            (2.0 * rng.normal(size=(WIDTH, RANK))).astype("f4"),
            (0.5 * rng.normal(size=(RANK, WIDTH))).astype("f4"),
        )
        for name in names
    ]
    return lt.LoraAdapter(tuple(modules), {"task_type": task_type}, np.dtype("float32"))


def write_texts(path: Path, count: int = 480) -> None:
    """Some words a line."""
    rng = np.random.default_rng(1)
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(3, 12))) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
