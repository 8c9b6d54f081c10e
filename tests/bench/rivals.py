"""Other ways to make an adapter small, written plainly: what they take and what they lose.

``python -m tests.bench.rivals`` (``pip install '.[bench]'``) prints the README's table of errors
at equal bytes, and writes ``docs/rivals.json``. Every rival is given the bytes of its codes and
scales alone, without config, header or index; ours is what lies on disk, those included.
`examples/evidence.py` scores the same rivals on the task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lotrtensor import LoraAdapter, RankError, compare, compress, convert, load
from lotrtensor.core.slice_svd import slice_svds
from lotrtensor.core.stacks.low_rank import LowRankStack
from tests.bench.codebook import codebook, quantise

RATIOS = (2, 4, 8, 16, 32, 64)
GROUP = 64
"""Numbers that share a scale of 16 bits, in the group-wise quantisers."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NormalFloat of four bits (Dettmers et al., "QLoRA", NeurIPS 2023, appendix E)."""

Update = tuple[np.ndarray, np.ndarray]


class Rival(NamedTuple):
    """What another way takes, and the factors B (m × c) and A (c × n) that it leaves a module."""

    name: str
    bytes: float
    factors: list[Update]


Rounding = Callable[[np.ndarray], tuple[np.ndarray, float]]
"""Rounds a matrix column by column, or in groups of rows of a column; tells the bits it took."""


def absmax(bits: int) -> Rounding:
    """Symmetric integers, one scale a group: the largest entry is met."""
    levels = np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)) / (2 ** (bits - 1) - 1.0)
    return _by_groups(levels, bits)


def normal_float() -> Rounding:
    """NF4, one scale a group."""
    return _by_groups(np.array(NF4), 4)


def _by_groups(levels: np.ndarray, bits: int) -> Rounding:
    borders = (levels[1:] + levels[:-1]) / 2

    def round_(x: np.ndarray) -> tuple[np.ndarray, float]:
        found = np.empty_like(x)
        for part in _groups(len(x)):
            scale = np.max(np.abs(x[part]), axis=0)
            safe = np.where(scale > 0, scale, 1.0)
            found[part] = safe * levels[np.searchsorted(borders, x[part] / safe)]
        scales = len(list(_groups(len(x)))) * x.shape[1]
        return found, bits * x.size + 16.0 * scales

    return round_


def _groups(count: int) -> Iterator[slice]:
    for start in range(0, count, GROUP):
        yield slice(start, min(start + GROUP, count))


def every_number(name: str, lora: LoraAdapter, round_: Rounding) -> Rival:
    """B and Aᵀ rounded as they are stored."""
    found, bits = [], 0.0
    for module in lora.modules:
        b, b_bits = round_(module.B.astype(float))
        a, a_bits = round_(module.A.T.astype(float))
        found.append((b, a.T))
        bits += b_bits + a_bits
    return Rival(name, bits / 8, found)


def loraquant(lora: LoraAdapter, ratio: float, bits: int) -> Rival:
    """LoRAQuant (arXiv 2510.26690): the leading terms at ``bits``, the others at one bit.

    In the singular-vector gauge, U √Σ and √Σ Vᵀ; the leading terms hold ``ratio`` of Σ σ². A group
    of a column has an offset and a scale at ``bits``, a scale at one bit. Each pair of columns is
    then tuned by straight-through gradient descent on its product, and the best step is kept.
    """
    found, taken = [], 0.0
    for module in lora.modules:
        svd = slice_svds(LowRankStack([module.B], [module.A]))[0]
        held = np.cumsum(svd.values**2) / np.sum(svd.values**2)
        high = int(np.searchsorted(held, ratio)) + 1
        root = np.sqrt(svd.values)
        lefts, rights = [], []
        for i in range(len(svd.values)):
            round_ = _range_rounding(bits) if i < high else _sign_rounding
            pair = (svd.left[:, i : i + 1] * root[i], svd.right[:, i : i + 1] * root[i])
            left, right, cost = _tuned(*pair, round_)
            lefts.append(left)
            rights.append(right)
            taken += cost
        found.append((np.hstack(lefts), np.hstack(rights).T))
    return Rival(f"LoRAQuant, {bits} bits for {ratio:.0%}", taken / 8, found)


def _range_rounding(bits: int) -> Rounding:
    def round_(x: np.ndarray) -> tuple[np.ndarray, float]:
        found = np.empty_like(x)
        for part in _groups(len(x)):
            low, high = x[part].min(axis=0), x[part].max(axis=0)
            step = np.where(high > low, (high - low) / (2**bits - 1), 1.0)
            found[part] = low + step * np.round((x[part] - low) / step)
        return found, bits * x.size + 32.0 * len(list(_groups(len(x)))) * x.shape[1]

    return round_


