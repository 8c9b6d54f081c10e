"""Pack a crowd of adapters: time, memory and bytes by their number, and those of 10,000.

``python -m tests.bench.crowd`` writes LoRAs in bfloat16 with a planted mean, a shared and a private
part in each, runs ``lotr pack`` on them in a process of its own, and prints wall time, processor
time, flops of the decompositions of single slices, peak memory and bytes for every number of
adapters; ``docs/crowd.json`` keeps them, and how many bytes are read where one adapter is opened
(on Linux, which counts them). They are of two layers of 4096 × 4096 at rank 8, and of
one layer of a model of 8 B parameters (all seven matrices) at rank 16, from which the last table
tells what 10,000 adapters of all 32 layers take. ``OMP_NUM_THREADS`` says how many threads it may
take: on a machine that others use, one.
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
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import lotrtensor as lt
from lotrtensor.adapters.modules import LoraModule

COMMON = 6
SHARED, OWN = 0.5, 0.25
"""Sizes of the shared and of the private part beside the mean, which is 1."""


class Model(NamedTuple):
    """Shapes of the modules, rank of the LoRAs, and numbers of adapters that are packed."""

    shapes: dict[str, tuple[int, int]]
    rank: int
    counts: tuple[int, ...]
    finer: float | None = None
    """Error at which the largest number is packed once more, so that adapters keep more."""


ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
MODELS = {
    "two of 4096 × 4096": Model(
        {f"model.layers.{k}.self_attn.q_proj": (4096, 4096) for k in range(2)},
        rank=8,
        counts=(50, 100, 200, 400, 1000),
        finer=0.1,
    ),
    "a layer of 8 B": Model(
        {
            f"{ATTENTION}.q_proj": (4096, 4096),
            f"{ATTENTION}.k_proj": (1024, 4096),
            f"{ATTENTION}.v_proj": (1024, 4096),
            f"{ATTENTION}.o_proj": (4096, 4096),
            f"{MLP}.gate_proj": (14336, 4096),
            f"{MLP}.up_proj": (14336, 4096),
            f"{MLP}.down_proj": (4096, 14336),
        },
        rank=16,
        counts=(32, 64, 128, 256),
    ),
}
LAYERS, CROWD, PROCESSORS = 32, 10_000, 8
"""What the last table is told of: layers of the model, adapters, processors of a machine."""


def planted(number: int, model: Model = MODELS["two of 4096 × 4096"]) -> lt.LoraAdapter:
    """One adapter of the crowd; all have the same mean and spaces."""
    common, rng = np.random.default_rng(0), np.random.default_rng(number + 1)
    modules = []
    for name, shape in model.shapes.items():
        left, right = (np.linalg.qr(common.normal(size=(side, COMMON)))[0] for side in shape)
        middle = np.eye(COMMON) + SHARED * rng.normal(size=(COMMON, COMMON)) / math.sqrt(COMMON)
        own = model.rank - COMMON
        sides = [rng.normal(size=(side, own)) / math.sqrt(side) for side in shape]
        b = np.hstack([left @ middle, OWN * math.sqrt(COMMON / own) * sides[0]])
        a = np.vstack([right.T, sides[1].T])
        b, a = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (b, a))
        modules.append(LoraModule(name, b, a))
    return lt.LoraAdapter(tuple(modules), {}, np.dtype(ml_dtypes.bfloat16))


PACK = """
import json, resource, sys
from concurrent.futures import ThreadPoolExecutor
from lotrtensor.core import slice_svd
from lotrtensor.packs._pack import pack

flops, svds = 0.0, slice_svd._svds

def counted(stack, members):
    global flops
    flops += sum(6.0 * sum(stack.shape[1:]) * stack.ranks[k] ** 2 for k in members)
    return svds(stack, members)

slice_svd._svds = counted
names, out, tolerance = json.loads(sys.argv[1])
with ThreadPoolExecutor(1) as one:
    pack(names, out, tolerance=tolerance, executor=one)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, flops]))
