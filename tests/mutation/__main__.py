"""Change the core in one place after another, and see whether a test fails.

``python -m tests.mutation`` (``pip install '.[mutation]'``) draws places of ``lotrtensor/core``
where cosmic-ray knows a change, and one change of each, runs on each the tests that reach the
changed line, as coverage tells, and writes the share that was killed and all that survived into
``docs/mutation.json``. Stopped, it goes on where it was. Annotations and `fit.tuning`, whose
numbers change time and not results, are left out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

CORE = Path("lotrtensor/core")
LEFT_OUT = {CORE / "fit" / "tuning.py"}
ROOT = Path(__file__).parents[2]
MOST = 150
"""Tests that are run on a change, at most: first those of a file named like the module."""

SLOWEST = 10.0
"""Times as long as without the change, and a minute: then a loop has become endless."""

FAILED = 1
"""pytest's exit code where a test failed; others say that it could not run them."""


class Mutation(NamedTuple):
    """The ``occurrence``-th place in a file where an operator applies, and its line."""

    file: str
    operator: str
    arguments: dict[str, Any]
    occurrence: int
    line: int
    column: int


def mutations() -> Iterator[Mutation]:
    """All mutations of the core but those that are left out."""
    from cosmic_ray.commands.init import _all_work_items

    for path in sorted(CORE.rglob("*.py")):
        if path in LEFT_OUT:
            continue
        skipped = annotated(path)
        for item in _all_work_items([path], {}):
            (spec,) = item.mutations
            line, column = spec.start_pos
            if not any(start <= (line, column) < end for start, end in skipped):
                args = dict(spec.operator_args)
                yield Mutation(str(path), spec.operator_name, args, spec.occurrence, line, column)


def drawn(every: Sequence[Mutation], count: int, seed: int) -> list[Mutation]:
    """Places at random, and one mutation of each: else a product would count twelve times."""
    places: dict[tuple[str, int, int], list[Mutation]] = {}
    for own in every:
        places.setdefault((own.file, own.line, own.column), []).append(own)
    rng = random.Random(seed)
    some = rng.sample(sorted(places), min(count, len(places)))
    return [rng.choice(places[place]) for place in some]


def annotated(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file are, as pairs of (line, column)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        own = [getattr(node, name, None) for name in ("annotation", "returns")]
        for part in own:
            if isinstance(part, ast.expr) and part.end_lineno and part.end_col_offset:
                start = (part.lineno, part.col_offset)
                found.append((start, (part.end_lineno, part.end_col_offset)))
    return found


def reached(data: Path) -> dict[str, dict[int, list[str]]]:
    """Tests that reach every line of every file of the core."""
    from coverage import CoverageData

    coverage = CoverageData(str(data))
    coverage.read()
    found: dict[str, dict[int, list[str]]] = {}
    for name in coverage.measured_files():
        path = Path(name)
        if path.is_relative_to(ROOT / CORE):
            lines = coverage.contexts_by_lineno(name)
            own = {line: sorted({c.rpartition("|")[0] for c in contexts if c})
                   for line, contexts in lines.items()}  # fmt: skip
            found[str(path.relative_to(ROOT))] = own
    return found


def record(data: Path, tests: Sequence[str]) -> None:
    """Run the tests once, and note which of them reaches which line."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--cov=lotrtensor/core",
             "--cov-context=test", "--cov-report=", *tests]  # fmt: skip
    environment = os.environ | {"COVERAGE_FILE": str(data)}
    subprocess.run(words, cwd=ROOT, env=environment, check=True)


def chosen(mutation: Mutation, tests: Sequence[str]) -> list[str]:
    """Some of the tests that reach a line, those whose files are named like the module first."""
    stem = Path(mutation.file).stem
    ranked = sorted(tests, key=lambda name: (stem not in name.partition("::")[0], name))
    return ranked[:MOST]


def ran(tests: Sequence[str], folder: Path, limit: float | None = None) -> tuple[int, float]:
    """pytest's exit code, and its seconds."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p",
             "no:xdist", "--no-header", *tests]  # fmt: skip
    told = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    found = subprocess.run(
        words, cwd=folder, env=os.environ | told, capture_output=True, timeout=limit, check=False
    )
    return found.returncode, time.monotonic() - started


