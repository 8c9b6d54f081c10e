"""Training in this form: LoTR beside the methods of PEFT, at a few thousand trained numbers.

The learning rate of every method is the best of `RATES` on a part of the training rows that is
not trained on, found with one seed on one task, `TUNED_ON`, and kept for the others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    LoraConfig,
    PeftModel,
    TinyLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from lotrtensor import LoraAdapter, LowRankStack, load, tucker2
from lotrtensor.peft import LotrConfig
from tests.evidence import encoder
from tests.evidence.after import original
from tests.evidence.measures import packed, right
from tests.evidence.tables import read
from tests.evidence.tasks import TASKS, Task, load_task

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNED_ON, TUNING_ROWS, TUNING_EPOCHS = "wordnet", 1000, 2
EPOCHS = 2

ALL: dict[str, Any] = {"target_modules": encoder.TARGETS, "task_type": "FEATURE_EXTRACTION"}
LAYERS = 6


def adapt(method: str, task: str, cache: Path) -> PeftModel:
    """The encoder with the adapter of a method, untrained."""
    model = get_peft_model(encoder.load_base(), CONFIGS[method]())
    if method.endswith("of the other tasks"):
        take_basis(model, [name for name in TASKS if name != task], cache)
    return model


def lora(r: int = 1, **fields: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, **ALL | fields)


def cores(r: int, init: str = "orthogonal", group_by: str = "type") -> LotrConfig:
    return LotrConfig(r=r, train="cores", init=init, group_by=group_by, **ALL)


def each() -> str:
    """Every layer a group of its own, with U and V of its own."""
    # The first that matches counts: "output.dense" ends "attention.output.dense" too.
    ends = [rf"layer\.{k}\..*{re.escape(end)}$" for k in range(LAYERS) for end in encoder.TARGETS]
    return ",".join(f"g{k}={end}" for k, end in enumerate(ends))


CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA 8": lambda: lora(8),
    "LoRA 1": lora,
    "LoRA 1, query and value": lambda: lora(target_modules=["query", "value"]),
    "LoRA 1, query and value, last layer": lambda: lora(
        target_modules=["query", "value"], layers_to_transform=[LAYERS - 1]
    ),
    "LoTR 2": lambda: LotrConfig(r=2, **ALL),
    "LoTR 4": lambda: LotrConfig(r=4, **ALL),
    "LoTR 8": lambda: LotrConfig(r=8, **ALL),
    "LoTR 4, query and value": lambda: LotrConfig(
        r=4, group_by="qv=query|value", **ALL | {"target_modules": ["query", "value"]}
    ),
    "cores 8, random basis": lambda: cores(8),
    "cores 16, random basis": lambda: cores(16),
    "cores 8, basis of the weights": lambda: cores(8, "svd"),
    "cores 16, basis of the weights": lambda: cores(16, "svd"),
    "LoRA-XS 8": lambda: cores(8, "svd", each()),
    "LoRA-XS 16": lambda: cores(16, "svd", each()),
    "cores 8, basis of the other tasks": lambda: cores(8),
    "cores 16, basis of the other tasks": lambda: cores(16),
    "cores 8, bases of each layer of the other tasks": lambda: cores(8, group_by=each()),
    "cores 16, bases of each layer of the other tasks": lambda: cores(16, group_by=each()),
    "VeRA 64": lambda: VeraConfig(r=64, **ALL),
    "VB-LoRA 1": lambda: VBLoRAConfig(r=1, num_vectors=32, vector_length=192, topk=2, **ALL),
    "TinyLoRA 64": lambda: TinyLoraConfig(r=2, u=64, **ALL),
}
"""Methods by name. LoRA-XS (arXiv 2405.17604) trains cores between the singular vectors of W."""


@torch.no_grad()
def take_basis(model: PeftModel, tasks: list[str], cache: Path) -> None:
    """Set U and V to those of the Tucker-2 decomposition of other tasks' adapters together.

    The slices of a group are the updates of its layers in every one of these adapters, each
    adapter scaled to norm one, so that none outweighs the others.
    """
    pairs = defaultdict(list)
    for name in tasks:
        lora = load(original(load_task(name, cache), cache))
        assert isinstance(lora, LoraAdapter)
        squares = [np.sum((m.B.T @ m.B) * (m.A @ m.A.T)) for m in lora.modules]
        for module in lora.modules:
            pairs[module.name].append((module.B / np.sqrt(np.sum(squares)), module.A))
    layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in model.named_modules()
        if hasattr(layer, "lotr_shared")
    }
    for paths in _by_factors(layers):
        factors = layers[paths[0]].lotr_shared["default"]
        some = [pair for path in paths for pair in pairs[path]]
        stack = LowRankStack([b for b, _ in some], [a for _, a in some])
        fit = tucker2(stack, factors.rank)
        factors.left.copy_(torch.as_tensor(fit.tucker2.left))
        factors.right.copy_(torch.as_tensor(fit.tucker2.right))


def _by_factors(layers: dict[str, Any]) -> list[list[str]]:
    """Paths of the layers that share their factors."""
    found = defaultdict(list)
    for path, layer in layers.items():
        found[id(layer.lotr_shared["default"])].append(path)
    return list(found.values())


def cells(
    task: Task,
    cache: Path,
    known: set[tuple[str, ...]],
    results: Path,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = tuple(CONFIGS),
) -> Iterator[dict[str, Any]]:
    """Tune where the rates are tuned, then train and score what is not yet known."""
    if task.name == TUNED_ON:
        for method in methods:
            for rate in RATES:
                if (method, "tuning", str(rate)) not in known:
                    key = {"method": method, "seed": "tuning", "rate": rate}
                    yield key | tune(task, cache, method, rate)
    rates = best_rates(read(results))
    for seed in seeds:
        for method in methods:
            rate = rates.get(method)
            if rate is None:
                raise ValueError(f"the rates are tuned on {TUNED_ON}: run that task first")
            if (method, str(seed), str(rate)) not in known:
                key = {"method": method, "seed": seed, "rate": rate}
                yield key | run(task, cache, method, rate, epochs=EPOCHS, seed=seed)


def best_rates(cells: list[dict[str, Any]]) -> dict[str, float]:
    """The rate of every method with the highest accuracy in tuning."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        best = found.get(cell["method"], {"accuracy": 0.0})
        if cell["seed"] == "tuning" and cell["accuracy"] > best["accuracy"]:
            found[cell["method"]] = cell
    return {method: cell["rate"] for method, cell in found.items()}


