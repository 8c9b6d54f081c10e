"""Groups in bits as one row of bytes, alone in a directory or among others in a pack.

    <III         bytes of the zlib stream, of the values and of the codes, little-endian
    zlib         the index as JSON, a zero byte, and the kind of every column, with `DICTIONARY`
    values       float16, or float32 where the index says so: one for every private term
    codes        of all columns, then of all cores; see `lotrtensor.core.bits.stream`
    the rest     of an adapter in a pack: codes of its cores on the bases there

One row takes one entry in the header of a file, and the dictionary knows what every index says:
of a small adapter, four tensors and an index of its own were a twentieth.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.json_text import parse_json
from lotrtensor.core.options import shown
from lotrtensor.errors import FormatError

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
"""What indexes have in common: zlib then writes where it stands here, not what it says."""

LENGTHS = struct.Struct("<III")

LONGEST, SHORTEST, DENSEST = 2**26, 2**20, 100
"""Bytes of an index and its kinds, at most, for any row and for small ones, and a byte of the
stream: a small file cannot ask for much memory, or time."""


class Coded(NamedTuple):
    """Groups in bits: their records, kinds of columns, values of terms, and codes."""

    records: dict[str, Any]
    kinds: np.ndarray
    values: np.ndarray
    codes: bytes


def to_row(coded: Coded, rest: bytes = b"") -> np.ndarray:
    """Return the row of bytes; ``rest`` ends it."""
    index, kinds, values, codes = coded
    if values.dtype != np.float16:
        index = index | {"values": values.dtype.name}
    text = json.dumps(index, separators=(",", ":"), sort_keys=True).encode()
    deflate = zlib.compressobj(9, zdict=DICTIONARY)
    head = deflate.compress(text + b"\0" + kinds.astype(np.int8).tobytes()) + deflate.flush()
    numbers = values.astype(values.dtype.newbyteorder("<")).tobytes()
    lengths = LENGTHS.pack(len(head), len(numbers), len(codes))
    return np.frombuffer(lengths + head + numbers + codes + rest, np.uint8)


def from_row(row: np.ndarray, where: str) -> tuple[Coded, bytes]:
    """Return what a row of bytes holds, and what follows the codes.

    Raises
    ------
    FormatError
        If it is damaged; ``where`` names it.
    """
    content = row.tobytes()
    if len(content) < LENGTHS.size:
        raise FormatError(f"{where} has {len(content)} bytes and is damaged; fetch it again")
    pieces, start = [], LENGTHS.size
    for length in LENGTHS.unpack(content[: LENGTHS.size]):
        pieces.append(content[start : start + length])
        start += length
    if start > len(content):
        raise FormatError(f"{where} has {len(content)} bytes and speaks of {start}; fetch it again")
    head, numbers, codes = pieces
    index, kinds = _inflated(head, where)
    told = index.get("values", "float16")
    if told not in ("float16", "float32"):
        raise FormatError(f"{where}: values is {shown(told)}; expected float16 or float32")
    dtype = np.dtype(told)
    if len(numbers) % dtype.itemsize:
        raise FormatError(f"{where}: its values do not fill their bytes; fetch it again")
    values = np.frombuffer(numbers, dtype.newbyteorder("<")).astype(dtype)
    return Coded(index, kinds, values, codes), content[start:]


def _inflated(head: bytes, where: str) -> tuple[dict[str, Any], np.ndarray]:
    decoder = zlib.decompressobj(zdict=DICTIONARY)
    try:
        text = decoder.decompress(head, min(LONGEST, SHORTEST + DENSEST * len(head)))
    except zlib.error as error:
        raise FormatError(f"{where} is damaged ({error}); fetch it again") from error
    if decoder.unconsumed_tail or not decoder.eof or decoder.unused_data:
        raise FormatError(f"{where} is damaged: its index does not end; fetch it again")
    text, zero, kinds = text.partition(b"\0")
    index = parse_json(text, where)
    if not zero or not isinstance(index, dict):
        raise FormatError(f"{where} is damaged: it holds no index; fetch it again")
    return index, np.frombuffer(kinds, np.int8)
