"""Accuracy of the bundled adapter after compression: what a size costs on the task itself.

Every row is written as a LoRA, loaded with PEFT, and scored on the reviews that were not trained
on.  ``PYTHONPATH=. python examples/evidence.py`` prints a Markdown table and writes
``docs/evidence.json``; ``--data`` takes the data's archive where it has been fetched before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from train_demo_adapter import evaluate, load_base, load_examples, load_head

from lotrtensor import LoraAdapter, compare, compress, convert, load
from lotrtensor.adapters.modules import LoraModule
from tests.bench.rivals import Rival, absmax, best_terms, every_number, loraquant, normal_float

COMPRESSED = (4, 8, 16, 24, 32, 48, 64)
"""How many times smaller the compressed adapters are."""

SIXTEEN_BITS = (4, 8, 16, 24, 32)
"""The same of 16-bit LoTR and 16-bit truncated LoRA."""


def main() -> None:
    """Score every representation at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of float additions depends on it
    _, test = load_examples(arguments.data)
    source = Path(str(files("lotrtensor") / "data" / "amazon-sentiment"))
    lora = load(source)
    assert isinstance(lora, LoraAdapter)
    document: dict[str, Any] = {"source_bytes": lora.bytes, "test_rows": len(test), "rows": []}
    for name, size, made in representations(lora):
        row = {"name": name, "bytes": size, "error": compare(lora, made).relative_error}
        row["accuracy"] = accuracy(made, source, test)
        document["rows"].append(row)
        print(json.dumps(row), flush=True)
        arguments.out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    print("\n".join(accuracy_table(document)))


def representations(lora: LoraAdapter) -> Iterator[tuple[str, float, LoraAdapter]]:
    """Name, bytes, and the LoRA that a server would be given."""
    yield "LoRA, as trained", lora.bytes, lora
    for ratio in COMPRESSED:
        compressed = compress(lora, budget=lora.bytes // ratio)
        yield "compressed", compressed.file_bytes, compressed.to_lora()
    for ratio in SIXTEEN_BITS:
        budget = lora.bytes // ratio
        yield _named(lora, best_terms(lora, budget))
        shared = convert(lora, budget=budget)
        yield "LoTR by type", shared.bytes, shared.to_lora()
    yield _named(lora, every_number("int8", lora, absmax(8)))
    yield _named(lora, every_number("int4", lora, absmax(4)))
    yield _named(lora, every_number("NF4", lora, normal_float()))
    for bits, ratio in ((3, 0.9), (2, 0.9), (2, 0.8)):
        yield _named(lora, loraquant(lora, ratio, bits))


def _named(lora: LoraAdapter, rival: Rival) -> tuple[str, float, LoraAdapter]:
    """A rival as a LoRA in float32, so that nothing beside its own rounding is lost."""
    modules = []
    for module, (b, a) in zip(lora.modules, rival.factors, strict=True):
        if not b.shape[1]:
            b, a = np.zeros((module.shape[0], 1)), np.zeros((1, module.shape[1]))
        modules.append(LoraModule(module.name, b, a, module.embedding))
    return rival.name, rival.bytes, LoraAdapter(tuple(modules), lora.config, np.dtype("float32"))


def accuracy(lora: LoraAdapter, source: Path, test: list) -> float:
    """Share of the sentences that are told rightly, through a LoRA on disk."""
    with tempfile.TemporaryDirectory() as scratch:
        lora.save(Path(scratch) / "lora")
        base, tokenizer = load_base()
        model = PeftModel.from_pretrained(base, Path(scratch) / "lora")
        return evaluate(model, tokenizer, load_head(source), test)


def accuracy_table(document: dict[str, Any]) -> list[str]:
    """Lines of the README's table of accuracies."""
    lines = ["| | smaller by | relative error | accuracy |", "| --- | --- | --- | --- |"]
    for row in document["rows"]:
        smaller = document["source_bytes"] / row["bytes"]
        lines.append(
            f"| {row['name']} | {smaller:.1f} × | {row['error']:.3f} | {row['accuracy']:.3f} |"
        )
    return lines


if __name__ == "__main__":
    main()