def tune(task: Task, cache: Path, method: str, rate: float) -> dict[str, Any]:
    """Accuracy on rows that are not trained on, after a short run."""
    short = Task(task.name, task.classes, task.train[:TUNING_ROWS], task.train[TUNING_ROWS:])
    return run(short, cache, method, rate, epochs=TUNING_EPOCHS, seed=0)


def run(
    task: Task, cache: Path, method: str, rate: float, *, epochs: int, seed: int
) -> dict[str, Any]:
    """Train once, and score the rows of the test."""
    torch.manual_seed(seed)
    return trained(task, adapt(method, task.name, cache), rate, epochs=epochs, seed=seed)


def trained(task: Task, model: PeftModel, rate: float, *, epochs: int, seed: int) -> dict[str, Any]:
    """Train the adapter of a model, with a head, and score the rows of the test."""
    head = nn.Linear(model.config.hidden_size, task.classes)
    texts, labels = zip(*task.train, strict=True)
    numbers = encoder.tokens(texts, task.base)
    seconds = encoder.train(model, head, numbers, labels, rate=rate, epochs=epochs, seed=seed)
    texts, labels = zip(*task.test, strict=True)
    numbers = encoder.tokens(texts, task.base)
    told = right(encoder.logits(model, head, numbers).numpy(), np.array(labels))
    return {
        "numbers": model.get_nb_trainable_parameters()[0],
        "seconds": round(seconds),
        "rows": len(told),
        "accuracy": round(float(told.mean()), 5),
        "right": packed(told),
    }
