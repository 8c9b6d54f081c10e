"""JSON of a stranger: bounded in size and depth, and nothing in it said twice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lotrtensor.adapters.formats.paths import open_regular, unreadable
from lotrtensor.errors import FormatError

LARGEST = 64 * 2**20
"""Bytes of a config, index or header that are read at most."""

DEEPEST = 64
"""Nesting of lists and objects that is read: far more than any config has, far less than what a
recursive writer of JSON survives."""


def parse_json(content: bytes | str, where: object) -> Any:
    """Return the value that a JSON text holds.

    Parameters
    ----------
    content : bytes or str
        The text; bytes are UTF-8.
    where : object
        What it is, named in messages.

    Raises
    ------
    FormatError
        If it is no JSON, too large or too deep, holds a key twice (another reader may take the
        other value), or text that no file can hold.
    """
    if len(content) > LARGEST:
        raise FormatError(f"{where} takes {len(content)} bytes; expected at most {LARGEST}")
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise FormatError(f"{where} cannot be read as JSON: {error}") from error
    _check(value, where)
    return value


def read_json(path: Path) -> Any:
    """Return the value that the JSON file ``path`` holds.

    Raises
    ------
    FormatError
        If it cannot be read; see `parse_json`.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, LARGEST) + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_json(content, path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises
    ------
    FormatError
        If it cannot be read, or is no object; see `parse_json`.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r:.80} is there twice; expected once")
    return found


def _check(value: Any, where: object) -> None:
    """Refuse deep nesting and lone surrogates, without recursion."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    _check_text(key, where)
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                _check_text(item, where)
        level = inner
        if not level:
            return
    raise _too_deep(where)


def _check_text(text: str, where: object) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{where} holds {text!r:.80}, which is half a character") from error


def _too_deep(where: object) -> FormatError:
    return FormatError(f"{where} is nested more than {DEEPEST} deep; no config is")
