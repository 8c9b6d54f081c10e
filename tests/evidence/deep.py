"""A deeper encoder, MPNet (12 layers, d = 768), on two tasks, and few or all layers adapted.

What is kept after training, as in `tests.evidence.after`; and training of the last 3, 6 and 12
layers, as in `tests.evidence.training`: U and V are paid once, whatever the number of layers. A row
of MPNet takes eight times as long as one of MiniLM, so fewer are trained on and scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lotrtensor import load
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.peft import LotrConfig
from tests.evidence import after, encoder, training
from tests.evidence.tables import read
from tests.evidence.tasks import Task

TASKS = ("amazon", "wordnet")
TRAIN, TEST = 800, 500
"""Rows of MPNet at most."""

FORMS = (
    *(("frozen", 0), ("LoRA, as trained", 1)),
    *(("compressed", ratio) for ratio in (8, 16, 32, 64)),
    *(("calibrated", 32), ("calibrated", 64), ("16-bit terms", 32), ("16-bit LoTR", 32)),
    *(("int4", 0), ("LoRAQuant 2", 0)),
)
LAYERS = {"MiniLM": (3, 6), "MPNet": (3, 6, 12)}
RATES = (3e-3, 1e-2, 3e-2)
TUNING_TRAIN, TUNING_TEST = 300, 200
"""Rows of the tuning of rates: two epochs of some that are trained on, scored on others of them."""

METHODS: dict[str, Callable[..., Any]] = {
    "LoRA 1": lambda **fields: LoraConfig(r=1, lora_alpha=2, **fields),
    "LoTR 4": lambda **fields: LotrConfig(r=4, **fields),
    "cores 16, basis of the weights": lambda **fields: LotrConfig(
        r=16, train="cores", init="svd", **fields
    ),
}


def cells(
    task: Task, cache: Path, known: set[tuple[str, ...]], results: Path
) -> Iterator[dict[str, Any]]:
    """Score what is not yet known of a task, if it is one of the two."""
    if task.name not in TASKS:
        return
    large = task._replace(
        train=task.train[:TRAIN], test=task.test[:TEST], base=encoder.mpnet(cache)
    )
    for form, ratio in FORMS:
        if ("MPNet", form, str(ratio), "") not in known:
            yield {"encoder": "MPNet", "form": form, "ratio": ratio, "layers": ""} | kept(
                large, cache, form, ratio
            )
    yield from tuned(large, known)
    rates = best_rates(results)
    for name, own in (("MiniLM", task), ("MPNet", large)):
        for layers in LAYERS[name]:
            for method in METHODS:
                if (name, method, "", str(layers)) not in known:
                    row = {"encoder": name, "form": method, "ratio": "", "layers": layers}
                    yield row | depth(own, method, layers, rates[name, method])


def kept(task: Task, cache: Path, form: str, ratio: int) -> dict[str, Any]:
    """What a form of the task's adapter says of the rows of the test; see `after.cells`."""
    source = after.original(task, cache)
    scorer = after.Scorer.of(source, task)
    if form == "frozen":
        return scorer.frozen(task)
    lora = load(source)
    assert isinstance(lora, LoraAdapter)
    return after.scored(task, lora, form, ratio, cache, scorer)


def tuned(task: Task, known: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """Tune the rates of every method on MPNet, on the first of the two tasks alone."""
    if task.name != TASKS[0]:
        return
    held_out = task.train[TUNING_TRAIN : TUNING_TRAIN + TUNING_TEST]
    short = task._replace(train=task.train[:TUNING_TRAIN], test=held_out)
    for method in METHODS:
        for rate in RATES:
            if ("MPNet", method, str(rate), "tuning") not in known:
                row = {"encoder": "MPNet", "form": method, "ratio": rate, "layers": "tuning"}
                yield row | depth(short, method, LAYERS["MPNet"][-1], rate)


def best_rates(results: Path) -> dict[tuple[str, str], float]:
    """The rate of every method: on MiniLM that of `tests.evidence.training`, on MPNet the best."""
    found = {
        ("MiniLM", method): rate
        for method, rate in training.best_rates(read(results.with_name("training.jsonl"))).items()
    }
    tried = [cell for cell in read(results) if cell["layers"] == "tuning"]
    for method in METHODS:
        best = max((c for c in tried if c["form"] == method), key=lambda cell: cell["accuracy"])
        found["MPNet", method] = best["ratio"]
    return found


def depth(task: Task, method: str, layers: int, rate: float) -> dict[str, Any]:
    """Train the last ``layers`` of an encoder."""
    torch.manual_seed(0)
    base = encoder.load_base(task.base)
    all_layers: int = base.config.num_hidden_layers
    fields = {"target_modules": encoder.targets(task.base), "task_type": "FEATURE_EXTRACTION"}
    last = list(range(all_layers - layers, all_layers))
    model = get_peft_model(base, METHODS[method](layers_to_transform=last, **fields))
    return training.trained(task, model, rate, epochs=training.EPOCHS, seed=0) | {"rate": rate}
