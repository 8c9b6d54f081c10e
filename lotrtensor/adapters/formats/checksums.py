"""A checksum of every tensor, in the header of the file: what differs from it was damaged since.

``__metadata__`` holds under `CHECKSUMS` eight hexadecimal digits a tensor, the keys in the order of
their characters: the CRC-32 (ISO 3309) of key, type and shape, and then of the tensor's bytes.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lotrtensor.errors import LotrWarning

if TYPE_CHECKING:
    from lotrtensor.adapters.formats.header import OpenFile, Stored

CHECKSUMS = "lotr_crc32"
_DIGITS = 8


def checksum(stored: Stored, content: memoryview) -> str:
    """Return the checksum of a tensor, as a file holds it."""
    sides = ",".join(map(str, stored.shape))
    start = zlib.crc32(f"{stored.key}\n{stored.dtype}\n{sides}\n".encode())
    return f"{zlib.crc32(content, start):0{_DIGITS}x}"


def written(tensors: Mapping[str, Stored], content: bytes) -> str:
    """Return the checksums of all tensors of a file from its bytes."""
    view = memoryview(content)
    return "".join(checksum(s, view[s.start : s.stop]) for _, s in sorted(tensors.items()))


def by_key(file: OpenFile) -> dict[str, str]:
    """Return the checksum that a file holds for each of its tensors; empty where it holds none.

    Warns
    -----
    LotrWarning
        If it holds more or fewer of them than tensors.
    """
    text = file.metadata.get(CHECKSUMS)
    if text is None:
        return {}
    if len(text) != _DIGITS * len(file.tensors):
        warnings.warn(
            f"{file.path} holds {len(file.tensors)} tensors and checksums of "
            f"{len(text) // _DIGITS}: it is not as it was written; fetch it again",
            LotrWarning,
            stacklevel=2,
        )
        return {}
    parts = (text[at : at + _DIGITS] for at in range(0, len(text), _DIGITS))
    return dict(zip(sorted(file.tensors), parts, strict=True))


def warn_of(file: OpenFile, key: str) -> None:
    """Warn of a tensor whose checksum is another one."""
    warnings.warn(
        f"{file.path}: {key} is not as it was written, for its checksum differs; fetch the file "
        "again",
        LotrWarning,
        stacklevel=2,
    )
