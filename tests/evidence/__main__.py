"""Run what has not been run yet, a JSON line a cell, and print the tables of what is done.

    python -m tests.evidence [after] [training] [deep] [--tasks amazon …] [--seeds 0 …]

Stopped at any time, the same command goes on where it was: a cell whose line stands in
``docs/evidence/PART.jsonl`` is not run again, and trained adapters stay in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from tests.evidence import after, deep, training
from tests.evidence.tables import (
    after_table,
    deep_tables,
    read,
    repeated,
    tasks_table,
    training_table,
)
from tests.evidence.tasks import TASKS, load_task

RESULTS = Path("docs/evidence")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lotrtensor-evidence"
KEYS = {
    "after": ("form", "ratio"),
    "training": ("method", "seed", "rate"),
    "deep": ("encoder", "form", "ratio", "layers"),
}
PARTS: dict[str, Any] = {"after": after.cells, "training": training.cells, "deep": deep.cells}


def main() -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    parser.add_argument(
        "--methods", nargs="+", choices=training.CONFIGS, default=list(training.CONFIGS),
        help="of training",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the order of float additions depends on it
    logging.disable_progress_bar()
    for folder in (options.cache, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        path = options.out / f"{part}.jsonl"
        for name in options.tasks:
            known = {
                tuple(str(row[key]) for key in KEYS[part])
                for row in read(path)
                if row["task"] == name
            }
            task = load_task(name, options.cache)
            asked = {"seeds": options.seeds, "methods": options.methods}
            more = asked if part == "training" else {}
            for cell in PARTS[part](task, options.cache, known, path, **more):
                line = json.dumps({"task": name} | cell)
                with path.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)
    cells = read(options.out / "after.jsonl")
    if "after" in options.parts and cells:
        print("\n".join([*after_table(cells), "", *tasks_table(cells)]))
    if "training" in options.parts:
        trained = read(options.out / "training.jsonl")
        every, several = training_table(trained), training_table(repeated(trained))
        print("\n".join(every if every == several else [*every, "", *several]))
    if "deep" in options.parts:
        print("\n".join(deep_tables(read(options.out / "deep.jsonl"))))


if __name__ == "__main__":
    main()
