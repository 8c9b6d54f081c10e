"""Names and texts of files as a terminal may show them: no character that it would obey."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    RenderableType,
    RenderHook,
    RenderResult,
)
from rich.markup import escape
from rich.segment import Segment

from lotrtensor.errors import printable


def shown_name(text: object) -> str:
    r"""Return a text of a file on one line, without control characters and without markup.

    >>> shown_name("q\x1b[2J[red]")
    'q\\x1b[2J\\[red]'
    """
    return escape(printable(text))


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return a console that prints no control characters but its own."""
    console = Console(stderr=stderr, width=width, emoji=False)
    console.push_render_hook(_Plain())
    return console


class _Plain(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


class _Shown:
    """What is shown of something that rich renders: colours are not in its text yet."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return _without_controls(console.render(self._inner, options))


def _without_controls(segments: Iterable[Segment]) -> Iterable[Segment]:
    for segment in segments:
        if segment.control or segment.text.isprintable():
            yield segment
        else:
            lines = segment.text.split("\n")
            yield Segment("\n".join(map(printable, lines)), segment.style)