def _sign_rounding(x: np.ndarray) -> tuple[np.ndarray, float]:
    found = np.empty_like(x)
    for part in _groups(len(x)):
        found[part] = np.where(x[part] >= 0, 1.0, -1.0) * np.mean(np.abs(x[part]), axis=0)
    return found, x.size + 16.0 * len(list(_groups(len(x)))) * x.shape[1]


def _tuned(
    left: np.ndarray, right: np.ndarray, round_: Rounding, steps: int = 50
) -> tuple[np.ndarray, np.ndarray, float]:
    """Straight-through descent on ‖l rᵀ − Q(l̃) Q(r̃)ᵀ‖² over l̃ and r̃."""
    own, other = left.copy(), right.copy()
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    cost = 0.0
    for _ in range(steps):
        (p, p_bits), (q, q_bits) = round_(own), round_(other)
        cost = p_bits + q_bits
        gap = (left.T @ left) * (right.T @ right) - 2 * (left.T @ p) * (right.T @ q)
        lost = (gap + (p.T @ p) * (q.T @ q)).item()
        if best is None or lost < best[0]:
            best = (lost, p, q)
        own -= 0.1 * (p * (q.T @ q) - left * (right.T @ q)) / (q.T @ q)
        other -= 0.1 * (q * (p.T @ p) - right * (left.T @ p)) / (p.T @ p)
    assert best is not None
    return best[1], best[2], cost


def own_widths(lora: LoraAdapter, budget: float) -> Rival:
    """Rank-1 terms with a width of 0 to 8 bits each, from Lloyd and Max, a scale a column."""
    svds = [slice_svds(LowRankStack([m.B], [m.A]))[0] for m in lora.modules]
    losses = [1.0] + [1 - (1 - codebook(b).distortion) ** 2 for b in range(1, 9)]

    def widths(price: float) -> list[np.ndarray]:
        found = []
        for module, svd in zip(lora.modules, svds, strict=True):
            each = [0.0] + [b * sum(module.shape) + 32.0 for b in range(1, 9)]
            total = np.outer(svd.values**2, losses) + price * np.array(each)
            found.append(np.argmin(total, axis=1))
        return found

    def bits(found: list[np.ndarray]) -> float:
        pairs = zip(lora.modules, found, strict=True)
        return sum(float(w.sum() * sum(m.shape) + 32 * np.count_nonzero(w)) for m, w in pairs)

    low, high = 1e-12, 1e3
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if bits(widths(middle)) > 8 * budget else (low, middle)
    chosen, factors = widths(high), []
    for svd, own in zip(svds, chosen, strict=True):
        b, a = np.zeros_like(svd.left), np.zeros_like(svd.right)
        for i in np.nonzero(own)[0]:
            for side, out in ((svd.left, b), (svd.right, a)):
                codes, scale = quantise(side[:, i], int(own[i]))
                out[:, i] = scale * codebook(int(own[i])).levels[codes]
        factors.append((b * svd.values, a.T))
    return Rival("own widths", bits(chosen) / 8, factors)


def best_terms(lora: LoraAdapter, budget: float) -> Rival:
    """16-bit LoRA of the best ranks: the rank-1 terms of the most energy a number, none of some.

    `truncate` keeps one of every module, which takes more than the smaller budgets.
    """
    svds = [slice_svds(LowRankStack([m.B], [m.A]))[0] for m in lora.modules]
    gains = [(v**2 / sum(m.shape), k) for k, m in enumerate(lora.modules) for v in svds[k].values]
    ranks, taken = [0] * len(svds), 0
    for _, k in sorted(gains, reverse=True):
        cost = lora.dtype.itemsize * sum(lora.modules[k].shape)
        if taken + cost <= budget:
            ranks[k], taken = ranks[k] + 1, taken + cost
    factors = []
    for svd, rank in zip(svds, ranks, strict=True):
        root = np.sqrt(svd.values[:rank])
        sides = [(side[:, :rank] * root).astype(lora.dtype) for side in (svd.left, svd.right)]
        factors.append((sides[0].astype(float), sides[1].astype(float).T))
    return Rival("truncated LoRA", taken, factors)


