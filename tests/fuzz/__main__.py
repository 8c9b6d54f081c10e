"""Fuzz the readers: ``python -m tests.fuzz --runs 100000``, or ``--guided`` by coverage (atheris).

Every case has a number, which repeats it: ``--first 4711 --runs 1``. With ``--json`` the counts are
written to a file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path


def guided(runs: int) -> None:
    """Let libFuzzer look for cases that reach new code; it ends this process."""
    import atheris

    with atheris.instrument_imports(include=["lotrtensor"]):
        from tests.fuzz.runs import USED
        from tests.fuzz.target import attempt, workplace
    from tests.fuzz.mutate import mutate
    from tests.fuzz.seeds import seeds

    class Drawn:
        def __init__(self, data: bytes) -> None:
            self.provider = atheris.FuzzedDataProvider(data)

        def below(self, count: int) -> int:
            return int(self.provider.ConsumeIntInRange(0, count - 1))

    known = seeds()
    names = sorted(known)
    place = workplace()
    folder = place.__enter__()

    def case(data: bytes) -> None:
        choices = Drawn(data)
        files = mutate(known[names[choices.below(len(names))]], choices)
        attempt(files, folder, use=choices.below(USED) == 0)

    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=64", "-rss_limit_mb=4096"], case)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.guided:
        guided(options.runs)
        return 0
    from tests.fuzz.runs import share  # not before the guided run has instrumented the package

    start = time.time()
    each = -(-options.runs // options.processes)
    shares = [(options.first + i * each, each) for i in range(options.processes)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        found = pool.map(share, shares)
    counts = sum((counts for counts, _ in found), Counter())
    failures = [failure for _, some in found for failure in some]
    for failure in failures[:50]:
        print(failure)
    record = {
        "command": f"python -m tests.fuzz --first {options.first} --runs {each * len(shares)}",
        "runs": sum(counts.values()),
        **{kind: counts[kind] for kind in ("results", "refusals", "failures")},
        "seconds": round(time.time() - start),
        "processes": options.processes,
        "python": platform.python_version(),
        "numpy": version("numpy"),
    }
    print(json.dumps(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
