"""From the lines of a run to the tables of the page."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXCLUSIONS = Path(__file__).with_name("exclusions.toml")
COUNTS = ("passed", "excluded", "skipped", "failed")


@dataclass(frozen=True)
class Exclusion:
    """Failures that are no defects: which tests, how they fail, and why that is right."""

    tests: str
    failure: str
    reason: str

    def covers(self, test: str, message: str) -> bool:
        """Whether a test of this name failed in just the way that is expected of it."""
        return fnmatch.fnmatchcase(_plain(test), _plain(self.tests)) and bool(
            re.search(self.failure, message, re.DOTALL)
        )


def _plain(pattern: str) -> str:
    """Brackets belong to pytest's names, and are not meant as sets of characters."""
    return pattern.replace("[", "(").replace("]", ")")


def read_exclusions() -> list[Exclusion]:
    """Return the exclusions in the order of the file."""
    found = tomllib.loads(EXCLUSIONS.read_text("utf-8"))
    return [Exclusion(**record) for record in found["exclusion"]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return what became of every test; the last line counts where a run was taken up again."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return list({line["test"]: line for line in lines}.values())


def summarize(
    runs: Mapping[str, Mapping[str, list[dict[str, Any]]]], versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return counts a file, every exclusion and every reason for a skip.

    Parameters
    ----------
    runs : mapping
        Lines of the run by method, ``"lotr"`` or ``"lora"``, and by file.
    versions : mapping
        Versions of the packages.
    """
    exclusions = read_exclusions()
    used: Counter[Exclusion] = Counter()
    skips: Counter[tuple[str, str]] = Counter()
    files, unexplained = [], []
    for file, lines in runs["lotr"].items():
        judged = [(line, *_judge(line, exclusions)) for line in lines]
        used.update(exclusion for _, _, exclusion in judged if exclusion is not None)
        skips.update(
            (_name(line["test"]), _first(line["message"]))
            for line, outcome, _ in judged
            if outcome == "skipped"
        )
        unexplained += [
            {"test": line["test"], "message": line["message"]}
            for line, outcome, _ in judged
            if outcome == "failed"
        ]
        control = [_judge(line, exclusions)[0] for line in runs["lora"].get(file, ())]
        counts = {"file": file, **_count(outcome for _, outcome, _ in judged)}
        files.append({**counts, "control": _count(control)})
    return {
        "versions": dict(versions),
        "files": files,
        "exclusions": [{**vars(e), "count": used[e]} for e in exclusions],
        "skips": [
            {"test": test, "reason": reason, "count": count}
            for (test, reason), count in sorted(skips.items())
        ],
        "unexplained": unexplained,
    }


def _judge(
    line: Mapping[str, Any], exclusions: Iterable[Exclusion]
) -> tuple[str, Exclusion | None]:
    if line["outcome"] != "failed":
        return line["outcome"], None
    covering = (e for e in exclusions if e.covers(line["test"], line["message"]))
    found = next(covering, None)
    return ("failed" if found is None else "excluded"), found


def _count(outcomes: Iterable[str]) -> dict[str, int]:
    counts = Counter(outcomes)
    return {name: counts[name] for name in COUNTS}


def _name(test: str) -> str:
    return test.partition("[")[0].rpartition("::")[2]


def _first(message: str) -> str:
    return message.removeprefix("Skipped: ").splitlines()[0]


def complaints(summary: Mapping[str, Any]) -> list[str]:
    """Return what keeps a run from being clean: one sentence each."""
    found = [f"{u['test']} failed: {_first(u['message'])[:200]}" for u in summary["unexplained"]]
    found += [
        f"the exclusion of {e['tests']} covers no failure any more; take it out"
        for e in summary["exclusions"]
        if not e["count"]
    ]
    found += [
        f"{f['control']['failed']} tests of LoRA itself failed in {f['file']}: the stand-in models "
        "or the plugin are at fault"
        for f in summary["files"]
        if f["control"]["failed"]
    ]
    return found


def tables(summary: Mapping[str, Any]) -> str:
    """Return the tables of the page."""
    files = summary["files"]
    rows = [[f["file"], *_cells(f), *_cells(f["control"])] for f in files]
    sums = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    counts = _table(
        ["file", *COUNTS, *(f"LoRA {name}" for name in COUNTS)], [*rows, ["all", *sums]]
    )
    excluded = _table(
        ["tests", "fails with", "count", "why"],
        (
            [f"`{e['tests']}`", f"`{e['failure']}`".replace("|", "\\|"), e["count"], e["reason"]]
            for e in summary["exclusions"]
        ),
    )
    skipped = _table(
        ["test", "reason that PEFT's test gives", "count"],
        ([f"`{s['test']}`", s["reason"], s["count"]] for s in summary["skips"]),
    )
    return "\n\n".join(
        ["## Counts", counts, "## Exclusions", excluded, "## Skipped by PEFT's tests", skipped]
    )


def _cells(counts: Mapping[str, int]) -> list[int]:
    return [counts[name] for name in COUNTS]


def _table(header: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
