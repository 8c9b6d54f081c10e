"""Changes of valid files that keep most of their structure, drawn from a source of choices."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tests.fuzz.seeds import Files


class Choices(Protocol):
    """Where the choices come from: a seeded generator, or the bytes of a fuzzer."""

    def below(self, count: int) -> int:
        """An integer of 0 to ``count`` − 1."""


VALUES: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**62, 2**64, 10**400, 0.5, -0.0, 1e-30, 1e30),
    *(1e308, "", "x", "layers.0.q", "../x", "a" * 300, "\x1b[2J", "\x00", "\u202e", "1" * 5000),
    *("(a+)+b", "a{99999999999}", "(?:" * 60, ".*" * 200, r"layers\.\d+\.q", "F32", "F8_E4M3"),
    *([], {}, [[]], [1], [0], [2**40, 2**40], [True], ["x"], {"x": 1}, {"(a|a)*b": 2}),
    *([[[[[[[[[[1]]]]]]]]]], {"a": {"a": {"a": {}}}}, [0] * 40, [1] * 65),
)

BYTES = (b"\0", b"\xff", b"{", b'"', b"\\", b"\x7f", b"nan", b"1e999", b"\xed\xa0\x80")


def mutate(files: Files, choices: Choices) -> Files:
    """Return files with one to three changes."""
    found = dict(files)
    for _ in range((1, 1, 1, 2, 2, 3)[choices.below(6)]):
        name = sorted(found)[choices.below(len(found))]
        changes = _JSON if name.endswith(".json") else _TENSORS
        found[name] = changes[choices.below(len(changes))](found[name], choices)
    return found


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if len(path) > 12:
        return found
    if isinstance(value, dict):
        found += [p for key, item in value.items() for p in _paths(item, (*path, key))]
    elif isinstance(value, list):
        found += [p for k, item in enumerate(value[:8]) for p in _paths(item, (*path, k))]
    return found


def _edit(value: Any, choices: Choices) -> Any:
    """Change one place of a JSON value: set it, drop it, rename it or copy another one there."""
    paths = _paths(value)
    path = paths[choices.below(len(paths))]
    new = VALUES[choices.below(len(VALUES))]
    if not path:
        return new if choices.below(8) == 0 else value
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    kind = choices.below(4)
    if kind == 0 and isinstance(parent, dict):
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict) and isinstance(new, str):
        parent[new] = parent.pop(path[-1])
    elif kind == 2:
        other = value
        for step in paths[choices.below(len(paths))]:
            other = other[step]
        parent[path[-1]] = json.loads(json.dumps(other))
    else:
        parent[path[-1]] = new
    return value


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return {}


def _edit_json(content: bytes, choices: Choices) -> bytes:
    try:
        return json.dumps(_edit(_parsed(content), choices)).encode()
    except (RecursionError, ValueError):  # deep, or a number too long to be printed
        return content


def _twice(content: bytes, choices: Choices) -> bytes:
    value = _parsed(content)
    if not isinstance(value, dict) or not value or b"[[[[[[[[[[[[" in content:
        return content
    key = sorted(value)[choices.below(len(value))]
    extra = json.dumps({key: VALUES[choices.below(len(VALUES))]})
    return extra[:-1].encode() + b", " + json.dumps(value)[1:].encode()


def _deep(content: bytes, choices: Choices) -> bytes:
    depth = (10, 70, 900, 50_000)[choices.below(4)]
    return b'{"x": ' + b"[" * depth + b"]" * depth + b"}"


def _bytes(content: bytes, choices: Choices) -> bytes:
    if not content:
        return content
    at, piece = choices.below(len(content)), BYTES[choices.below(len(BYTES))]
    kind = choices.below(3)
    if kind == 0:
        return content[:at]
    return content[:at] + piece + content[at + (len(piece) if kind == 1 else 0) :]


def _split(content: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        return {}, content
    return _parsed(content[8 : 8 + length]), content[8 + length :]


def _joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _edit_header(content: bytes, choices: Choices) -> bytes:
    header, data = _split(content)
    try:
        return _joined(_edit(header, choices), data)
    except (RecursionError, ValueError):
        return content


def _twice_in_header(content: bytes, choices: Choices) -> bytes:
    header, data = _split(content)
    text = _twice(json.dumps(header).encode(), choices)
    return struct.pack("<Q", len(text)) + text + data


def _numbers(content: bytes, choices: Choices) -> bytes:
    """Overwrite numbers: NaN, infinities, denormals, the largest ones."""
    header, data = _split(content)
    if not data:
        return content
    at = choices.below(len(data))
    piece = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\1\0\0\0", b"\xff\xff\x7f\x7f", b"\0\x7c")[
        choices.below(5)
    ]
    return _joined(header, (data[:at] + piece + data[at + len(piece) :])[: len(data)])


def _resized(content: bytes, choices: Choices) -> bytes:
    header, data = _split(content)
    more = (b"", b"\0" * 4, b"\0" * 4096)[choices.below(3)]
    return _joined(header, data[: choices.below(len(data) + 1)] + more)


_JSON: tuple[Callable[[bytes, Choices], bytes], ...] = (
    *(_edit_json, _edit_json, _edit_json, _edit_json),
    *(_twice, _deep, _bytes),
)
_TENSORS: tuple[Callable[[bytes, Choices], bytes], ...] = (
    *(_edit_header, _edit_header, _edit_header, _numbers),
    *(_twice_in_header, _resized, _bytes),
)
