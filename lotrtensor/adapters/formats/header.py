"""The header of a safetensors file: what it holds and where, without reading a tensor.

A file is eight bytes with the header's length, the header as JSON, and the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lotrtensor.errors import FormatError

_METADATA = "__metadata__"


class Stored(NamedTuple):
    """Where a tensor is: file, key and type as the header has them, shape, bytes in the file."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Stored]:
    """Return type, shape and place of every tensor of a file.

    Raises
    ------
    FormatError
        If the file is damaged or incomplete, as the safetensors library finds.
    """
    try:
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            begin = 8 + _length(file.read(8))
            header = json.loads(file.read(begin - 8))
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error}); fetch it again") from error
    return {
        key: Stored(
            path.name,
            key,
            entry["dtype"],
            tuple(entry["shape"]),
            begin + entry["data_offsets"][0],
            begin + entry["data_offsets"][1],
        )
        for key, entry in header.items()
        if key != _METADATA
    }


def data_start(content: bytes) -> int:
    """Return where the tensors begin in the bytes of a file."""
    return 8 + _length(content[:8])


def with_sorted_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a file with its metadata sorted, so that equal files are equal bytes.

    The library writes metadata in the order of a hash map, another one in each process.
    """
    begin = data_start(content)
    header: dict[str, Any] = json.loads(content[8:begin])
    header[_METADATA] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + content[begin:]


def _length(prefix: bytes) -> int:
    return int(struct.unpack("<Q", prefix)[0])
