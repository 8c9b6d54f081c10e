"""A safetensors file that is written tensor by tensor, each made when its turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.checksums import CHECKSUMS, checksum
from lotrtensor.adapters.formats.header import Stored, encoded_header
from lotrtensor.errors import ShapeError


class Planned(NamedTuple):
    """A tensor that is still to be made: its type, its shape, and what makes it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes that it will take."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_streamed(
    file: BinaryIO,
    tensors: Mapping[str, Planned],
    names: Mapping[np.dtype, str],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file with checksums; one tensor at a time is in memory.

    Those with the longest entries come first, so that all are aligned, and then go by key.

    Parameters
    ----------
    file : BinaryIO
        A file that is empty, and can be written to in any place.
    tensors : mapping of str to Planned
        The tensors by key.
    names : mapping of dtype to str
        What a header calls their types.
    metadata : mapping of str to str
        Texts of the header.

    Raises
    ------
    ShapeError
        If a tensor is not as it was planned.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    places, end = {}, 0
    for key in order:
        dtype, shape, _ = tensors[key]
        start, end = end, end + tensors[key].nbytes
        places[key] = Stored("", key, names[dtype], shape, start, end)
    found = dict.fromkeys(sorted(tensors), "0" * len(checksum(places[order[0]], memoryview(b""))))
    file.write(_header(places, {**metadata, CHECKSUMS: "".join(found.values())}))
    for key in order:
        made, (dtype, shape, _) = tensors[key].make(), tensors[key]
        if made.shape != shape or made.dtype.newbyteorder("=") != dtype:
            raise ShapeError(f"{key} is {made.dtype} {made.shape}; expected {dtype} {shape}")
        content = np.asarray(made, dtype.newbyteorder("<"), order="C")
        view = content.reshape(-1).view(np.uint8).data
        found[key] = checksum(places[key], view)
        file.write(view)
    file.seek(0)
    file.write(_header(places, {**metadata, CHECKSUMS: "".join(found.values())}))


def _header(places: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {
        own.key: {
            "dtype": own.dtype,
            "shape": list(own.shape),
            "data_offsets": [own.start, own.stop],
        }
        for own in places.values()
    }
    return encoded_header(header, metadata)
