"""Adapt a small mixture-of-experts language model to a second domain: LoTR beside PEFT LoRA.

The model (Qwen3-MoE's architecture, bytes for tokens) is trained from random initialisation on
prose, the language reference that comes with Python (``pydoc_data.topics``), and then adapted to
another domain, the source of Python's standard library, by its experts alone:

* LoTR of rank 4, 8, 16 and 32: U and V for all experts of a layer, a core an expert;
* LoTR with nothing but the cores trained, of rank 16 and 32;
* LoRA of rank 1, 4 and 8 on the same parameters (``target_parameters``).

The learning rate of every run is the best of the same five on a part of the text that is used for
nothing else, with the first seed; perplexities are of a third part, a mean over three seeds.

How to run (CPU, one core; ``--steps`` and ``--seeds`` make it shorter)::

    pip install 'lotrtensor[peft]'
    python examples/experts.py --out experts.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sysconfig
import time
import warnings
from pathlib import Path
from pydoc_data import topics
from statistics import fmean, stdev
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lotrtensor.peft import LotrConfig

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BATCH, LENGTH = 8, 128

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def prose() -> Tensor:
    """Python's language reference, as bytes."""
    return as_bytes("\n".join(topics.topics[name] for name in sorted(topics.topics)))


def code(limit: int = 1_500_000) -> Tensor:
    """Sources of the standard library's modules, as bytes."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return as_bytes("\n".join(p.read_text("utf-8", "ignore") for p in paths)[:limit])


def as_bytes(text: str) -> Tensor:
    """Numbers of the bytes of a text."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def parts(text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For training, for the choice of rates, and for the perplexities."""
    tenth = len(text) // 10
    return text[: 8 * tenth], text[8 * tenth : 9 * tenth], text[9 * tenth :]


def batch(text: Tensor, generator: torch.Generator) -> Tensor:
    """Random pieces of a text."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([text[s : s + LENGTH] for s in starts.tolist()])


def make_model() -> nn.Module:
    """A model of 16 experts a layer, four of them a token."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        norm_topk_prob=True,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config)


def train(model: nn.Module, text: Tensor, *, lr: float, steps: int, seed: int) -> float:
    """Train on random pieces; return seconds of the processor a step."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    model.train()
    start = time.process_time()
    for _ in range(steps):
        rows = batch(text, generator)
        model(input_ids=rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return (time.process_time() - start) / steps


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor, batches: int = 24) -> float:
    """Perplexity a byte, on the same pieces every time."""
    generator = torch.Generator().manual_seed(99)
    model.eval()
    losses = []
    for _ in range(batches):
        rows = batch(text, generator)
        losses.append(float(model(input_ids=rows, labels=rows).loss))
    return math.exp(fmean(losses))


def methods() -> dict[str, Any]:
    """Configs by name."""
    lotr = {
        f"LoTR, rank {r}": lambda r=r: LotrConfig(r=r, target_parameters=TARGETS)
        for r in (4, 8, 16, 32)
    }
    cores = {
        f"LoTR, rank {r}, cores alone": lambda r=r: LotrConfig(
            r=r, target_parameters=TARGETS, train="cores"
        )
        for r in (16, 32)
    }
    lora = {
        f"LoRA, rank {r}": lambda r=r: LoraConfig(
            r=r, lora_alpha=2 * r, target_modules=[], target_parameters=TARGETS
        )
        for r in (1, 4, 8)
    }
    return lotr | cores | lora


def adapt(base: nn.Module, config: Any, text: Tensor, *, lr: float, steps: int, seed: int) -> Any:
    """An adapted model, its trained numbers and its seconds a step."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), config)
    seconds = train(model, text, lr=lr, steps=steps, seed=seed)
    return model, model.get_nb_trainable_parameters()[0], seconds


def main() -> None:
    """Train, adapt, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, (source, _, _), (target, choice, test) = make_model(), parts(prose()), parts(code())
    train(base, source, lr=3e-3, steps=options.base_steps, seed=0)
    found: dict[str, Any] = {
        "steps": options.steps,
        "base_steps": options.base_steps,
        "before": perplexity(base, test),
        "rows": [],
    }
    print(f"before: {found['before']:.3f}", flush=True)
    for name, config in methods().items():
        tried = {}
        for lr in RATES:
            model, numbers, seconds = adapt(
                base, config(), target, lr=lr, steps=options.steps, seed=0
            )
            tried[lr] = (perplexity(model, choice), perplexity(model, test), seconds)
        best = min(tried, key=lambda lr: tried[lr][0])
        results, times = [tried[best][1]], [t[2] for t in tried.values()]
        for seed in range(1, options.seeds):
            model, _, seconds = adapt(
                base, config(), target, lr=best, steps=options.steps, seed=seed
            )
            results.append(perplexity(model, test))
            times.append(seconds)
        row = {
            "name": name,
            "numbers": numbers,
            "lr": best,
            "perplexity": round(fmean(results), 4),
            "deviation": round(stdev(results), 4) if len(results) > 1 else 0.0,
            "perplexities": [round(value, 4) for value in results],
            "seconds_a_step": round(min(times), 4),
        }
        found["rows"].append(row)
        print(
            f"| {name} | {numbers:,} | {best:g} | {row['perplexity']:.3f} ± {row['deviation']:.3f} "
            f"| {row['seconds_a_step']:.3f} |",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