"""


def measure(folder: Path, count: int, tolerance: float) -> dict[str, Any]:
    """Pack the first adapters of a folder in a process of its own."""
    out = folder / f"pack-{count}-{tolerance}"
    names = [str(folder / f"user-{i}") for i in range(count)]
    command = [sys.executable, "-c", PACK, json.dumps([names, str(out), tolerance])]
    start = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    wall = time.perf_counter() - start
    seconds, peak, flops = json.loads(ran.stdout)
    found = lt.Pack(out)
    sources = sum((folder / f"user-{i}" / "adapter_model.safetensors").stat().st_size
                  for i in range(count))  # fmt: skip
    return {
        "adapters": count,
        "tolerance": tolerance,
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(seconds, 1),
        "gigaflops": round(flops / 1e9, 1),
        "peak_bytes": peak,
        "source_bytes": sources,
        "pack_bytes": found.bytes,
        "shared_bytes": found.shared_bytes,
        "largest_error": max(row.relative_error for row in found.rows),
        "one_bytes": round(sum(row.bytes for row in found.rows) / count),
        **opening(out),
    }


def opening(path: Path) -> dict[str, int]:
    """Bytes that are read of the index, of the bases, and of adapters, on the mean over them."""
    if not COUNTERS.is_file():
        return {}
    counts = [read_so_far()]
    found = lt.Pack(path)
    counts.append(read_so_far())
    _ = found.cells
    counts.append(read_so_far())
    for name in found.names:
        found.member(name)
    index, shared, own = (int(x) for x in np.diff([*counts, read_so_far()]))
    return {"index_read": index, "shared_read": shared, "one_read": round(own / len(found.names))}


COUNTERS = Path("/proc/self/io")


def read_so_far() -> int:
    """Bytes that the process has read from files."""
    return int(COUNTERS.read_text().split()[1])


def slope(rows: list[dict[str, Any]], field: str) -> float:
    """Exponent of a figure's growth with the number of adapters."""
    x = np.log([row["adapters"] for row in rows])
    return float(np.polyfit(x, np.log([row[field] for row in rows]), 1)[0])


def main() -> None:
    """Measure every number of adapters of every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", help="instead of those of the model")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tolerance", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=Path("docs/crowd.json"))
    arguments = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count()
    document: dict[str, Any] = {"threads": threads, "models": {}}
    for name in arguments.models:
        rows = []
        counts = arguments.counts or MODELS[name].counts
        with tempfile.TemporaryDirectory() as place:
            for i in range(max(counts)):
                planted(i, MODELS[name]).save(Path(place) / f"user-{i}")
            for count in counts:
                rows.append(measure(Path(place), count, arguments.tolerance))
                print(json.dumps(rows[-1]), flush=True)
            finer = MODELS[name].finer
            if finer and not arguments.counts:
                rows.append(measure(Path(place), count, finer))
                print(json.dumps(rows[-1]), flush=True)
        document["models"][name] = {"rows": rows}
        same = [row for row in rows if row["tolerance"] == arguments.tolerance]
        if len(same) > 1:
            slopes = {f: round(slope(same, f), 2) for f in ("cpu_seconds", "peak_bytes")}
            document["models"][name]["slopes"] = slopes
        arguments.out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    for name, model in document["models"].items():
        print("\n".join(["", name, "", *table(model["rows"])]))
    rows = document["models"].get("a layer of 8 B", {}).get("rows", [])
    if len(rows) > 1:
        print("\n".join(["", *crowd_table(rows)]))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    names = ("adapters", "error", "CPU seconds", "gigaflops", "peak, MiB", "originals, MB",
             "pack, MB", "shared, KB", "one, KB", "index read, KB", "one read, KB")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        numbers = (
            f"{row['adapters']:,}",
            f"{row['tolerance']}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['gigaflops']:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['source_bytes'] / 1e6:,.0f}",
            f"{row['pack_bytes'] / 1e6:.2f}",
            f"{row['shared_bytes'] / 1e3:,.0f}",
            f"{row['one_bytes'] / 1e3:.2f}",
            f"{row['index_read'] / 1e3:.1f}" if "index_read" in row else "",
            f"{row['one_read'] / 1e3:.2f}" if "one_read" in row else "",
        )
        lines.append(f"| {' | '.join(numbers)} |")
    return lines


def crowd_table(rows: list[dict[str, Any]]) -> list[str]:
    """What 10,000 adapters of 32 such layers take, on the line through the last two rows."""
    first, last = rows[-2:]

    def whole(field: str) -> float:
        rise = (last[field] - first[field]) / (last["adapters"] - first["adapters"])
        return LAYERS * (float(last[field]) + rise * (CROWD - last["adapters"]))

    seconds = whole("cpu_seconds")
    lines = ["| 10,000 adapters of 8 B, rank 16 | |", "| --- | --- |"]
    lines += [
        f"| originals, read once | {whole('source_bytes') / 1e9:,.0f} GB |",
        f"| build directory, in float32 | {2 * whole('source_bytes') / 1e9:,.0f} GB |",
        f"| pack | {whole('pack_bytes') / 1e9:.2f} GB |",
        f"| decompositions of single slices | {whole('gigaflops') / 1e6:,.1f} Pflop |",
        f"| memory of a worker | {last['peak_bytes'] / 2**30:.1f} GiB |",
        f"| time of one processor | {seconds / 3600:,.0f} hours |",
    ]
    for machines in (1, 8, 64):
        hours = seconds / 3600 / PROCESSORS / machines
        lines.append(f"| {machines} × {PROCESSORS} processors | {hours:,.1f} hours |")
    return lines


if __name__ == "__main__":
    main()
