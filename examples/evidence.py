"""Accuracy of the bundled adapter after compression: what a size costs on the task itself.

Every row is written as a LoRA, loaded with PEFT, and scored on the reviews that were not trained
on.  ``python examples/evidence.py`` prints a Markdown table and writes ``docs/evidence.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from peft import PeftModel
from train_demo_adapter import THREADS, evaluate, load_base, load_examples, load_head

from lotrtensor import LoraAdapter, LotrAdapter, RankError, compare, convert, load, truncate

SHARES = (50, 25, 12, 6)


def main() -> None:
    """Score every representation at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    _, test = load_examples(arguments.data)
    source = Path(str(files("lotrtensor") / "data" / "amazon-sentiment"))
    lora = load(source)
    assert isinstance(lora, LoraAdapter)
    rows = [score("LoRA, as trained", lora, source, test)]
    for share in SHARES:
        budget = f"{share}%"
        rows.append(score("LoTR by type", convert(lora, budget=budget), source, test))
        try:
            rows.append(score("truncated LoRA", truncate(lora, budget=budget), source, test))
        except RankError:
            continue  # a LoRA keeps rank 1 for every module, which is more than this
    arguments.out.write_text(json.dumps({"test_rows": len(test), "rows": rows}, indent=2) + "\n")
    print("| representation | smaller by | relative error | accuracy |\n| --- | --- | --- | --- |")
    for row in rows:
        smaller = lora.bytes / row["bytes"]
        print(f"| {row['name']} | {smaller:.1f} × | {row['error']:.3f} | {row['accuracy']:.3f} |")


def score(name: str, adapter: LoraAdapter | LotrAdapter, source: Path, test: list) -> dict:
    """Accuracy of one adapter, through a LoRA on disk."""
    lora = adapter.to_lora() if isinstance(adapter, LotrAdapter) else adapter
    with tempfile.TemporaryDirectory() as scratch:
        lora.save(Path(scratch) / "lora")
        base, tokenizer = load_base()
        model = PeftModel.from_pretrained(base, Path(scratch) / "lora")
        accuracy = evaluate(model, tokenizer, load_head(source), test)
    error = compare(load(source), adapter).relative_error
    return {"name": name, "bytes": adapter.bytes, "error": error, "accuracy": accuracy}


if __name__ == "__main__":
    main()
