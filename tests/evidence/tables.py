"""The tables of the results page, made of the recorded cells alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.evidence.measures import DRAWS, unpacked

Cell = dict[str, Any]

FIRST = (
    *("frozen", "LoRA, as trained", "compressed", "compressed and healed"),
    *("calibrated", "calibrated and healed"),
)
"""Forms that come first in a table; others follow as they were run."""


def read(path: Path) -> list[Cell]:
    """The cells that have been run, a JSON line each."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def differences(cells: Iterable[Cell], others: dict[str, Cell]) -> tuple[float, float, float]:
    """Mean over tasks of the accuracy's difference from others', and its 95 % interval.

    A paired bootstrap: the rows of every task are drawn anew, the same for both; the interval is
    that of the mean over these tasks, not over tasks that were not looked at.
    """
    rng = np.random.default_rng(0)
    means, drawn = [], []
    for cell in cells:
        count = cell["rows"]
        lost = unpacked(cell["right"], count) - unpacked(others[cell["task"]]["right"], count)
        means.append(lost.mean())
        drawn.append(lost[rng.integers(count, size=(DRAWS, count))].mean(1))
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return float(np.mean(means)), float(low), float(high)


def finished(cells: list[Cell]) -> list[Cell]:
    """The cells of those tasks for which every form that any task has was run."""
    kinds = {(c["form"], c["ratio"]) for c in cells}
    names = dict.fromkeys(c["task"] for c in cells)
    done = {n for n in names if {(c["form"], c["ratio"]) for c in cells if c["task"] == n} == kinds}
    return [c for c in cells if c["task"] in done]


def after_table(cells: list[Cell]) -> list[str]:
    """A line a form and size: means over all tasks that are finished."""
    cells = finished(cells)
    before = {c["task"]: c for c in cells if c["form"] == "LoRA, as trained"}
    lines = [
        "| form | smaller by | relative error | KL, nats | accuracy | difference, points |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    kinds = list(dict.fromkeys((c["form"], c["ratio"]) for c in cells))
    kinds.sort(key=lambda kind: FIRST.index(kind[0]) if kind[0] in FIRST else len(FIRST))
    for form, ratio in kinds:
        some = [c for c in cells if (c["form"], c["ratio"]) == (form, ratio)]
        if any("refused" in c for c in some):
            continue
        accuracy = np.mean([c["accuracy"] for c in some])
        mean, low, high = (100 * x for x in differences(some, before))
        apart = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        if form == "frozen":
            lines.append(f"| nothing trained but a head | | | | {accuracy:.3f} | {apart} |")
            continue
        smaller = np.mean([c["source_bytes"] / c["bytes"] for c in some])
        error, kl = (np.mean([c[key] for c in some]) for key in ("error", "kl"))
        lines.append(
            f"| {form} | {smaller:.1f} × | {error:.3f} | {kl:.4f} | {accuracy:.3f} | {apart} |"
        )
    return lines


def short_table(cells: list[Cell]) -> list[str]:
    """The lines of `after_table` that the README has."""
    lines = after_table(cells)
    wanted = (*FIRST[1:], "16-bit terms")
    return [*lines[:2], *(line for line in lines[2:] if line.split(" | ")[0][2:] in wanted)]


def tasks_table(cells: list[Cell], ratios: tuple[int, ...] = (8, 16, 32, 64)) -> list[str]:
    """A line a finished task: accuracy as trained, and compressed."""
    cells = finished(cells)
    names = list(dict.fromkeys(c["task"] for c in cells))
    found = {(c["task"], c["form"], c["ratio"]): c for c in cells}
    head = ["task", "rows", "frozen", "LoRA", *(f"{ratio} ×" for ratio in ratios)]
    lines = [" | ".join(["", *head, ""]).strip(), "| --- " * len(head) + "|"]
    for name in names:
        row = found[name, "frozen", 0]
        forms = [("frozen", 0), ("LoRA, as trained", 1), *(("compressed", r) for r in ratios)]
        scores = [f"{found[name, form, ratio]['accuracy']:.3f}" for form, ratio in forms]
        lines.append(" | ".join(["", name, f"{row['rows']:,}", *scores, ""]).strip())
    return lines


BASELINE = "LoRA 1"
"""What methods of training are compared with."""


Runs = dict[tuple[str, int], Cell]
"""The cells of one method, by task and seed; such a pair is a task of its own to `differences`."""


def runs_by_method(cells: list[Cell]) -> dict[str, Runs]:
    """The runs of every method, without those that tuned it."""
    found: dict[str, Runs] = {}
    for cell in cells:
        if cell["seed"] != "tuning":
            pair = cell["task"], cell["seed"]
            found.setdefault(cell["method"], {})[pair] = cell | {"task": pair}
    return found


def repeated(cells: list[Cell], baseline: str = BASELINE) -> list[Cell]:
    """The cells of the methods that have every task and seed that the baseline has."""
    by_method = runs_by_method(cells)
    wanted = set(by_method.get(baseline, {}))
    return [cell for cell in cells if wanted <= set(by_method.get(cell["method"], {}))]


def training_table(cells: list[Cell], baseline: str = BASELINE) -> list[str]:
    """A line a method by its trained numbers: means over the tasks and seeds that all have."""
    by_method = runs_by_method(cells)
    shared = set.intersection(*(set(own) for own in by_method.values())) if by_method else set()
    lines = [
        f"| method | trained numbers | rate | accuracy | from {baseline}, points |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in sorted(by_method, key=lambda m: next(iter(by_method[m].values()))["numbers"]):
        some = [by_method[name][key] for key in sorted(shared)]
        if not some:
            continue
        accuracy = np.mean([cell["accuracy"] for cell in some])
        others = {key: by_method[baseline][key] for key in shared}
        mean, low, high = (100 * x for x in differences(some, others))
        lines.append(
            f"| {name} | {some[0]['numbers']:,} | {some[0]['rate']:g} | {accuracy:.3f} | "
            f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) |"
        )
    return lines


def deep_tables(cells: list[Cell]) -> list[str]:
    """What MPNet keeps, as `after_table` has it; and a line a method and number of layers."""
    kept = [cell for cell in cells if cell["layers"] == ""]
    columns = ("encoder", "layers adapted", "method", "trained numbers", "rate", "accuracy")
    lines = [
        *after_table(kept),
        "",
        "| " + " | ".join((*columns, f"from {BASELINE}, points")) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    runs: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in cells:
        if cell["layers"] not in ("", "tuning"):
            runs.setdefault((cell["encoder"], cell["layers"], cell["form"]), []).append(cell)
    for (name, layers, method), some in runs.items():
        others = {cell["task"]: cell for cell in runs[name, layers, BASELINE]}
        mean, low, high = (100 * x for x in differences(some, others))
        accuracy = np.mean([cell["accuracy"] for cell in some])
        lines.append(
            f"| {name} | {layers} | {method} | {some[0]['numbers']:,} | {some[0]['rate']:g} | "
            f"{accuracy:.3f} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) |"
        )
    return lines