def error(lora: LoraAdapter, factors: list[Update]) -> float:
    """√(Σ ‖ΔW − B A‖² / Σ ‖ΔW‖²), from thin factors."""
    lost2 = norm2 = 0.0
    for module, (b, a) in zip(lora.modules, factors, strict=True):
        exact = LowRankStack([module.B.astype(float)], [module.A.astype(float)])
        rest = exact - LowRankStack([b], [a]) if b.shape[1] else exact
        lost2 += float(rest.norms2()[0])
        norm2 += float(exact.norms2()[0])
    return float(np.sqrt(lost2 / norm2))


def lossless(lora: LoraAdapter) -> float:
    """Bytes of the stored numbers under Zstandard's strongest level, high and low bytes apart."""
    import zstandard  # of the bench extra

    factors = (x.astype(lora.dtype) for m in lora.modules for x in (m.B, m.A))
    raw = b"".join(np.ascontiguousarray(x).tobytes() for x in factors)
    size = lora.dtype.itemsize
    planes = np.frombuffer(raw, np.uint8).reshape(-1, size).T
    packer = zstandard.ZstdCompressor(level=zstandard.MAX_COMPRESSION_LEVEL)
    return float(sum(len(packer.compress(plane.tobytes())) for plane in planes))


def of_one_size(lora: LoraAdapter) -> Iterator[Rival]:
    """Rivals whose size cannot be chosen."""
    exact = [(m.B.astype(float), m.A.astype(float)) for m in lora.modules]
    yield Rival("lossless, Zstandard", lossless(lora), exact)
    yield every_number("int8", lora, absmax(8))
    yield every_number("int4", lora, absmax(4))
    yield every_number("NF4", lora, normal_float())
    for bits in (3, 2):
        for ratio in (0.9, 0.8):
            yield loraquant(lora, ratio, bits)


COLUMNS = {
    "compressed": "compressed",
    "own_widths": "terms, Lloyd–Max widths",
    "lotr": "LoTR, 16 bit",
    "lora": "truncated LoRA, 16 bit",
}
"""What is measured at a size, and what the table calls it."""


def main() -> None:
    """Print both tables, and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    bundled = Path(str(files("lotrtensor") / "data" / "amazon-sentiment"))
    parser.add_argument("--adapter", type=Path, default=bundled)
    parser.add_argument("--out", type=Path, default=Path("docs/rivals.json"))
    arguments = parser.parse_args()
    lora = load(arguments.adapter)
    assert isinstance(lora, LoraAdapter)
    sizes = [_at(lora, ratio) for ratio in RATIOS]
    points = [_point(lora, rival) for rival in of_one_size(lora)]
    document = {"source_bytes": lora.bytes, "sizes": sizes, "points": points}
    print("\n".join([*sizes_table(document), "", *points_table(document)]))
    arguments.out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _at(lora: LoraAdapter, ratio: int) -> dict[str, float | None]:
    budget = lora.bytes // ratio
    return {
        "ratio": ratio,
        "compressed": compress(lora, budget=budget).relative_error,
        "own_widths": error(lora, own_widths(lora, budget).factors),
        "lotr": _lotr(lora, budget),
        "lora": error(lora, best_terms(lora, budget).factors),
    }


def _lotr(lora: LoraAdapter, budget: int) -> float | None:
    try:
        return compare(lora, convert(lora, budget=budget)).relative_error
    except RankError:
        return None  # rank 1 throughout takes more


def _point(lora: LoraAdapter, rival: Rival) -> dict[str, Any]:
    found = {"name": rival.name, "bytes": rival.bytes, "error": error(lora, rival.factors)}
    return found | {"compressed": compress(lora, budget=int(rival.bytes)).relative_error}


def sizes_table(document: dict[str, Any]) -> list[str]:
    """Lines of the README's table of errors at equal bytes."""
    lines = [
        f"| smaller by | {' | '.join(COLUMNS.values())} |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    for row in document["sizes"]:
        errors = {key: row[key] for key in COLUMNS if row[key] is not None}
        cells = {key: f"{value:.3f}" for key, value in errors.items()}
        least = min(errors, key=errors.__getitem__)
        cells[least] = f"**{cells[least]}**"
        lines.append(f"| {row['ratio']} × | {' | '.join(cells.get(key, '–') for key in COLUMNS)} |")
    return lines


def points_table(document: dict[str, Any]) -> list[str]:
    """Lines of the README's table of rivals of one size."""
    lines = [
        "| rival | smaller by | its error | compressed to that size |",
        "| --- | --- | --- | --- |",
    ]
    for row in document["points"]:
        smaller = document["source_bytes"] / row["bytes"]
        lines.append(
            f"| {row['name']} | {smaller:.1f} × | {row['error']:.4f} | {row['compressed']:.4f} |"
        )
    return lines


if __name__ == "__main__":
    main()
