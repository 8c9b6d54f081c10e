"""Where the processor time of ``lotr compress`` goes, on an adapter of the shape of 8 B.

``python -m tests.bench.profiled`` makes the adapter, compresses it to a tenth in this process,
group after group on one thread, and prints the share of every stage in Markdown.
"""

from __future__ import annotations

import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import pytest

import lotrtensor as lt
from lotrtensor.core.threads import one_by_one
from tests.bench.shaped import EIGHT, planted

STAGES = {
    "reading": ("loading.py", "load"),
    "decomposing the groups": ("_compression_job.py", "decomposed"),
    "predicting sizes and errors": ("stack.py", "predictions"),
    "rounding": ("stack.py", "quantise"),
    "codes into bytes": ("compressed.py", "code_groups"),
}
"""The function of each stage, by file and name; rounding looks up predictions that are there."""


def main() -> None:
    """Profile once, and print the table."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lotrtensor.verbs._compression_job.side_by_side", one_by_one)
        source = Path(scratch) / "lora"
        planted(EIGHT).save(source)
        profile = cProfile.Profile(time.process_time)
        profile.runcall(job, source, Path(scratch) / "out")
    stats = pstats.Stats(profile)
    total = stats.total_tt  # type: ignore[attr-defined]
    found = {stage: taken(stats, *place) for stage, place in STAGES.items()}
    found["everything else"] = total - sum(found.values())
    print("| stage | share |\n| --- | --- |")
    for stage, seconds in found.items():
        print(f"| {stage} | {seconds / total:.0%} |")


def job(source: Path, out: Path) -> None:
    """What the command does but for its start and its table."""
    lt.compress(lt.load(source), budget="10%").save(out)


def taken(stats: pstats.Stats, file: str, name: str) -> float:
    """Seconds in a function and all that it calls."""
    functions = stats.stats.items()  # type: ignore[attr-defined]
    return sum(
        cumulative
        for (path, _, own), (_, _, _, cumulative, _) in functions
        if own == name and Path(path).name == file
    )


if __name__ == "__main__":
    main()
