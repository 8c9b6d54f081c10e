"""Score families of adapters on their tasks, in a pack, each alone and in other packages' forms.

``PYTHONPATH=examples python -m tests.evidence.families FOLDER`` takes the adapters of
``tests.bench.families``, writes a JSON line a family and form into
``docs/evidence/families.jsonl``, and prints a Markdown table. Of sixteen checkpoints of a run the
last four are scored. Stopped at any time, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import logging

from tests.bench.families import Made, families_of, lora, make
from tests.evidence import encoder
from tests.evidence.__main__ import CACHE, RESULTS
from tests.evidence.after import Scorer
from tests.evidence.tables import read
from tests.evidence.tasks import load_task

FORMS = (
    ("as trained", 0.0),
    *((form, tolerance) for tolerance in (0.5, 0.3) for form in ("pack", "each alone")),
    *(("vlora", components) for components in (1, 4)),
    *(("lorashare", components) for components in (8, 32)),
)
SCORED = {"run": 4}
"""Adapters of a family that are scored, its last ones; all where nothing is said."""


def main() -> None:
    """Score what has not been scored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS / "families.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the order of float additions depends on it
    logging.disable_progress_bar()
    known = {(row["family"], row["form"], row["setting"]) for row in read(options.out)}
    for family, paths in families_of(options.folder).items():
        scorers: list[Scorer] = []
        for form, setting in FORMS:
            if (family, form, setting) in known:
                continue
            made = Made(0, [], 0.0) if form == "as trained" else make(form, paths, setting)
            if made is None:
                continue
            if not scorers:
                scorers = [scorer(path, options.cache) for path in paths[-SCORED.get(family, 0) :]]
            row = {"family": family, "form": form, "setting": setting, "bytes": made.bytes}
            line = json.dumps(row | score(scorers, made))
            with options.out.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
    print("\n".join(table(read(options.out))))


def scorer(path: Path, cache: Path) -> Scorer:
    """The test rows of an adapter's task, none of which it was trained on."""
    family, _, name = path.name.partition("-")
    if family == "task":
        texts, labels = zip(*load_task(name, cache).test, strict=True)
    else:
        from train_demo_adapter import load_examples

        _, test = load_examples()
        texts, labels = zip(*((row.text, row.label) for row in test), strict=True)
    return Scorer(path, encoder.tokens(texts), np.array(labels))


def score(scorers: list[Scorer], made: Made) -> dict[str, Any]:
    """Means over adapters: accuracy, points lost, and divergence from what was trained."""
    rows = []
    last = made.adapters[-len(scorers) :] if made.adapters else [lora(x.source) for x in scorers]
    for own, found in zip(scorers, last, strict=True):
        rows.append(own.score(found))
    return {
        "adapters": len(rows),
        "accuracy": round(float(np.mean([row["accuracy"] for row in rows])), 5),
        "difference": round(float(np.mean([row["difference"] for row in rows])), 5),
        "least": min(row["difference"] for row in rows),
        "kl": round(float(np.mean([row["kl"] for row in rows])), 6),
    }


def points(difference: float) -> str:
    """Per cent lost, without a minus before zero."""
    return f"{round(-100 * difference, 1) + 0.0:.1f}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["| family | form | bytes | accuracy | points lost | by the worst | KL, nats |"]
    lines.append(f"|{' --- |' * 7}")
    for row in rows:
        form = row["form"] + (f", {row['setting']:g}" if row["setting"] else "")
        size = f"{row['bytes']:,}" if row["bytes"] else ""
        lines.append(
            f"| {row['family']} | {form} | {size} | {row['accuracy']:.3f} | "
            f"{points(row['difference'])} | {points(row['least'])} | {row['kl']:.4f} |"
        )
    return lines


if __name__ == "__main__":
    main()
