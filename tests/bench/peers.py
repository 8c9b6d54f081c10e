"""Our ways beside those of other packages, on the same input, each in processes of its own.

``python -m tests.bench.peers`` runs the ways of a job in turn, round after round, so that what else
the machine does meets all of them, prints a Markdown table and writes ``docs/peers.json``:

    seconds      median over the rounds, of the job alone: neither imports nor making the input
    spread       largest less smallest
    times        median over the rounds of a way's seconds over ours in the same round
    error        relative Frobenius error of what it finds
    peak         of the process, MiB

pyttb is left out where it is not installed (extra ``bench``). ``OMP_NUM_THREADS`` says how many
threads all of them may take. Training and mixed batches are in `bench_training`, whole commands
in `bench_commands`, packages that share between adapters in `families`.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.bench.stacks import planted_stack

OURS = "lotrtensor"
SIDE, WIDE, RANK = 4096, 64, 16
"""Side of the matrices of single modules, rank of a LoRA before, and after."""

Way = Callable[[], tuple[Callable[[], Any], Callable[[Any], float]]]
"""Makes the input; returns the job, which is timed, and the error of what it returns."""


def lora() -> tuple[np.ndarray, np.ndarray]:
    """Factors of rank `WIDE` whose singular values fall as 1 / j."""
    rng = np.random.default_rng(0)
    b, a = (np.linalg.qr(rng.standard_normal((SIDE, WIDE)))[0] for _ in range(2))
    b = b / np.arange(1, WIDE + 1)
    return b.astype(np.float32), np.ascontiguousarray(a.T, dtype=np.float32)


def delta() -> np.ndarray:
    """What was learned, of rank `RANK`, and the rounding of a checkpoint in bfloat16."""
    b, a = lora()
    noise = np.random.default_rng(1).standard_normal((SIDE, SIDE), dtype=np.float32)
    found: np.ndarray = b[:, :RANK] @ a[:RANK] + noise * np.float32(0.3 / SIDE)
    return found


def relative(whole: np.ndarray, found: np.ndarray) -> float:
    """‖whole − found‖ / ‖whole‖, summed in float64."""
    lost = (whole - found).astype(np.float64)
    return float(np.linalg.norm(lost) / np.linalg.norm(whole.astype(np.float64)))


def truncate_ours() -> Any:
    from lotrtensor import LowRankStack
    from lotrtensor.core.slice_svd import slice_svds, truncate_slices

    b, a = lora()
    stack = LowRankStack([b], [a])

    def error(found: LowRankStack) -> float:
        left, right = found.factors(0)
        return relative(b @ a, left @ right)

    return lambda: truncate_slices(slice_svds(stack), [RANK]), error


def truncate_dense(svd: str) -> Way:
    """The product B A, then its SVD: how resize scripts and `svd_lowrank` are used."""

    def made() -> Any:
        import torch

        b, a = (torch.from_numpy(x) for x in lora())
        return lambda: torch_svd(svd, b @ a), lambda found: relative((b @ a).numpy(), found)

    return made


def torch_svd(name: str, matrix: Any) -> np.ndarray:
    """Rank `RANK` of a matrix, by torch."""
    import torch

    torch.manual_seed(0)
    if name == "svd":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        u, s, v = torch.svd_lowrank(matrix, q=RANK + 8, niter=2)
    found: np.ndarray = ((u[:, :RANK] * s[:RANK]) @ v[:, :RANK].T).numpy()
    return found


def delta_ours() -> Any:
    from lotrtensor.core.dense_svd import dense_svd

    whole = delta()

    def error(found: Any) -> float:
        left, values, right = found.svd
        return relative(whole, left * values @ right.T)

    return lambda: dense_svd(whole, RANK), error


def delta_torch(svd: str) -> Way:
    def made() -> Any:
        import torch

        whole = torch.from_numpy(delta())
        return lambda: torch_svd(svd, whole), lambda found: relative(whole.numpy(), found)

    return made


def delta_arpack() -> Any:
    from scipy.sparse.linalg import svds

    whole = delta()

    def job() -> np.ndarray:
        u, s, vh = svds(whole, k=RANK, rng=np.random.default_rng(0))
        found: np.ndarray = (u * s) @ vh
        return found

    return job, lambda found: relative(whole, found)


STACK = (8, 512, 512, 16)
COLUMNS = 32


def dense_stack() -> np.ndarray:
    """The slices (m × n × K) of a planted stack."""
    stack = planted_stack(*STACK)
    return np.stack([np.asarray(stack.slice(k)) for k in range(STACK[0])], axis=2)


def tucker_ours() -> Any:
    from lotrtensor import tucker2

    stack = planted_stack(*STACK)
    return lambda: tucker2(stack, COLUMNS), lambda fit: float(fit.relative_error)


def tucker_tensorly() -> Any:
    from tensorly.decomposition import partial_tucker

    whole = dense_stack()

    def error(found: Any) -> float:
        (core, (u, v)), _ = found
        return relative(whole, np.einsum("ip,pqk,jq->ijk", u, core, v))

    return lambda: partial_tucker(whole, rank=[COLUMNS, COLUMNS], modes=[0, 1]), error


def tucker_pyttb() -> Any:
    import pyttb

    whole = dense_stack()
    tensor = pyttb.tensor(whole)

    def job() -> Any:
        rank = [COLUMNS, COLUMNS, STACK[0]]
        return pyttb.tucker_als(tensor, rank, init="nvecs", printitn=0)[0]

    return job, lambda found: relative(whole, found.full().data)


def tucker_hosvd() -> Any:
    whole = dense_stack()
    m, n, _ = whole.shape

    def job() -> tuple[np.ndarray, np.ndarray]:
        u = np.linalg.svd(whole.reshape(m, -1), full_matrices=False)[0][:, :COLUMNS]
        other = whole.transpose(1, 0, 2).reshape(n, -1)
        return u, np.linalg.svd(other, full_matrices=False)[0][:, :COLUMNS]

    def error(found: tuple[np.ndarray, np.ndarray]) -> float:
        u, v = found
        core = np.einsum("ip,ijk,jq->pqk", u, whole, v, optimize=True)
        return relative(whole, np.einsum("ip,pqk,jq->ijk", u, core, v, optimize=True))

    return job, error


def exported() -> Any:
    """A LoTR of rank 16 on eight linear layers in PEFT."""
    import peft
    import torch
    from torch import nn

    import lotrtensor.peft

    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
    names = [str(i) for i in range(8)]
    config = lotrtensor.peft.LotrConfig(r=RANK, target_modules=names, init_weights=False)
    return peft.get_peft_model(layers, config)


def export_ours() -> Any:
    from lotrtensor import load

    model, folder = exported(), tempfile.mkdtemp()
    model.save_pretrained(folder)

    def error(found: Any) -> float:
        shutil.rmtree(folder)
        return pair_error(model, {m.name: (m.B, m.A) for m in found.modules})

    return lambda: load(folder).to_lora(), error


def export_peft() -> Any:
    import peft

    model = exported()

    def error(found: Any) -> float:
        weights = {key: x.detach().numpy() for key, x in found[1].items()}
        names = {key.split(".lora_")[0] for key in weights}
        return pair_error(
            model,
            {
                name.rpartition(".")[2]: (
                    weights[f"{name}.lora_B.weight"],
                    weights[f"{name}.lora_A.weight"],
                )
                for name in names
            },
        )

    return lambda: peft.convert_to_lora(model, rank=RANK), error


def pair_error(model: Any, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Relative error of factors of all layers beside the updates that the model has."""
    lost2 = whole2 = 0.0
    for name, (b, a) in pairs.items():
        layer = model.base_model.model.get_submodule(name)
        whole = layer.get_delta_weight("default").detach().numpy()
        lost2 += float(np.sum((whole - b @ a) ** 2))
        whole2 += float(np.sum(whole**2))
    return float(np.sqrt(lost2 / whole2))


