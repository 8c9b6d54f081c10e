"""Reads an adapter of format version 2 with the standard library and NumPy alone.

Written from the page on file formats, which shows it; nothing of lotrtensor is imported.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from pathlib import Path

import numpy as np

NUMBERS = {"U8": "u1", "I8": "i1"}
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


def read_updates(directory):
    """ΔW (m × n, float64) of every module of a compressed adapter, by its path."""
    row = read_tensors(Path(directory) / "adapter_model.safetensors", "")["lotr_coded"]
    *parts, rest = read_row(row.tobytes())
    assert not rest
    return decode(*parts)


def read_row(row):
    """Index, kinds, values and codes of a row of bytes, and what follows them."""
    first, second, third = struct.unpack("<III", row[:12])
    ends = 12 + first, 12 + first + second, 12 + first + second + third
    text = zlib.decompressobj(zdict=DICTIONARY).decompress(row[12 : ends[0]])
    text, _, kinds = text.partition(b"\0")
    index = json.loads(text)
    number = "<f4" if index.get("values") == "float32" else "<f2"
    values = np.frombuffer(row[ends[0] : ends[1]], number).astype(float)
    return index, np.frombuffer(kinds, "i1"), values, row[ends[1] : ends[2]], row[ends[2] :]


def decode(index, kinds, values, codes):
    """ΔW of every module, from the index, kinds, values and codes."""
    groups = [dict(g, modules=module_paths(g["modules"])) for g in index["groups"]]
    columns, codes = read_columns(codes, kinds, [s for g in groups for s in column_sizes(g)])
    sides, updates = [], {}
    for g in groups:
        p, q = g.get("shared_ranks", (0, 0))
        left, right, columns = columns[:p], columns[p : p + q], columns[p + q :]
        sides.append((left, right))
        for name, rank in zip(g["modules"], g["private_ranks"], strict=True):
            updates[name] = np.zeros(g["shape"])
            for j in range(rank):
                unit = [x / np.linalg.norm(x) for x in (columns[j], columns[rank + j])]
                updates[name] += values[j] * np.outer(*unit)
            columns, values = columns[2 * rank :], values[rank:]
    places = [
        core_kind(a, b, g, s[0])
        for g, s in zip(groups, sides, strict=True)
        for a, b in itertools.product(*s)
    ]
    sizes = [
        len(g["modules"])
        for g, s in zip(groups, sides, strict=True)
        for _ in range(len(s[0]) * len(s[1]))
    ]
    cores, rest = read_columns(codes, np.array(places), sizes)
    assert not rest
    for g, (left, right) in zip(groups, sides, strict=True):
        for a, b in itertools.product(left, right):
            outer = np.outer(a / np.linalg.norm(a), b / np.linalg.norm(b))
            for name, code in zip(g["modules"], cores.pop(0), strict=True):
                updates[name] += g["step"] * code * outer
    return updates


def read_tensors(path, prefix):
    """Tensors of one row whose keys begin with a prefix, by what follows it."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for key, entry in json.loads(data[8:start]).items():
        if key.startswith(prefix) and entry.get("dtype") in NUMBERS and len(entry["shape"]) == 1:
            begin, end = (start + offset for offset in entry["data_offsets"])
            number = NUMBERS[entry["dtype"]]
            found[key.removeprefix(prefix)] = np.frombuffer(data[begin:end], number)
    return found


def module_paths(record):
    """The paths that a record of modules stands for."""
    if "list" in record:
        return record["list"]
    ranges = record["at"] if isinstance(record["at"], list) else [record["at"]]
    numbers = []
    for text in ranges:
        ends = [[int(end) for end in item.split("-")] for item in text.split(",")]
        numbers.append([i for end in ends for i in range(end[0], end[-1] + 1)])
    pattern = record["pattern"].split(".")
    paths = []
    for combination in itertools.product(*numbers):
        own = iter(combination)
        paths.append(".".join(str(next(own)) if part == "*" else part for part in pattern))
    return paths


def column_sizes(g):
    """Entries of every column of a group: U, V, then the sides of every slice's terms."""
    (m, n), (p, q) = g["shape"], g.get("shared_ranks", (0, 0))
    terms = [[m] * rank + [n] * rank for rank in g["private_ranks"]]
    return [m] * p + [n] * q + [size for own in terms for size in own]


def core_kind(a, b, g, left):
    """Kind of the codes of a place (i, j), from columns i of U and j of V, and all of U."""
    energy = sum(np.sum(x**2) for x in left)
    square = np.sum(a**2) * np.sum(b**2) / (len(g["modules"]) * energy)
    return int(np.clip(np.round(np.log2(square)), -8, 60))


def read_columns(content, kinds, sizes):
    """Columns of codes, in float64, and what follows them."""
    columns = [None] * len(sizes)
    for kind in sorted(set(kinds.tolist())):
        told, largest, together, low, length = struct.unpack("<bBBBI", content[:8])
        assert told == kind
        members = [i for i, own in enumerate(kinds) if own == kind]
        count = sum(sizes[i] for i in members)
        inflate = zlib.decompressobj(wbits=-15)
        symbols = inflate.decompress(content[8 : 8 + length])
        bits = "".join(f"{byte:08b}" for byte in inflate.unused_data)
        stream = []
        for k in range(count):
            digit = symbols[k // together] // (2 * largest + 1) ** (k % together)
            code = (digit % (2 * largest + 1) - largest) << low
            stream.append(code + sum(int(bits[low * k + i]) << i for i in range(low)))
        for i in members:
            columns[i], stream = np.array(stream[: sizes[i]], float), stream[sizes[i] :]
        content = content[8 + length :]
    return columns, content
