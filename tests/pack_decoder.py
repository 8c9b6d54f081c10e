"""Reads a pack of version 1 with the standard library and NumPy alone.

Written from the page on file formats, which shows it, on top of the decoder of format version 2;
nothing of lotrtensor is imported.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from pathlib import Path

import numpy as np

from compressed_decoder import decode, module_paths, read_columns, read_tensors

DICTIONARY = (
    b'classifier"score","lm_head"],"modules_to_save":["bias":"lora_only","fan_in_fan_out":true,'
    b'"embedding":true,"list":["mlp.gate_proj","name":"mlp.up_proj","name":"mlp.down_proj",'
    b'"name":"self_attn.o_proj","name":"self_attn.k_proj","name":"self_attn.v_proj",'
    b'"name":"self_attn.q_proj","pattern":"model.layers.*.self_attn.q_proj"},'
    b'"pattern":"encoder.layer.*.attention.output.dense"},"name":"attention.self.query",'
    b'"name":"intermediate.dense","name":"output.dense","step":0.0,"weight":1.,'
    b'"task_type":"SEQ_CLS"},"task_type":"FEATURE_EXTRACTION"},"task_type":"CAUSAL_LM"},'
    b'{"config":{"base_model_name_or_path":"meta-llama/sentence-transformers/'
    b'"private_ranks":[0,0,0,1,1,1,2,2,2,3,4,5],"shared_ranks":[8,8],"step":0.0'
    b',"shape":[4096,4096],"slice_ranks":16},{"modules":{"at":"0-31","pattern":"'
    b',"source":["float32",["float16",["bfloat16",'
    b'{"groups":[{"modules":{"list":["layers.0.'
    b'"],"name":"*","norm":1.,"private_ranks":[1],"relative_error":0.'
)


def read_adapter(directory, name):
    """ΔW (m × n, float64) of every module of one adapter of a pack, by its path."""
    index = json.loads((Path(directory) / "lotr_pack.json").read_text("utf-8"))
    place, number, _, _, _, uses_bases = index["adapters"][name]
    shard = Path(directory) / index["shards"][place]["file"]
    own = read_tensors(shard, f"{number}.")
    record, kinds, values, codes, content = read_row(own["coded"].tobytes())
    updates = decode(codes, kinds, values, record)
    if not uses_bases:
        return updates
    cells = [c for s in index["cells"] for c in read_cells(Path(directory) / s["file"])]
    used = [(c, [m for m in c["modules"] if m in updates]) for c in cells]
    columns = read_cores(content, [(c, len(names)) for c, names in used])
    for (cell, names), cores in zip(used, columns, strict=True):
        left, right = (x / np.linalg.norm(x, axis=0) for x in (cell["left"], cell["right"]))
        for module, core in zip(names, cores, strict=True):
            mean = cell["step"] / np.sqrt(cell["slices"]) * cell["mean"]
            whole = record["weight"] * mean + record["step"] * core
            updates[module] = updates[module] + left @ whole @ right.T
    return updates


def read_row(row):
    """Record, kinds, values, codes and cores of an adapter."""
    first, second, third = struct.unpack("<III", row[:12])
    ends = 12 + first, 12 + first + second, 12 + first + second + third
    text = zlib.decompressobj(zdict=DICTIONARY).decompress(row[12 : ends[0]])
    text, _, kinds = text.partition(b"\0")
    record = json.loads(text)
    number = "<f4" if record.get("values") == "float32" else "<f2"
    values = np.frombuffer(row[ends[0] : ends[1]], number).astype(float)
    return record, np.frombuffer(kinds, "i1"), values, row[ends[1] : ends[2]], row[ends[2] :]


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
