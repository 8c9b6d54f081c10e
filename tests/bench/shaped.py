"""Compress an adapter of the shape that a model of eight billion parameters has: time and memory.

``python -m tests.bench.shaped`` makes a LoRA for 32 layers of seven projections (224 modules, rank
16, bfloat16, 84 MB), writes it, runs ``lotr compress`` at a tenth of its size in a process of its
own, and prints wall time, processor time, peak memory and the error; ``docs/shaped.json`` keeps
them. ``OMP_NUM_THREADS`` says how many threads it may take: on a machine that others use, one.

The factors are planted: singular values σ_j of a module fall as 1 / j, about what trained adapters
have; a share of the left and right directions is common to a kind of module, the others are random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lotrtensor import Calibration, LoraAdapter, ModuleMoments, Moment
from lotrtensor.adapters.modules import LoraModule

COMMON, SHARED = 8, 0.3
"""Directions of the space common to a kind, and the share of a direction's squared length in it."""


class Shape(NamedTuple):
    """Layers of a model, rank of the LoRA, and sides of the projections."""

    layers: int
    rank: int
    hidden: int
    keys: int
    inner: int

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """(m, n) of every projection of a layer."""
        hidden, keys, inner = self.hidden, self.keys, self.inner
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }


EIGHT = Shape(32, 16, 4096, 1024, 14336)
SEVENTY = Shape(80, 64, 8192, 1024, 28672)
"""Models of eight and of seventy billion parameters."""


def planted(shape: Shape = EIGHT, seed: int = 0) -> LoraAdapter:
    """The adapter."""
    rng, rank = np.random.default_rng(seed), shape.rank
    modules = []
    for kind, sides in shape.kinds.items():
        spaces = [_orthonormal(rng, side, COMMON) for side in sides]
        for layer in range(shape.layers):
            left, right = (_directions(rng, space, rank) for space in spaces)
            values = rng.lognormal(0.0, 0.3) / np.arange(1, rank + 1)
            mix = np.linalg.qr(rng.normal(size=(rank, rank)))[0]
            root = np.sqrt(values)
            b, a = (left * root) @ mix, mix.T @ (right * root).T
            b, a = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (b, a))
            modules.append(LoraModule(f"model.layers.{layer}.{kind}", b, a))
    modules.sort(key=lambda module: int(module.name.split(".")[2]))
    return LoraAdapter(tuple(modules), {}, np.dtype(ml_dtypes.bfloat16))


def calibrated(adapter: LoraAdapter, rank: int = 64) -> Calibration:
    """Moments as a calibration of the adapter has: eigenvalues fall as 1 / j, inputs are shared."""
    rng = np.random.default_rng(0)
    known: dict[str, Moment] = {}

    def moment(name: str, size: int) -> Moment:
        if name not in known:
            factor = rng.standard_normal((rank, size), np.float32) / np.sqrt(size)
            factor /= np.sqrt(np.arange(1, rank + 1, dtype=np.float32))[:, None]
            known[name] = Moment(factor, 1.5 * float(np.sum(factor**2)))
        return known[name]

    modules = {}
    for module in adapter.modules:
        (m, n), (parent, _, kind) = module.shape, module.name.rpartition(".")
        norm = float(np.sqrt(np.sum((module.B.T @ module.B) * (module.A @ module.A.T))))
        inputs = moment(f"{parent}.{INPUTS.get(kind, kind)}", n)
        modules[module.name] = ModuleMoments(inputs, moment(f"{module.name}, outputs", m), norm)
    return Calibration(modules, places=100_000)


INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Projections that see the input of another one."""


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    found: np.ndarray = np.linalg.qr(rng.normal(size=(rows, columns)))[0]
    return found


def _directions(rng: np.random.Generator, common: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal directions, partly in a common space."""
    own = rng.normal(size=(common.shape[0], rank)) / np.sqrt(common.shape[0])
    inside = common @ rng.normal(size=(common.shape[1], rank)) / np.sqrt(common.shape[1])
    found: np.ndarray = np.linalg.qr(np.sqrt(1 - SHARED) * own + np.sqrt(SHARED) * inside)[0]
    return found


def main() -> None:
    """Print one row, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--out", type=Path, default=Path("docs/shaped.json"))
    parser.add_argument("--keep", type=Path, default=None, help="directory to work in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        source = folder / "shaped"
        if not source.exists():
            planted().save(source)
        text = json.dumps(measured(source, folder / "small", arguments.budget), indent=2)
    print(text)
    arguments.out.write_text(text + "\n")


def measured(source: Path, output: Path, budget: str) -> dict[str, float]:
    """Run the command; what it took, and what it says of its result."""
    command = [sys.executable, "-c", "from lotrtensor.cli import main; main()", "compress"]
    command += [str(source), "-o", str(output), "--budget", budget, "--json", "--force"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    document = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the command failed with {process.returncode}")
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "source_bytes": document["source_bytes"],
        "file_bytes": document["file_bytes"],
        "relative_error": document["relative_error"],
    }


if __name__ == "__main__":
    main()