JOBS: Mapping[str, Mapping[str, Way]] = {
    f"LoRA of rank {WIDE} to {RANK}, {SIDE}²": {
        OURS: truncate_ours,
        "torch.linalg.svd of B A": truncate_dense("svd"),
        "torch.svd_lowrank of B A": truncate_dense("lowrank"),
    },
    f"weight delta of {SIDE}² at rank {RANK}": {
        OURS: delta_ours,
        "torch.linalg.svd (mergekit, sparse-llm)": delta_torch("svd"),
        "torch.svd_lowrank": delta_torch("lowrank"),
        "scipy svds": delta_arpack,
    },
    f"stack of {STACK[0]} × {STACK[1]}², r {STACK[3]}, rank {COLUMNS}": {
        OURS: tucker_ours,
        "tensorly partial_tucker": tucker_tensorly,
        "pyttb tucker_als": tucker_pyttb,
        "HOSVD in NumPy": tucker_hosvd,
    },
    f"LoTR of 8 × 1024², rank {RANK}, to LoRA": {
        OURS: export_ours,
        "peft.convert_to_lora": export_peft,
    },
}


class Ran(NamedTuple):
    """One process: seconds, error, peak MiB."""

    seconds: float
    error: float
    peak: float


def once(job: str, way: str) -> Ran:
    """Run one way in a process of its own."""
    words = [sys.executable, "-m", "tests.bench.peers", "--one", job, way]
    told = subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout
    return Ran(*json.loads(told.splitlines()[-1]))


