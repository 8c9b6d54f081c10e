"""Columns of codes as bytes: those of like spread together, each kind Huffman-coded by zlib.

A *kind* of columns is the logarithm of their root mean square, to half an octave. The codes of a
kind are one stream of symbols, as many codes to a byte as fit, that DEFLATE codes by their
frequencies alone (its Huffman-only strategy looks for no repetitions, of which there are none). On
normal columns that stays within 3 % of the entropy.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

from lotrtensor.errors import FormatError

LARGEST_CODE = 2**15 - 1
"""Codes are 16-bit integers at the most."""

ZERO = -128
"""Kind of a column of zeros, which takes no bytes."""

_HEADER = struct.Struct("<bBBBI")
"""Of a stream: kind, largest leading part of a code, codes a symbol, low bits apart, bytes."""


def kinds_of(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return the kind of every column: 2 log₂ of its root mean square, rounded, as int8.

    Parameters
    ----------
    columns : sequence of ndarray of int
        Codes; a column of zeros is of kind −128.
    """
    wide = (column.astype(np.float64) for column in columns)
    squares = np.array([column @ column / max(1, len(column)) for column in wide], dtype=float)
    kinds = np.full(len(columns), -128, dtype=np.int8)
    some = squares > 0
    kinds[some] = np.clip(np.round(np.log2(squares[some])), -60, 60).astype(np.int8)
    return kinds


def entropy_bits(columns: Sequence[np.ndarray]) -> float:
    """Return the bits of columns of codes if each is coded by the frequencies of its own.

    As in `pack`, only the leading part of large codes is: the frequencies of a column's few entries
    say nothing of many low bits.
    """
    bits = 0.0
    for column in columns:
        low = _low(column)
        leading = column >> low
        counts = np.bincount(leading - np.min(leading, initial=0))
        counts = counts[counts > 0]
        bits += low * column.size - float(np.sum(counts * np.log2(counts / column.size)))
    return bits


def pack(columns: Sequence[np.ndarray], kinds: np.ndarray) -> bytes:
    """Return columns of codes as bytes.

    Parameters
    ----------
    columns : sequence of ndarray of int
        Codes, at most `LARGEST_CODE` in absolute value.
    kinds : ndarray of int8
        Their kinds, of which the reader has to be told; see `kinds_of`.

    Returns
    -------
    bytes
        One stream a kind, by rising kind, each after its header.
    """
    parts = []
    for kind in _present(kinds):
        members = [column for column, own in zip(columns, kinds, strict=True) if own == kind]
        codes = np.concatenate(members).astype(np.int16, copy=False)
        low = _low(codes)
        leading = codes >> low if low else codes
        largest = int(np.max(np.abs(leading)))
        together = _together(largest)
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        content = coder.compress(_symbols(leading, largest, together)) + coder.flush()
        content += _low_bits(codes, low)
        parts += [_HEADER.pack(kind, largest, together, low, len(content)), content]
    return b"".join(parts)


def unpack(
    content: bytes, kinds: np.ndarray, lengths: Sequence[int]
) -> tuple[list[np.ndarray], int]:
    """Return the columns of codes and how many bytes they took: the inverse of `pack`.

    Parameters
    ----------
    content : bytes
        What `pack` returned, at its beginning.
    kinds : ndarray of int8
        Kind of every column.
    lengths : sequence of int
        Entries of every column.

    Raises
    ------
    FormatError
        If the content is damaged, or does not fit the kinds and lengths.
    """
    columns = [np.zeros(0, dtype=np.int16)] * len(lengths)
    for k in np.nonzero(kinds == ZERO)[0].tolist():
        columns[k] = np.zeros(lengths[k], dtype=np.int16)
    start = 0
    for kind in _present(kinds):
        members: list[int] = np.nonzero(kinds == kind)[0].tolist()
        if len(content) < start + _HEADER.size:
            raise FormatError(f"the codes end before those of kind {kind}; fetch the file again")
        told, largest, together, low, size = _HEADER.unpack_from(content, start)
        start += _HEADER.size
        fits = told == kind and low <= 16 and largest <= 128 and start + size <= len(content)
        if not fits or together != _together(largest):
            raise FormatError(f"the codes of kind {kind} are damaged; fetch the file again")
        count = sum(lengths[k] for k in members)
        codes = _codes(content[start : start + size], count, largest, low)
        start += size
        for k in members:
            columns[k], codes = codes[: lengths[k]], codes[lengths[k] :]
    return columns, start


