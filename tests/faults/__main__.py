"""Make every system call of every writing command fail once, and kill the process in it once.

``python -m tests.faults`` (``make faults``; needs strace) runs each command as often as it makes
calls that write, for each fault, and writes the counts into ``docs/faults.json``: afterwards the
old output stands or the new one, complete; an error is a sentence and leaves nothing beside it; and
the next run succeeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.jobs import JOBS
from tests.faults.sweep import FAULTS, OUT, copied, files, judge, output, points, prepared, run


def main() -> None:
    """Sweep over all commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(JOBS), help="commands, as in the table")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        raise SystemExit("strace is missing: apt-get install strace")
    with ThreadPoolExecutor(arguments.processes) as pool:
        rows = list(pool.map(sweep, arguments.only))
    total = sum(row["points"] for row in rows)
    print(f"\n{total} points, {sum(len(row['failures']) for row in rows)} failures")
    if arguments.json:
        document = {"command": "python -m tests.faults", "points": total, "commands": rows}
        arguments.json.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def sweep(name: str) -> dict[str, Any]:
    """All points of one command."""
    job = JOBS[name]
    with tempfile.TemporaryDirectory() as place:
        template = prepared(job, Path(place) / "template")
        folder = copied(template, Path(place) / "run")
        old = output(folder / OUT)
        plain = run(job, folder)
        new = files(folder / OUT)
        assert plain.code == 0 and new is not None and new != old, plain.said
        faults, failures = Counter[str](), []
        for point in points(plain.calls):
            copied(template, folder)
            wrong = judge(job, folder, point, old, new)
            faults[point.fault] += 1
            if wrong:
                failures.append({**point._asdict(), "what": wrong})
                print(f"{name}: {point}: {wrong}", flush=True)
    found = {fault: faults[fault] for fault in FAULTS}
    print(f"{name}: {sum(found.values())} points, {len(failures)} failures", flush=True)
    return {"command": name, "points": sum(found.values()), **found, "failures": failures}


if __name__ == "__main__":
    main()