def one(job: str, way: str) -> None:
    """In the process: once to warm up where that is short, then the median of up to three."""
    logging.disable()
    warnings.simplefilter("ignore")
    run, error = JOBS[job][way]()
    times, found = [], None
    while len(times) < 4 and sum(times) < LONG:
        started = time.perf_counter()
        found = run()
        times.append(time.perf_counter() - started)
    taken = statistics.median(times[1:] or times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([taken, error(found), peak]))


LONG = 5.0
"""Seconds after which a way is not run again in its process."""


def measure(rounds: int, jobs: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of all jobs."""
    rows = []
    for job in jobs:
        ways = [w for w in JOBS[job] if not w.startswith("pyttb") or find_spec("pyttb")]
        found = {way: [once(job, way)] for way in ways}
        for _ in range(rounds - 1):
            for way in ways:
                found[way].append(once(job, way))
        for way, ran in found.items():
            seconds = [own.seconds for own in ran]
            times = [own.seconds / our.seconds for own, our in zip(ran, found[OURS], strict=True)]
            rows.append(
                {
                    "job": job,
                    "way": way,
                    "seconds": float(f"{statistics.median(seconds):.3g}"),
                    "spread": float(f"{max(seconds) - min(seconds):.2g}"),
                    "times": float(f"{statistics.median(times):.3g}"),
                    "error": float(f"{ran[0].error:.4g}"),
                    "peak_mib": round(max(own.peak for own in ran)),
                }
            )
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown."""
    names = ("job", "way", "seconds", "spread", "× ours", "error", "peak MiB")
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        values = (row["job"], row["way"], row["seconds"], row["spread"], f"{row['times']:g}",
                  row["error"], row["peak_mib"])  # fmt: skip
        lines.append(f"| {' | '.join(map(str, values))} |")
    return lines


def main() -> None:
    """Measure, print the table, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--out", type=Path, default=Path("docs/peers.json"))
    parser.add_argument("--one", nargs=2, metavar=("JOB", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(*options.one)
    rows = measure(options.rounds, options.jobs)
    options.out.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    print("\n".join(["", *table(rows)]))
    return None


if __name__ == "__main__":
    main()
