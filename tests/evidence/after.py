"""After training: what each form of a trained adapter keeps, by the bytes of its file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lotrtensor import Calibration, LoraAdapter, RankError, compare, compress, convert, load
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.torch import calibrate, heal
from tests.bench.rivals import Rival, absmax, best_terms, every_number, loraquant, normal_float
from tests.evidence import encoder
from tests.evidence.measures import divergence, interval, packed, right
from tests.evidence.tasks import Task

RANK, ALPHA, RATE, EPOCHS = 8, 16, 1e-3, 3
RATIOS = (4, 8, 16, 32, 64)
HEALED = (16, 32, 64)
CALIBRATED = 600
"""Texts that a calibration looks at."""


@torch.enable_grad()  # who asks for a basis of other tasks computes without
def original(task: Task, cache: Path) -> Path:
    """Train the task's adapter (LoRA, rank 8, bfloat16 on disk) once, with its head."""
    out = cache / f"{task.stem}-lora"
    if (out / "adapter.json").exists():
        return out
    torch.manual_seed(0)
    targets = encoder.targets(task.base)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="FEATURE_EXTRACTION"
    )
    model = get_peft_model(encoder.load_base(task.base), config)
    head = nn.Linear(model.config.hidden_size, task.classes)
    texts, labels = zip(*task.train, strict=True)
    seconds = encoder.train(
        model, head, encoder.tokens(texts, task.base), labels, rate=RATE, epochs=EPOCHS, seed=0
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(out, save_embedding_layers=False)
    save_file({k: v.contiguous() for k, v in head.state_dict().items()}, out / "head.safetensors")
    (out / "adapter.json").write_text(json.dumps({"seconds": round(seconds)}))
    return out


def load_head(folder: Path) -> nn.Linear:
    """The head that was trained with an adapter."""
    state = load_file(folder / "head.safetensors")
    head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    head.load_state_dict(state)
    return head


def cells(
    task: Task, cache: Path, known: set[tuple[str, ...]], results: Path
) -> Iterator[dict[str, Any]]:
    """Score the forms of one task's adapter that are not yet known."""
    source = original(task, cache)
    lora = load(source)
    assert isinstance(lora, LoraAdapter)
    scorer = Scorer.of(source, task)
    if ("frozen", "0") not in known:
        yield scorer.frozen(task) | {"form": "frozen", "ratio": 0}
    for form, ratio in FORMS:
        if (form, str(ratio)) not in known:
            row = {"form": form, "ratio": ratio}
            yield row | scored(task, lora, form, ratio, cache, scorer)


def scored(
    task: Task, lora: LoraAdapter, form: str, ratio: int, cache: Path, scorer: Scorer
) -> dict[str, Any]:
    """Bytes, error and score of one form."""
    row: dict[str, Any] = {"source_bytes": lora.bytes}
    try:
        row["bytes"], made = make(task, lora, form, ratio, cache)
    except RankError as error:  # one rank a group is more than the budget
        return row | {"refused": str(error)}
    return row | scorer.score(made) | {"error": compare(lora, made).relative_error}


FORMS = (
    *(("LoRA, as trained", 1),),
    *(("compressed", ratio) for ratio in RATIOS),
    *(("compressed and healed", ratio) for ratio in HEALED),
    *(("calibrated", ratio) for ratio in RATIOS[1:]),
    *(("calibrated and healed", ratio) for ratio in HEALED),
    *(("16-bit terms", ratio) for ratio in RATIOS),
    *(("16-bit LoTR", ratio) for ratio in RATIOS),
    *(("int8", 0), ("int4", 0), ("NF4", 0), ("LoRAQuant 3", 0), ("LoRAQuant 2", 0)),
)
"""Forms, and how many times smaller they are asked to be (0: they have one size)."""


def make(
    task: Task, lora: LoraAdapter, form: str, ratio: int, cache: Path
) -> tuple[float, LoraAdapter]:
    """Bytes of a form, and the LoRA that it stands for."""
    budget = lora.bytes // max(ratio, 1)
    match form:
        case "LoRA, as trained":
            return lora.bytes, lora
        case "compressed":
            compressed = compress(lora, budget=budget)
            return compressed.file_bytes, compressed.to_lora()
        case "compressed and healed":
            small = compress(lora, budget=budget)
            healed = heal(
                encoder.load_base(task.base), small, lora, encoder.inputs(task.train, task.base)
            ).adapter
            return healed.file_bytes, healed.to_lora()
        case "calibrated" | "calibrated and healed":
            head = load_head(original(task, cache))
            model = encoder.Classifier(encoder.load_base(task.base), head)
            small = compress(lora, budget=budget, calibration=calibrated(task, lora, model, cache))
            if form == "calibrated and healed":
                inputs = encoder.inputs(task.train, task.base)
                small = heal(model, small, lora, inputs).adapter
            return small.file_bytes, small.to_lora()
        case "16-bit LoTR":
            lotr = convert(lora, budget=budget)
            return lotr.bytes, lotr.to_lora()
        case "16-bit terms":
            return _plain(lora, best_terms(lora, budget))
        case "int8":
            return _plain(lora, every_number(form, lora, absmax(8)))
        case "int4":
            return _plain(lora, every_number(form, lora, absmax(4)))
        case "NF4":
            return _plain(lora, every_number(form, lora, normal_float()))
        case "LoRAQuant 3":
            return _plain(lora, loraquant(lora, 0.9, 3))
        case "LoRAQuant 2":
            return _plain(lora, loraquant(lora, 0.9, 2))
    raise ValueError(form)


def calibrated(task: Task, lora: LoraAdapter, model: nn.Module, cache: Path) -> Calibration:
    """Moments on some texts of the task, without their labels, measured once."""
    path = cache / f"{task.stem}-calibration.safetensors"
    if not path.exists():
        calibrate(model, lora, encoder.inputs(task.train[:CALIBRATED], task.base)).save(path)
    return Calibration.load(path)


def _plain(lora: LoraAdapter, rival: Rival) -> tuple[float, LoraAdapter]:
    """A rival as a LoRA in float32, so that nothing beside its own rounding is lost."""
    modules = []
    for module, (b, a) in zip(lora.modules, rival.factors, strict=True):
        if not b.shape[1]:
            b, a = np.zeros((module.shape[0], 1)), np.zeros((1, module.shape[1]))
        modules.append(LoraModule(module.name, b, a, module.embedding))
    return rival.bytes, LoraAdapter(tuple(modules), lora.config, np.dtype("float32"))


class Scorer:
    """The test rows of a task, scored with its head through an adapter on disk."""

    def __init__(
        self, source: Path, rows: list[list[int]], labels: np.ndarray, base: str | None = None
    ) -> None:
        self.source, self.rows, self.labels, self.base = source, rows, labels, base
        self.head = load_head(source)

    @classmethod
    def of(cls, source: Path, task: Task) -> Scorer:
        """The rows of a task's test."""
        texts, labels = zip(*task.test, strict=True)
        return cls(source, encoder.tokens(texts, task.base), np.array(labels), task.base)

    @cached_property
    def before(self) -> np.ndarray:
        """Logits through the adapter as it was trained."""
        lora = load(self.source)
        assert isinstance(lora, LoraAdapter)
        return self.outputs(lora)

    def outputs(self, lora: LoraAdapter) -> np.ndarray:
        """Logits, rows × classes."""
        with tempfile.TemporaryDirectory() as scratch:
            lora.save(Path(scratch) / "lora")
            base = encoder.load_base(self.base)
            model = PeftModel.from_pretrained(base, Path(scratch) / "lora")
            return encoder.logits(model, self.head, self.rows).numpy()

    def score(self, lora: LoraAdapter) -> dict[str, Any]:
        """Accuracy, its difference from the original's, and the divergence from its outputs."""
        found = self.outputs(lora)
        lost = right(found, self.labels) - right(self.before, self.labels)
        apart = divergence(self.before, found)
        return self.accuracy(found) | {
            "difference": round(float(lost.mean()), 5),
            "difference_interval": [round(x, 5) for x in interval(lost)],
            "kl": round(float(apart.mean()), 6),
            "kl_interval": [round(x, 6) for x in interval(apart)],
        }

    def frozen(self, task: Task) -> dict[str, Any]:
        """A head on the frozen encoder: where fine-tuning starts."""
        base = encoder.load_base(self.base)
        texts, labels = zip(*task.train, strict=True)
        vectors = encoder.features(base, encoder.tokens(texts, self.base))
        head = encoder.probe(vectors, labels, task.classes)
        return self.accuracy(encoder.logits(base, head, self.rows).numpy())

    def accuracy(self, found: np.ndarray) -> dict[str, Any]:
        """Share of the rows that are told rightly, and which."""
        told = right(found, self.labels)
        return {
            "rows": len(told),
            "accuracy": round(float(told.mean()), 5),
            "right": packed(told),
        }
