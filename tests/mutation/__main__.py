"""Change the core in one place after another, and see whether a test fails.

``python -m tests.mutation`` (``pip install '.[mutation]'``) draws places of ``lotrtensor/core``
where cosmic-ray knows a change, and one change of each, runs on each the tests that reach the
changed line, as coverage tells, and writes the share that was killed and all that survived into
``docs/mutation.json``, where a verdict on each that was written by hand is kept: many change no
result, or only the time it takes. Stopped, it goes on where it was. Annotations and `fit.tuning`,
whose numbers change time and not results, are left out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from xml.etree import ElementTree

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import apply_mutation, mutate_code
from cosmic_ray.plugins import get_operator
from coverage import CoverageData

CORE = Path("lotrtensor/core")
LEFT_OUT = {CORE / "fit" / "tuning.py"}
ROOT = Path(__file__).parents[2]
BUDGET = 45.0
"""Seconds of the tests that are run on a change: of a file named like the module, then the rest."""

SLOWEST = 10.0
"""Times as long as without the change, and a minute: then a loop has become endless."""

NOT_COPIED = (".git", ".venv*", "_build", "__pycache__", ".*_cache", ".hypothesis")


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
    order = sorted(places)
    rng.shuffle(order)  # so that a larger sample holds the smaller one
    return [rng.choice(places[place]) for place in order][:count]


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


class Recording(NamedTuple):
    """Which tests reach a line of a file, and the seconds of every test that passed."""

    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]

    def chosen(self, mutation: Mutation) -> list[str]:
        """Tests of a line, quick ones first, those of a file named like the module before all."""
        stem = Path(mutation.file).stem
        lines = self.lines.get(mutation.file, {})
        # A statement of several lines may be noted by its first.
        noted = max((line for line in lines if line <= mutation.line), default=0)
        # What runs when the module is imported belongs to no test, and so to all of the module.
        reaching = lines.get(noted) or sorted(set(itertools.chain(*lines.values())))
        known = [name for name in reaching if name in self.seconds]
        known.sort(key=lambda name: (stem not in name.partition("::")[0], self.seconds[name], name))
        totals = itertools.accumulate(self.seconds[name] for name in known)
        return [name for name, total in zip(known, totals, strict=True)
                if total < BUDGET or name == known[0]]  # fmt: skip


def recorded(folder: Path, work: Path, tests: Sequence[str]) -> Recording:
    """Run the tests once in a copy without a change, and read what was noted."""
    data, report = work / "contexts", work / "passed.xml"
    if not report.exists():
        words = ["-n", "2", "--cov", "--cov-context=test", "--cov-report=",
                 f"--junitxml={work / 'report.xml'}", *tests]  # fmt: skip
        print(pytest(words, folder, COVERAGE_FILE=str(data))[1][-2000:], flush=True)
        (work / "report.xml").replace(report)
    coverage = CoverageData(str(data))
    coverage.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for name in coverage.measured_files():
        if (path := Path(name)).is_relative_to(folder / CORE):
            lines[str(path.relative_to(folder))] = {
                line: sorted({context.rpartition("|")[0] for context in own if context})
                for line, own in coverage.contexts_by_lineno(name).items()
            }
    cases = [case for case in ElementTree.parse(report).iter("testcase") if not len(case)]
    return Recording(lines, {identity(case): float(case.get("time", 0)) for case in cases})


def identity(case: ElementTree.Element) -> str:
    """What pytest calls a test of its report: ``tests/test_x.py::test_y[z]``."""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def pytest(
    words: Sequence[str], folder: Path, limit: float | None = None, **told: str
) -> tuple[int, str]:
    """pytest's exit code, and what it says."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    told |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words],
        cwd=folder,
        env=os.environ | told,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def outcome(mutation: Mutation, recording: Recording, folder: Path) -> str:
    """Whether a mutation is killed, survives, is not reached, or could not be tried."""
    tests = recording.chosen(mutation)
    if not tests:
        return "not reached"
    path = folder / mutation.file
    before = path.read_text("utf-8")
    limit = 60 + SLOWEST * sum(recording.seconds[name] for name in tests)
    try:
        operator = get_operator(mutation.operator)(**mutation.arguments)
        apply_mutation(path, operator, mutation.occurrence)
        code, said = pytest(["-x", "-p", "no:xdist", *tests], folder, limit)
        if "ERROR: not found" in said:
            return "not tried: pytest finds a test no more"
        path.write_text(before, "utf-8")
        failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+::.+?)(?: - .*)?$", said, re.M)
        if failed and pytest(["-p", "no:xdist", failed[0]], folder, limit)[0]:
            return f"not tried: {failed[0]} fails without the change too"
        return "killed" if code else "survived"
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        path.write_text(before, "utf-8")


def difference(mutation: Mutation) -> str:
    """The changed line, before and after."""
    before = Path(mutation.file).read_text("utf-8")
    operator = get_operator(mutation.operator)(**mutation.arguments)
    after = mutate_code(before, operator, mutation.occurrence) or before
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    return next((f"{a.strip()}  →  {b.strip()}" for a, b in pairs if a != b), "")


IMMATERIAL = ("equal", "time")
"""How the verdict begins on what changes no result, or only how long it takes to come."""


def verdicts(path: Path) -> dict[tuple[str, int, str], str]:
    """What was said by hand of changes that survived, by file, line and change."""
    known = json.loads(path.read_text("utf-8"))["left"] if path.exists() else []
    return {(own["file"], own["line"], own["change"]): own.get("verdict", "") for own in known}


def commit() -> str:
    """The commit whose lines are told of."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


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
    every = list(mutations())
    log = work / "outcomes.jsonl"
    known = dict(map(json.loads, log.read_text().splitlines())) if log.exists() else {}
    folders: SimpleQueue[Path] = SimpleQueue()
    for i in range(options.processes):
        folder = work / f"copy-{i}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        folders.put(folder)
    # Lines are noted by path: always that of the first copy, however many there are.
    recording = recorded(work / "copy-0", work, options.tests)

    def run(mutation: Mutation) -> tuple[Mutation, str]:
        key = json.dumps(mutation)
        if key not in known:
            folder = folders.get()
            known[key] = outcome(mutation, recording, folder)
            folders.put(folder)
            with log.open("a") as file:
                file.write(json.dumps([key, known[key]]) + "\n")
            print(known[key], mutation.file, mutation.line, difference(mutation), flush=True)
        return mutation, known[key]

    with ThreadPoolExecutor(options.processes) as pool:
        found = list(pool.map(run, drawn(every, options.sample, options.seed)))
    tried = [(own, what) for own, what in found if not what.startswith("not tried")]
    killed = sum(what == "killed" for _, what in tried)
    judged = verdicts(options.json)
    left = [
        {"file": m.file, "line": m.line, "outcome": what, "change": difference(m)}
        | {"verdict": judged.get((m.file, m.line, difference(m)), "")}
        for m, what in sorted(found, key=lambda pair: (pair[0].file, pair[0].line))
        if what != "killed"
    ]
    immaterial = sum(entry["verdict"].startswith(IMMATERIAL) for entry in left)
    document = {
        "command": f"python -m tests.mutation --sample {options.sample} --seed {options.seed}",
        "commit": commit(),
        "mutations": len(every),
        "sample": len(found),
        "tried": len(tried),
        "killed": killed,
        "immaterial": immaterial,
        "left": left,
    }
    options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    material = len(tried) - immaterial
    print(f"{killed} of {len(tried)} killed, of {material} material ({killed / material:.1%})")


if __name__ == "__main__":
    main()
