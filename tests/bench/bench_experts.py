"""Training fused experts: LoTR beside PEFT LoRA on ``target_parameters``, and the frozen model.

A stack of layers of 64 experts (hidden 512, 256 inside an expert), 8 of them a token, 1,024 tokens.
A step is forward, backward to the input, and AdamW where there is something to train; the frozen
stack goes forward and backward to its input alone. Times are seconds of the processor and paired:
every round runs each method once, in alternating order, and the medians are of the rounds' ratios.
Peak memory is that of a process of its own that does three steps.

    python -m tests.bench.bench_experts [--rounds 9] [--json docs/bench-experts.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lotrtensor.peft import LotrConfig

EXPERTS, HIDDEN, INNER, ACTIVE, TOKENS, LAYERS = 64, 512, 256, 8, 1024, 2
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
METHODS = ("frozen", "lotr", "lora")


class Layer(nn.Module):
    """Experts alone: the router's choices are given."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Add the experts' output to the input."""
        return x + self.experts(x, index, weights)


class Stack(nn.Module):
    """Layers of experts, one after the other."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=INNER,
            num_experts=EXPERTS,
            num_experts_per_tok=ACTIVE,
        )
        config._experts_implementation = implementation
        self.layers = nn.ModuleList(Layer(config) for _ in range(LAYERS))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.03)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Run the layers."""
        for layer in self.layers:
            x = layer(x, index, weights)
        return x


def make(method: str, rank: int, implementation: str) -> nn.Module:
    """The stack, frozen or with an adapter of a rank."""
    torch.manual_seed(0)
    stack = Stack(implementation)
    if method == "frozen":
        return stack.requires_grad_(False)
    if method == "lotr":
        return get_peft_model(stack, LotrConfig(r=rank, target_parameters=TARGETS))
    config = LoraConfig(r=rank, target_modules=[], target_parameters=TARGETS)
    return get_peft_model(stack, config)


def stepper(model: nn.Module) -> Callable[[], None]:
    """One step on the same tokens and choices."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    scores = torch.randn(TOKENS, EXPERTS, generator=generator)
    weights, index = torch.topk(scores.softmax(-1), ACTIVE)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        y = model(x.detach().requires_grad_(), index, weights)
        y.square().mean().backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad()

    return step


def trained_bytes(model: nn.Module) -> int:
    """Adapter, gradient and AdamW's two moments."""
    return 4 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def bench(rank: int, implementation: str, rounds: int) -> dict[str, object]:
    """Times, ratios and bytes of one rank."""
    models = {method: make(method, rank, implementation) for method in METHODS}
    steps = {method: stepper(model) for method, model in models.items()}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for k in range(rounds + 1):
        for method in METHODS[:: 1 if k % 2 else -1]:
            start = time.process_time()
            steps[method]()
            if k:
                times[method].append(time.process_time() - start)

    def ratio(one: str, other: str) -> float:
        pairs = zip(times[one], times[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    numbers = {
        m: sum(p.numel() for p in x.parameters() if p.requires_grad) for m, x in models.items()
    }
    return {
        "rank": rank,
        "implementation": implementation,
        **{f"{method}_seconds": round(statistics.median(times[method]), 4) for method in METHODS},
        "lotr_to_frozen": round(ratio("lotr", "frozen"), 3),
        "lora_to_lotr": round(ratio("lora", "lotr"), 2),
        "lotr_numbers": numbers["lotr"],
        "lora_numbers": numbers["lora"],
        "lotr_training_bytes": trained_bytes(models["lotr"]),
        "lora_training_bytes": trained_bytes(models["lora"]),
        **{f"{method}_peak_mib": peak(method, rank, implementation) for method in METHODS},
    }


def peak(method: str, rank: int, implementation: str) -> int:
    """Peak resident memory of a process that does three steps, in MiB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (method, rank, implementation))


def _peak(method: str, rank: int, implementation: str) -> int:
    step = stepper(make(method, rank, implementation))
    for _ in range(3):
        step()
    # Not getrusage, whose peak a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024


def main() -> None:
    """Print the rows, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for rank, implementation in ((4, "grouped_mm"), (16, "grouped_mm"), (16, "eager")):
        rows.append(bench(rank, implementation, options.rounds))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