def unpack_nonzero(
    content: bytes, kinds: np.ndarray, lengths: Sequence[int]
) -> tuple[list[np.ndarray], int]:
    """Return what `unpack` does, of columns that have a norm.

    Raises
    ------
    FormatError
        If a column is zero, too.
    """
    if (kinds == ZERO).any():  # before any is made
        raise FormatError("a column of codes is zero; expected none")
    columns, size = unpack(content, kinds, lengths)
    if not all(column.any() for column in columns):
        raise FormatError("a column of codes is zero; expected none")
    return columns, size


def _present(kinds: np.ndarray) -> list[int]:
    return [int(kind) for kind in np.unique(kinds) if kind != ZERO]


_LEADING_BITS = 7
"""Bits of a code, beside its sign, that Huffman codes can stand for: a symbol is a byte."""


def _low(codes: np.ndarray) -> int:
    """How many low bits of codes stand apart."""
    largest = max(int(np.max(codes, initial=0)), -int(np.min(codes, initial=0)))
    return max(0, largest.bit_length() - _LEADING_BITS)


def _together(largest: int) -> int:
    """How many codes of at most ``largest`` a byte holds."""
    base, together = 2 * largest + 1, 1
    while base ** (together + 1) <= 256:
        together += 1
        if together == 8:
            break
    return together


def _symbols(codes: np.ndarray, largest: int, together: int) -> bytes:
    """Return codes as bytes, ``together`` to each: digits of a number, the first the lowest."""
    digits = np.full(-(-len(codes) // together) * together, largest, dtype=np.uint8)
    np.add(codes, largest, out=digits[: len(codes)], casting="unsafe")
    columns = digits.reshape(-1, together).T
    symbols: np.ndarray = columns[-1].copy()
    for column in columns[-2::-1]:
        symbols *= np.uint8(2 * largest + 1)
        symbols += column
    return symbols.tobytes()


def _low_bits(codes: np.ndarray, low: int) -> bytes:
    """Return the ``low`` lowest bits of every code, which no coder makes fewer."""
    planes = np.empty((len(codes), low), dtype=np.uint8)
    for bit in range(low):
        planes[:, bit] = codes >> bit & 1
    return np.packbits(planes).tobytes()


def _digits(symbols: np.ndarray, base: int, together: int) -> np.ndarray:
    """Return the digits of every symbol, the inverse of `_symbols`."""
    digits, rest = np.empty((len(symbols), together), dtype=np.int16), symbols.astype(np.int16)
    for place in range(together):
        digits[:, place] = rest % base
        rest //= base
    return digits.reshape(-1)


def _codes(content: bytes, count: int, largest: int, low: int) -> np.ndarray:
    together, base = _together(largest), 2 * largest + 1
    wanted = -(-count // together)
    if wanted > 8 * len(content):  # Huffman codes have a bit at least
        raise FormatError(
            f"{count} codes do not come from {len(content)} bytes; fetch the file again"
        )
    decoder = zlib.decompressobj(-15)
    try:
        # No more than is wanted: a damaged file may not ask for memory.
        symbols = np.frombuffer(decoder.decompress(content, wanted + 1), dtype=np.uint8)
    except zlib.error as error:
        raise FormatError(f"the codes are damaged ({error}); fetch the file again") from error
    rest = decoder.unused_data + decoder.unconsumed_tail
    if len(symbols) != wanted or not decoder.eof or len(rest) != -(-count * low // 8):
        raise FormatError(
            f"the codes hold {len(symbols)} symbols and {len(rest)} bytes of low bits; expected "
            f"{wanted} and {-(-count * low // 8)}: fetch the file again"
        )
    if int(symbols.max(initial=0)) >= base**together:
        raise FormatError("the codes hold a symbol beyond their alphabet; fetch the file again")
    leading = _digits(symbols, base, together)[:count] - np.int16(largest)
    if not low:
        return leading
    planes = np.unpackbits(np.frombuffer(rest, np.uint8), count=count * low).reshape(count, low)
    lowest = planes.astype(np.int32) @ (1 << np.arange(low, dtype=np.int32))
    codes = (leading.astype(np.int32) << low) + lowest
    if int(np.abs(codes).max(initial=0)) > LARGEST_CODE:
        raise FormatError(
            f"the codes hold one beyond ±{LARGEST_CODE}, which 16 bits do not; fetch the file again"
        )
    return codes.astype(np.int16)