def outcome(mutation: Mutation, tests: Sequence[str], folder: Path) -> str:
    """Whether a mutation is killed, survives, is not reached, or could not be tried."""
    from cosmic_ray.mutating import apply_mutation
    from cosmic_ray.plugins import get_operator

    if not tests:
        return "not reached"
    own = chosen(mutation, tests)
    code, seconds = ran(own, folder)
    if code:
        return f"not tried: without the change pytest ends with {code}"
    path = folder / mutation.file
    before = path.read_text("utf-8")
    try:
        operator = get_operator(mutation.operator)(**mutation.arguments)
        apply_mutation(path, operator, mutation.occurrence)
        code, _ = ran(own, folder, 60 + SLOWEST * seconds)
        return {0: "survived", FAILED: "killed"}.get(code, f"not tried: pytest ends with {code}")
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        path.write_text(before, "utf-8")


def difference(mutation: Mutation) -> str:
    """The changed line, before and after."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    before = Path(mutation.file).read_text("utf-8")
    operator = get_operator(mutation.operator)(**mutation.arguments)
    after = mutate_code(before, operator, mutation.occurrence) or before
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    return next((f"{a.strip()}  →  {b.strip()}" for a, b in pairs if a != b), "")


def state() -> str:
    """What tells this code and these tests from others."""
    found = hashlib.sha256()
    for path in sorted([*ROOT.glob("lotrtensor/**/*.py"), *ROOT.glob("tests/**/*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Draw, run, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mutation")
    parser.add_argument("--json", type=Path, default=Path("docs/mutation.json"))
    parser.add_argument("tests", nargs="*", default=["tests"])
    options = parser.parse_args()
    # Of what stood there before nothing holds once code or tests have changed.
    work = options.work / state()
    work.mkdir(parents=True, exist_ok=True)
    data = work / "contexts"
    if not data.exists():
        record(work / "recording", options.tests)
        (work / "recording").replace(data)
    tests = reached(data)
    every = list(mutations())
    log = work / "outcomes.jsonl"
    known = dict(map(json.loads, log.read_text().splitlines())) if log.exists() else {}
    folders: SimpleQueue[Path] = SimpleQueue()
    for i in range(options.processes):
        folder = work / f"copy-{i}"
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("lotrtensor", "tests", "docs", "examples"):
            shutil.copytree(ROOT / name, folder / name, symlinks=True)
        for name in ("pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / name, folder / name)
        folders.put(folder)

    def run(mutation: Mutation) -> tuple[Mutation, str]:
        key = json.dumps(mutation)
        if key not in known:
            folder = folders.get()
            own = tests.get(mutation.file, {}).get(mutation.line, [])
            known[key] = outcome(mutation, own, folder)
            folders.put(folder)
            with log.open("a") as file:
                file.write(json.dumps([key, known[key]]) + "\n")
            print(known[key], mutation.file, mutation.line, difference(mutation), flush=True)
        return mutation, known[key]

    with ThreadPoolExecutor(options.processes) as pool:
        found = list(pool.map(run, drawn(every, options.sample, options.seed)))
    tried = [(own, what) for own, what in found if not what.startswith("not tried")]
    killed = sum(what == "killed" for _, what in tried)
    left = [
        {"file": m.file, "line": m.line, "outcome": what, "change": difference(m)}
        for m, what in sorted(found)
        if what != "killed"
    ]
    document = {
        "command": f"python -m tests.mutation --sample {options.sample} --seed {options.seed}",
        "mutations": len(every),
        "sample": len(found),
        "tried": len(tried),
        "killed": killed,
        "left": left,
    }
    options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(f"{killed} of {len(tried)} killed ({killed / len(tried):.1%})")


if __name__ == "__main__":
    main()
