"""Pack a crowd of adapters: time, memory and bytes by their number.

``python -m tests.bench.crowd`` writes LoRAs of rank 8 of two layers of 4096 × 4096 in bfloat16, a
planted mean, a shared and a private part in each, runs ``lotr pack`` on them in a process of its
own, and prints wall time, processor time, peak memory and bytes for every number of adapters, and
what opening one of them reads; ``docs/crowd.json`` keeps them. ``OMP_NUM_THREADS`` says how many
threads it may take: on a machine that others use, one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import lotrtensor as lt
from lotrtensor.adapters.modules import LoraModule

COUNTS = (50, 100, 200, 400, 1000)
SIDE, RANK, COMMON = 4096, 8, 6
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
SHARED, OWN = 0.5, 0.25
"""Sizes of the shared and of the private part beside the mean, which is 1."""


def planted(number: int, side: int = SIDE) -> lt.LoraAdapter:
    """One adapter of the crowd; all have the same mean and spaces."""
    common, rng = np.random.default_rng(0), np.random.default_rng(number + 1)
    modules = []
    for name in MODULES:
        left, right = (np.linalg.qr(common.normal(size=(side, COMMON)))[0] for _ in range(2))
        middle = np.eye(COMMON) + SHARED * rng.normal(size=(COMMON, COMMON)) / math.sqrt(COMMON)
        own = RANK - COMMON
        sides = [rng.normal(size=(side, own)) / math.sqrt(side) for _ in range(2)]
        b = np.hstack([left @ middle, OWN * math.sqrt(COMMON / own) * sides[0]])
        a = np.vstack([right.T, sides[1].T])
        b, a = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (b, a))
        modules.append(LoraModule(name, b, a))
    return lt.LoraAdapter(tuple(modules), {}, np.dtype(ml_dtypes.bfloat16))


def measure(folder: Path, count: int, tolerance: float) -> dict[str, Any]:
    """Pack the first adapters of a folder in a process of its own."""
    out = folder / f"pack-{count}"
    names = [str(folder / f"user-{i}") for i in range(count)]
    code = (
        "import json, resource, sys; from lotrtensor.packs._pack import pack;"
        "from concurrent.futures import ThreadPoolExecutor\n"
        f"with ThreadPoolExecutor(1) as one: found = pack({names!r}, {str(out)!r},"
        f" tolerance={tolerance}, executor=one)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF);"
        "print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))"
    )
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - start
    seconds, peak = json.loads(ran.stdout)
    found = lt.Pack(out)
    sources = sum((folder / f"user-{i}" / "adapter_model.safetensors").stat().st_size
                  for i in range(count))  # fmt: skip
    return {
        "adapters": count,
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(seconds, 1),
        "peak_bytes": peak,
        "source_bytes": sources,
        "pack_bytes": found.bytes,
        "shared_bytes": found.shared_bytes,
        "largest_error": max(row.relative_error for row in found.rows),
        "one_bytes": round(sum(row.bytes for row in found.rows) / count),
    }


def slope(rows: list[dict[str, Any]], field: str) -> float:
    """Exponent of a figure's growth with the number of adapters."""
    x = np.log([row["adapters"] for row in rows])
    return float(np.polyfit(x, np.log([row[field] for row in rows]), 1)[0])


def main() -> None:
    """Measure every number of adapters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--tolerance", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=Path("docs/crowd.json"))
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for i in range(max(arguments.counts)):
            planted(i).save(Path(place) / f"user-{i}")
        for count in arguments.counts:
            rows.append(measure(Path(place), count, arguments.tolerance))
            print(json.dumps(rows[-1]), flush=True)
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count()
    document = {"threads": threads, "tolerance": arguments.tolerance, "rows": rows}
    if len(rows) > 1:
        document |= {f"slope_{f}": round(slope(rows, f), 2) for f in ("cpu_seconds", "peak_bytes")}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print("\n".join(table(document)))


def table(document: dict[str, Any]) -> list[str]:
    """The rows as Markdown."""
    names = ("adapters", "CPU seconds", "peak, MiB", "originals, MB", "pack, MB", "shared, KB",
             "one, KB")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in document["rows"]:
        numbers = (
            f"{row['adapters']:,}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['source_bytes'] / 1e6:,.0f}",
            f"{row['pack_bytes'] / 1e6:.2f}",
            f"{row['shared_bytes'] / 1e3:,.0f}",
            f"{row['one_bytes'] / 1e3:.1f}",
        )
        lines.append(f"| {' | '.join(numbers)} |")
    return lines


if __name__ == "__main__":
    main()
