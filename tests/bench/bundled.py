"""The bundled adapter at several sizes: LoTR, truncated LoRA, and TensorLy on the dense tensor.

``python -m tests.bench.bundled`` prints the table that the README shows, in Markdown.
"""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import tensorly
from tensorly.decomposition import partial_tucker

from lotrtensor import LoraAdapter, LotrAdapter, RankError, compare, convert, load, truncate

SHARES = (50, 35, 25, 17, 12, 6)


def main() -> None:
    """Print relative Frobenius errors at equal bytes."""
    lora = load(Path(str(files("lotrtensor") / "data" / "amazon-sentiment")))
    assert isinstance(lora, LoraAdapter)
    print(
        "| smaller by | LoTR by type | its lower bound | TensorLy, same ranks | LoTR by shape |",
        end="",
    )
    print(" truncated LoRA, one rank | truncated LoRA, best ranks |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for share in SHARES:
        budget = f"{share}%"
        by_type = convert(lora, budget=budget)
        by_shape = convert(lora, budget=budget, group_by="shape")
        cells = [
            f"{by_type.relative_error:.3f}",
            f"{by_type.lower_bound:.3f}",
            f"{tensorly_error(lora, by_type):.3f}",
            f"{by_shape.relative_error:.3f}",
            _truncated(lora, rank=max(1, 8 * share // 100), limit=budget),
            _truncated(lora, budget=budget),
        ]
        print(f"| {lora.bytes / by_type.bytes:.1f} × | " + " | ".join(cells) + " |")
    print()
    print(_times(lora))


def tensorly_error(lora: LoraAdapter, lotr: LotrAdapter) -> float:
    """Error of TensorLy's ``partial_tucker`` at the ranks of ``lotr``, group by group."""
    tensorly.set_backend("numpy")
    modules = {module.name: module for module in lora.modules}
    lost2 = norm2 = 0.0
    for group in lotr.groups:
        members = [modules[name] for name in group.modules]
        dense = np.stack([m.B.astype(float) @ m.A.astype(float) for m in members])
        (core, factors), _ = partial_tucker(dense, rank=list(group.rank), modes=[1, 2], tol=1e-6)
        found = np.einsum("mp,kpq,nq->kmn", factors[0], core, factors[1], optimize=True)
        lost2 += float(np.sum((dense - found) ** 2))
        norm2 += float(np.sum(dense**2))
    return float(np.sqrt(lost2 / norm2))


def _truncated(lora: LoraAdapter, limit: str | None = None, **goal: int | str) -> str:
    try:
        found = truncate(lora, **goal)  # type: ignore[arg-type]
    except RankError:
        return "–"
    if limit and found.bytes > lora.bytes * float(limit.rstrip("%")) / 100:
        return "–"
    return f"{compare(lora, found).relative_error:.3f}"


def _times(lora: LoraAdapter) -> str:
    start = time.perf_counter()
    lotr = convert(lora, budget="25%")
    ours = time.perf_counter() - start
    start = time.perf_counter()
    tensorly_error(lora, lotr)
    theirs = time.perf_counter() - start
    return f"convert --budget 25%: {ours:.2f} s; TensorLy at the same ranks: {theirs:.2f} s"


if __name__ == "__main__":
    main()
