"""Module paths of a group in few bytes: one pattern, and the numbers that it stands for.

>>> fold(("layer.0.query", "layer.1.query", "layer.2.query"))
{'pattern': 'layer.*.query', 'at': '0-2'}
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 2**20
"""Modules that a record may stand for."""


def fold(modules: Sequence[str]) -> dict[str, Any]:
    """Return a record of module paths: ``{"pattern", "at"}``, or ``{"list"}`` where that is longer.

    Parameters
    ----------
    modules : sequence of str
        Paths. Where they differ in the numbers between their dots alone, ``pattern`` has a ``*``
        for each number that differs and ``at`` the numbers: ``"0-5"``, ``"0,2,7-9"``, or a list of
        those, every combination of which is meant, the last running fastest.
    """
    plain = {"list": list(modules)}
    parts = [name.split(".") for name in modules]
    if len({len(p) for p in parts}) != 1 or any("*" in p for p in parts[0]):
        return plain
    pattern, ranges = [], []
    for column in zip(*parts, strict=True):
        if len(set(column)) == 1:
            pattern.append(column[0])
        elif all(_NUMBER.fullmatch(part) for part in column):
            pattern.append("*")
            ranges.append(_ranges(sorted({int(part) for part in column})))
        else:
            return plain
    folded = {"pattern": ".".join(pattern), "at": ranges[0] if len(ranges) == 1 else ranges}
    return folded if ranges and unfold(folded) == tuple(modules) else plain


def unfold(record: Any) -> tuple[str, ...] | None:
    """Return the module paths of a record: the inverse of `fold`; None if it is none.

    The number of paths is bounded, so that a few bytes cannot ask for any memory.
    """
    if not isinstance(record, Mapping):
        return None
    if set(record) == {"list"}:
        names = record["list"]
        strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(names) if strings else None
    if set(record) != {"pattern", "at"} or not isinstance(record["pattern"], str):
        return None
    at = record["at"] if isinstance(record["at"], list) else [record["at"]]
    numbers = [_numbers(text) for text in at]
    parts = record["pattern"].split(".")
    stars = [i for i, part in enumerate(parts) if part == "*"]
    if None in numbers or len(stars) != len(numbers):
        return None
    found = [own for own in numbers if own is not None]
    if math.prod(map(len, found)) > MOST:
        return None
    names = []
    for combination in itertools.product(*found):
        for i, number in zip(stars, combination, strict=True):
            parts[i] = str(number)
        names.append(".".join(parts))
    return tuple(names)


_NUMBER = re.compile(r"0|[1-9]\d{0,8}", re.ASCII)


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 7]`` as ``"0-2,7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _numbers(text: Any) -> list[int] | None:
    if not isinstance(text, str):
        return None
    found: list[int] = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        if not _NUMBER.fullmatch(first) or (dash and not _NUMBER.fullmatch(last)):
            return None
        stop = int(last) if dash else int(first)
        if stop - int(first) + len(found) >= MOST:
            return None
        found += range(int(first), stop + 1)
    return found
