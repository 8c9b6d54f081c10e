"""A stranger's regular expression as a tree, for those parts of the syntax that need no search.

What is left out needs a search back and forth in the text: references to groups, looking ahead and
behind, atomic groups and possessive repeats. Flags are left out too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

MOST = 20_000
"""States of an automaton, and hence copies of what is repeated, at most."""

_DEEPEST = 50
_LONGEST = 1000
_ASSERTIONS = {r"\A": "start", r"\Z": "end of all", r"\b": "boundary", r"\B": "inside"}


class Node(NamedTuple):
    """A part of an expression.

    ``kind`` is ``"literal"`` (``text`` is a character), ``"any"`` (all but a line break), ``"set"``
    (``text`` is an expression for one character), ``"assert"`` (``text`` says what), ``"both"``
    (``parts`` one after another), ``"either"`` (one of ``parts``) or ``"repeat"`` (the one part,
    ``least`` to ``most`` times; None is without end).
    """

    kind: str
    text: str = ""
    parts: tuple[Node, ...] = ()
    least: int = 0
    most: int | None = None


def parse(pattern: str) -> Node:
    """Return the tree of an expression.

    Raises
    ------
    ValueError
        If it is none, or has a part that is left out here.
    """
    parser = _Parser(pattern)
    found = parser.alternatives(0)
    if parser.place < len(pattern):
        raise ValueError("unbalanced parenthesis")
    return found


def one_character(text: str) -> Callable[[str], bool]:
    r"""Return whether a character is one of a set such as ``[a-z]`` or ``\d``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets within sets
        compiled = re.compile(text)
    return lambda character: compiled.fullmatch(character) is not None


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.place = pattern, 0

    def peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.place)

    def take(self, text: str) -> bool:
        found = self.peek(text)
        self.place += len(text) if found else 0
        return found

    def alternatives(self, depth: int) -> Node:
        if depth > _DEEPEST:
            raise ValueError(f"groups are nested more than {_DEEPEST} deep")
        branches = [self.sequence(depth)]
        while self.take("|"):
            branches.append(self.sequence(depth))
        return branches[0] if len(branches) == 1 else Node("either", parts=tuple(branches))

    def sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while self.place < len(self.pattern) and not self.peek("|") and not self.peek(")"):
            parts.append(self.repeated(self.atom(depth)))
        return parts[0] if len(parts) == 1 else Node("both", parts=tuple(parts))

    def repeated(self, node: Node) -> Node:
        limits = self.limits()
        if limits is None:
            return node
        if node.kind == "assert":
            raise ValueError("nothing to repeat")
        self.take("?")  # the shortest or the longest: the same texts match
        if self.peek("+") or self.limits() is not None:
            raise ValueError("multiple or possessive repeat")
        least, most = limits
        return Node("repeat", parts=(node,), least=least, most=most)

    def limits(self) -> tuple[int, int | None] | None:
        for sign, limits in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self.take(sign):
                return limits
        found = _BRACES.match(self.pattern, self.place)
        if found is None or not (found[1] or found[2]):
            return None
        self.place = found.end()
        least = _count(found[1] or "0")
        most = least if found[2] is None else _count(found[3]) if found[3] else None
        if most is not None and most < least:
            raise ValueError("min repeat greater than max repeat")
        return least, most

    def atom(self, depth: int) -> Node:
        if self.take("("):
            return self.group(depth)
        if self.peek("["):
            return self.set()
        if self.peek("\\"):
            return self.escape()
        character = self.pattern[self.place]
        if character in "*+?":
            raise ValueError("nothing to repeat")
        self.place += 1
        if character in "^$":
            return Node("assert", "start" if character == "^" else "end")
        return Node("any") if character == "." else Node("literal", character)

    def group(self, depth: int) -> Node:
        if self.take("?") and not self.take(":"):
            name = _NAME.match(self.pattern, self.place)
            if name is None:
                raise ValueError("it uses (?…) with a flag, a look around or a condition")
            self.place = name.end()
        inner = self.alternatives(depth + 1)
        if not self.take(")"):
            raise ValueError("missing ), unterminated subpattern")
        return Node("both", parts=(inner,))

    def set(self) -> Node:
        found = _SET.match(self.pattern, self.place)
        if found is None:
            raise ValueError("unterminated character set")
        self.place = found.end()
        return self.checked(found[0])

    def escape(self) -> Node:
        found = _ESCAPE.match(self.pattern, self.place)
        if found is None:
            raise ValueError("bad escape (end of pattern)")
        text, self.place = found[0], found.end()
        if text in _ASSERTIONS:
            return Node("assert", _ASSERTIONS[text])
        if text[1].isdigit() and text[1] != "0":
            raise ValueError(f"{text} refers to a group")
        if (len(text) == 2 and not text[1].isascii()) or not text[1].isalnum():
            return Node("literal", text[1])
        return self.checked(text)

    @staticmethod
    def checked(text: str) -> Node:
        if len(text) > _LONGEST:
            raise ValueError(f"a set of characters takes more than {_LONGEST}")
        try:
            one_character(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from error
        return Node("set", text)


_BRACES = re.compile(r"\{(\d*)(,(\d*))?\}")
_NAME = re.compile(r"P<[A-Za-z_]\w*>")
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|0[0-7]{0,2}|.)", re.DOTALL
)


def _count(digits: str) -> int:
    if len(digits) > 6 or int(digits) > MOST:
        raise ValueError(f"it repeats a part more than {MOST} times")
    return int(digits)
