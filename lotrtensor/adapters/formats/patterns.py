"""Which of a config's patterns a module's path matches first, in time linear in path and patterns.

PEFT gives the patterns of ``rank_pattern`` and ``alpha_pattern`` to ``re``, which a pattern such as
``(a+)+b`` keeps busy for ever. Here all patterns of a config are walked at once, every state that
they can be in (Thompson, Regular expression search algorithm, Comm. ACM 11 (1968)): paths, and
patterns that are paths, in a tree of characters; the others in an automaton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lotrtensor.adapters.formats.regex import MOST, Node, one_character, parse
from lotrtensor.errors import FormatError

WORK = 3_000_000
"""States that are visited at most, beside `SHARE` for every character of the paths asked for."""

SHARE = 30

ANY = ""
"""Key of the branch for ``.``, all characters but a line break."""


@dataclass(eq=False)
class _Place:
    """A place in the tree of characters; ``label`` is the first pattern that ends there."""

    then: dict[str, _Place] = field(default_factory=dict)
    label: int | None = None


@dataclass(eq=False)
class _State:
    """A state: one that takes a character, one that asks for a place, or one that branches."""

    takes: Callable[[str], bool] | None = None
    asks: str = ""
    then: list[int] = field(default_factory=list)
    label: int | None = None


class Patterns:
    r"""Patterns as PEFT matches them: ``(.*\.)?(pattern)$`` from the beginning of a path.

    Parameters
    ----------
    patterns : iterable of str
        In their order.
    what : str
        Where they come from, named in messages.

    Raises
    ------
    FormatError
        If one is no regular expression, uses what is not matched here, or is too large.

    Examples
    --------
    >>> found = Patterns([r"layers\.\d+\.q", "^layers.0.k", "k"], "rank_pattern")
    >>> [found.first(path) for path in ("m.layers.3.q", "layers.0.k", "m.layers.0.k", "xk")]
    [0, 1, 2, None]
    """

    def __init__(self, patterns: Iterable[str], what: str) -> None:
        self._what, self._visits = what, WORK
        self._anchored, self._free = _Place(), _Place()
        self._states: list[_State] = []
        self._starts: list[int] = []
        self._steps: dict[tuple[frozenset[int], bool, int, str], frozenset[int]] = {}
        for label, pattern in enumerate(patterns):
            try:
                self._add(label, parse(pattern))
            except ValueError as error:
                raise FormatError(
                    f"{what} has {pattern[:80]!r}, which is no regular expression that is read "
                    f"here: {error}"
                ) from error

    def first(self, path: str) -> int | None:
        """Return the number of the first pattern that a path matches, or None.

        Raises
        ------
        FormatError
            If that takes more steps than patterns of modules do.
        """
        self._visits += SHARE * len(path)
        labels = [*self._in_tree(path), *(self._in_automaton(path) if self._starts else ())]
        return min(labels, default=None)

    def _add(self, label: int, tree: Node) -> None:
        parts = _flat(tree)
        anchored = bool(parts) and parts[0] == Node("assert", "start")
        simple = parts[1:] if anchored else parts
        if simple and simple[-1] == Node("assert", "end"):
            simple = simple[:-1]  # which is asked for in any case
        if any(part.kind not in ("literal", "any") for part in simple):
            accept = self._state(_State(label=label))
            self._starts.append(self._compile(tree, accept))
            return
        place = self._anchored if anchored else self._free
        for part in simple:
            key = ANY if part.kind == "any" else part.text
            place = place.then.setdefault(key, _Place())
        place.label = label if place.label is None else place.label

    def _state(self, state: _State) -> int:
        if len(self._states) >= MOST:
            raise ValueError(f"the patterns take more than {MOST} states")
        self._states.append(state)
        return len(self._states) - 1

    def _compile(self, node: Node, then: int) -> int:
        """Return the state from which ``node`` leads to the state ``then``."""
        if node.kind == "both":
            for part in reversed(node.parts):
                then = self._compile(part, then)
            return then
        if node.kind == "either":
            return self._state(_State(then=[self._compile(part, then) for part in node.parts]))
        if node.kind == "assert":
            return self._state(_State(asks=node.text, then=[then]))
        if node.kind == "repeat":
            return self._repeated(node, then)
        return self._state(_State(takes=_taker(node), then=[then]))

    def _repeated(self, node: Node, then: int) -> int:
        (part,) = node.parts
        if node.most is None:
            loop = self._state(_State())
            self._states[loop].then = [self._compile(part, loop), then]
            then = loop
        else:
            last = then
            for _ in range(node.most - node.least):
                then = self._state(_State(then=[self._compile(part, then), last]))
        for _ in range(node.least):
            then = self._compile(part, then)
        return then

    def _visit(self) -> None:
        self._visits -= 1
        if self._visits < 0:
            raise FormatError(
                f"{self._what} has patterns that take too long to match; expected names of modules"
            )

    def _in_tree(self, path: str) -> Iterator[int]:
        """The patterns of characters and dots alone that ``path`` matches."""
        places = [self._anchored]
        for at, character, begins in _walk(path):
            places += [self._free] if begins else []
            if at == len(path) or (at == len(path) - 1 and character == "\n"):
                yield from (place.label for place in places if place.label is not None)
            following = []
            for place in places:
                self._visit()
                if character in place.then:
                    following.append(place.then[character])
                if ANY in place.then and character not in ("\n", ""):
                    following.append(place.then[ANY])
            places = following

    def _in_automaton(self, path: str) -> Iterator[int]:
        """The other patterns that ``path`` matches."""
        current: frozenset[int] = frozenset()
        for at, character, begins in _walk(path):
            context = _context(path, at)
            if at == len(path) or (at == len(path) - 1 and character == "\n"):
                reached = self._reached(current, begins, context)
                yield from (x for s in reached if (x := self._states[s].label) is not None)
            key = current, begins, context, character
            if key not in self._steps:
                states = (self._states[s] for s in self._reached(current, begins, context))
                moved = (s.then[0] for s in states if s.takes and character and s.takes(character))
                self._steps[key] = frozenset(moved)
            current = self._steps[key]

    def _reached(self, current: frozenset[int], begins: bool, context: int) -> set[int]:
        """All states that are reached without a character."""
        waiting = [*current, *(self._starts if begins else ())]
        reached = set(waiting)
        while waiting:
            self._visit()
            state = self._states[waiting.pop()]
            if state.takes or (state.asks and not context & _BITS[state.asks]):
                continue
            for following in state.then:
                if following not in reached:
                    reached.add(following)
                    waiting.append(following)
        return reached


_BITS = {"start": 1, "end": 2, "boundary": 4, "inside": 8, "end of all": 16}


def _context(path: str, at: int) -> int:
    """Which assertions hold between two characters, as bits."""
    last = at == len(path)
    end = last or (at == len(path) - 1 and path[at] == "\n")
    before, after = at > 0 and _is_word(path[at - 1]), not last and _is_word(path[at])
    # In an empty text re finds neither a boundary nor its absence.
    boundary = 4 if before != after else 8 if path else 0
    return (at == 0) | 2 * end | boundary | 16 * last


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _walk(path: str) -> Iterator[tuple[int, str, bool]]:
    """Places in a path: the character that follows, and whether a pattern may begin there."""
    broken = False
    for at in range(len(path) + 1):
        begins = at == 0 or (path[at - 1] == "." and not broken)
        character = path[at] if at < len(path) else ""
        broken = broken or character == "\n"
        yield at, character, begins


def _flat(node: Node) -> list[Node]:
    """The parts of an expression that are one after another."""
    found, waiting = [], [node]
    while waiting:
        part = waiting.pop()
        if part.kind == "both":
            waiting += reversed(part.parts)
        else:
            found.append(part)
    return found


def _taker(node: Node) -> Callable[[str], bool]:
    if node.kind == "literal":
        return node.text.__eq__
    if node.kind == "any":
        return "\n".__ne__
    return one_character(node.text)
