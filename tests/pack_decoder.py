"""Reads a pack of version 1 with the standard library and NumPy alone.

Written from the page on file formats, which shows it, on top of the decoder of format version 2;
nothing of lotrtensor is imported.
"""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path

import numpy as np

from compressed_decoder import decode, module_paths, read_columns, read_row, read_tensors


def read_adapter(directory, name):
    """ΔW (m × n, float64) of every module of one adapter of a pack, by its path."""
    index = json.loads((Path(directory) / "lotr_pack.json").read_text("utf-8"))
    place, number, _, _, _, uses_bases = index["adapters"][name]
    shard = Path(directory) / index["shards"][place]["file"]
    own = read_tensors(shard, f"{number}.")
    record, kinds, values, codes, content = read_row(own["coded"].tobytes())
    updates = decode(record, kinds, values, codes)
    if not uses_bases:
        return updates
    cells = [c for s in index["cells"] for c in read_cells(Path(directory) / s["file"])]
    cells = [c for c in cells if c.get("cluster", 0) == record.get("cluster", 0)]
    used = [(c, [m for m in c["modules"] if m in updates]) for c in cells]
    columns = read_cores(content, [(c, len(names)) for c, names in used])
    for (cell, names), cores in zip(used, columns, strict=True):
        left, right = (x / np.linalg.norm(x, axis=0) for x in (cell["left"], cell["right"]))
        for module, core in zip(names, cores, strict=True):
            mean = cell["step"] / np.sqrt(cell["slices"]) * cell["mean"]
            whole = record["weight"] * mean + record["step"] * core
            updates[module] = updates[module] + left @ whole @ right.T
    return updates


def read_cells(path):
    """The cells of a shard: their records, columns of codes, and mean cores."""
    tensors = read_tensors(path, "")
    cells = json.loads(zlib.decompress(tensors["lotr_cells"]))
    pairs = [pair for c in cells for pair in zip(c["shape"], c["ranks"], strict=True)]
    sizes = [side for side, rank in pairs for _ in range(rank)]
    columns, rest = read_columns(tensors["lotr_codes"].tobytes(), tensors["lotr_kinds"], sizes)
    for cell in cells:
        p, q = cell["ranks"]
        cell["modules"] = module_paths(cell["modules"])
        cell["left"], cell["right"] = np.stack(columns[:p], 1), np.stack(columns[p : p + q], 1)
        columns = columns[p + q :]
    for cell, (mean,) in zip(cells, read_cores(rest, [(c, 1) for c in cells]), strict=True):
        cell["mean"] = mean
    return cells


def read_cores(content, parts):
    """Codes of the cores (slices × p × q) of pairs of a cell and a number of slices."""
    kinds = [place_kinds(cell) for cell, _ in parts]
    told = [(kind, k, count) for k, (_, count) in zip(kinds, parts, strict=True)
            for kind in np.unique(k)]  # fmt: skip
    sizes = [int((k == kind).sum()) * count for kind, k, count in told]
    columns, rest = read_columns(content, np.array([kind for kind, _, _ in told]), sizes)
    assert not rest
    found = []
    for k, (_, count) in zip(kinds, parts, strict=True):
        cores = np.zeros((count, *k.shape))
        for kind in np.unique(k):
            cores[:, k == kind] = columns.pop(0).reshape(count, -1)
        found.append(cores)
    return found


def place_kinds(cell):
    """Kind of every place (i, j) of the cores of a cell."""
    p, q = cell["ranks"]
    left2, right2 = (np.sum(x**2, axis=0) for x in (cell["left"], cell["right"]))
    found = np.zeros((p, q), int)
    for i, j in itertools.product(range(p), range(q)):
        square = left2[i] * right2[j] / (cell["slices"] * np.sum(left2))
        found[i, j] = np.clip(np.round(np.log2(square)), -8, 60)
    return found
