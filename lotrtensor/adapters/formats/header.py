"""A safetensors file: its header, checked against the file's size, and the bytes of its tensors.

A file is eight bytes with the header's length, the header as JSON, and the tensors' bytes. It is
read, never mapped: a mapped file that is cut meanwhile, by another download say, kills the process.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.checksums import CHECKSUMS, written
from lotrtensor.adapters.formats.json_text import LARGEST, parse_json
from lotrtensor.adapters.formats.paths import open_regular
from lotrtensor.errors import FormatError

_METADATA = "__metadata__"

_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8},
    **{"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8},
    **{"F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4},
    **{"F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of an entry by the names of types in a header."""

_MOST_SIDES = 32
"""Sides of a tensor that every NumPy takes."""


class Stored(NamedTuple):
    """Where a tensor is: file, key and type as the header has them, shape, bytes in the file."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class OpenFile:
    """A safetensors file that is open.

    Attributes
    ----------
    path : Path
        Its path.
    tensors : mapping of str to Stored
        Type, shape and place of every tensor; together they are all of the file.
    metadata : mapping of str to str
        The texts in its header.
    """

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    _file: BinaryIO
    _state: tuple[int, int]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # A file that is closed by its own end is warned of as one that was forgotten.
        weakref.finalize(self, self._file.close)

    def read(self, key: str) -> np.ndarray:
        """Return the bytes of a tensor; several threads, and forked processes, may ask at once.

        Raises
        ------
        FormatError
            If the file has been written to since it was opened, or cannot be read.
        """
        stored = self.tensors[key]
        content = np.empty(stored.stop - stored.start, dtype=np.uint8)
        try:
            count = self._read_into(content.data, stored.start)
            now = _state(self._file)
        except OSError as error:
            raise damaged(self.path, error) from error
        if count != content.size or now[0] < self._state[0]:
            raise damaged(self.path, "it has become shorter while it was read")
        if now != self._state:
            raise damaged(self.path, "it has been written to while it was read")
        return content

    def _read_into(self, content: memoryview, start: int) -> int:
        """Fill ``content`` from ``start`` on; return how many bytes there were.

        Where the file stands is left alone, as it is common to all processes that came of a fork.
        """
        if not hasattr(os, "preadv"):
            with self._lock:
                self._file.seek(start)
                found: int = self._file.readinto(content)  # type: ignore[attr-defined]
                return found
        count = 0
        while count < len(content):
            more = os.preadv(self._file.fileno(), [content[count:]], start + count)
            if not more:
                break
            count += more
        return count

    def close(self) -> None:
        """Close the file; it is closed, too, when nothing refers to it any more."""
        self._file.close()


def _state(file: BinaryIO) -> tuple[int, int]:
    """Size of a file, and when it was written to."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


BUFFER = 256
"""Bytes that are read beyond what is asked for, at most."""


@contextmanager
def safe_open(path: Path) -> Iterator[OpenFile]:
    """Open a safetensors file and check its header, so that reading a tensor allocates no more.

    Raises
    ------
    FormatError
        If it is no regular file, cannot be read, or its header contradicts itself or the file.
    """
    file = open_file(path)
    try:
        yield file
    finally:
        file.close()


def open_file(path: Path) -> OpenFile:
    """Return a safetensors file that is open until nobody holds it any more; see `safe_open`."""
    # Who asks for one tensor of a few hundred bytes is not to read a block of them.
    file = open_regular(path, BUFFER)
    try:
        return _opened(path, file)
    except BaseException:
        file.close()
        raise


def _opened(path: Path, file: BinaryIO) -> OpenFile:
    try:
        size, _ = state = _state(file)
        prefix = file.read(8)
        length = _length(prefix) if len(prefix) == 8 else -1
        if not 2 <= length <= size - 8:
            raise damaged(path, "it is shorter than its header")
        if length > LARGEST:
            raise damaged(path, f"its header takes {length} bytes")
        content = file.read(length)
    except OSError as error:
        raise damaged(path, error) from error
    if len(content) < length:
        raise damaged(path, "it has become shorter while it was read")
    header = parse_json(content, f"the header of {path}")
    if not isinstance(header, dict):
        raise damaged(path, "its header is no object")
    metadata = header.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise damaged(path, f"{_METADATA} of its header holds more than texts")
    tensors = {key: _stored(path, key, entry, 8 + length) for key, entry in header.items()}
    _check_places(path, tensors, 8 + length, size)
    return OpenFile(path, tensors, metadata, file, state)


def read_header(path: Path) -> dict[str, Stored]:
    """Return type, shape and place of every tensor of a file.

    Raises
    ------
    FormatError
        If the file is damaged or incomplete; see `safe_open`.
    """
    with safe_open(path) as file:
        return dict(file.tensors)


def damaged(path: Path, what: object) -> FormatError:
    """Return the refusal of a file that is not as it was written."""
    return FormatError(
        f"{path} cannot be read ({what}); the file is damaged or incomplete: fetch it again"
    )


def _stored(path: Path, key: str, entry: Any, begin: int) -> Stored:
    """Read an entry of a header, its size checked against its shape."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(path, f"its header does not say where {key} is") from error
    whole = isinstance(shape, list) and all(type(x) is int and x >= 0 for x in (*shape,))
    if not isinstance(dtype, str) or not whole or type(start) is not int or type(stop) is not int:
        raise damaged(path, f"its header does not say where {key} is")
    # An empty tensor too must have sides that an array can have.
    if len(shape) > _MOST_SIDES or math.prod(max(x, 1) for x in shape) >= 2**58:
        raise FormatError(f"{path}: {key} has the shape {str(shape)[:80]}, which no array has")
    bits = _BITS.get(dtype)
    if bits is not None and (stop - start) * 8 != math.prod(shape) * bits:
        raise damaged(path, f"{key} of shape {tuple(shape)} does not fill its {stop - start} bytes")
    return Stored(path.name, key, dtype, tuple(shape), begin + start, begin + stop)


def _check_places(path: Path, tensors: Mapping[str, Stored], begin: int, size: int) -> None:
    """Refuse tensors that overlap, leave a gap, or are not all of the file."""
    end = begin
    for stored in sorted(tensors.values(), key=lambda s: (s.start, s.stop)):
        if stored.start != end or stored.stop < stored.start:
            raise damaged(path, f"the bytes of {stored.key} are not where its header says")
        end = stored.stop
    if end != size:
        raise damaged(path, f"its header speaks of {end} bytes, it has {size}")


def data_start(content: bytes) -> int:
    """Return where the tensors begin in the bytes of a file."""
    return 8 + _length(content[:8])


def with_sorted_metadata(
    content: bytes, metadata: Mapping[str, str], *, checksums: bool = False
) -> tuple[bytes, memoryview]:
    """Return the header of a file with its metadata sorted, and its tensors, which are not copied.

    The library writes metadata in the order of a hash map, another one in each process; sorted,
    equal files are equal bytes. With ``checksums`` they are added to it.
    """
    begin = data_start(content)
    header: dict[str, Any] = json.loads(content[8:begin])
    header.pop(_METADATA, None)
    if checksums:
        tensors = {key: _stored(Path(), key, entry, begin) for key, entry in header.items()}
        metadata = {**metadata, CHECKSUMS: written(tensors, content)}
    return encoded_header(header, metadata), memoryview(content)[begin:]


def encoded_header(header: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return what a file begins with: the header's length and the header, texts in order."""
    whole = {**header, _METADATA: dict(sorted(metadata.items()))}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _length(prefix: bytes) -> int:
    return int(struct.unpack("<Q", prefix)[0])
