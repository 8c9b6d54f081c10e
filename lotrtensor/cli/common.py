"""What the commands share: arguments, output streams, progress."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.errors import LotrError
from lotrtensor.packs.files import is_pack
from lotrtensor.report.documents import Document, dumps
from lotrtensor.report.names import plain_console, shown_name

if TYPE_CHECKING:
    from lotrtensor.verbs._fit_groups import Progress as ProgressHook

# A string that is completed like a path: a Path would turn hf://owner/name into hf:/owner/name.
AdapterPath = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        path_type=str,
        help="Adapter directory, image model's LoRA file, or hf://owner/name.",
    ),
]
OutputPath = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
Tolerance = Annotated[
    float | None, typer.Option(help="Relative error of the whole adapter that is not exceeded.")
]
Energy = Annotated[float | None, typer.Option(help="Share of the squared norm to keep.")]
Budget = Annotated[
    str | None, typer.Option(help="Size at most: 500KB, 25% of the source, or 20000p parameters.")
]
FanInFanOut = Annotated[
    str | None,
    typer.Option(
        "--fan-in-fan-out",
        metavar="PATTERN",
        help="Modules stored in × out, as in GPT-2, where nothing else tells; '.' for all.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter that stands there.")]


def holds_pack(path: str) -> bool:
    """Whether a path is the directory of a pack; what is no path is left to who reads it."""
    try:
        return is_pack(expand(path))
    except (LotrError, OSError):
        return False


def output_console() -> Console:
    """Console for results; wide enough for any table where it is no terminal."""
    console = plain_console()
    return console if console.is_terminal else plain_console(width=160)


def print_json(document: Document) -> None:
    """Print one JSON document on stdout."""
    typer.echo(dumps(document))


class _Rate(ProgressColumn):
    """Items a second, or seconds an item where that is more."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task; nothing before its first item is done."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def progress_bar(description: str = "reading") -> Iterator[ProgressHook]:
    """A progress bar on stderr with rate and time left: after a second, and only on a terminal."""
    columns = (
        *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(_Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    console = plain_console(stderr=True)
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(description, total=None)

    def hook(name: str, done: int, total: int) -> None:
        bar.update(task, description=shown_name(name), completed=done, total=total)

    timer = threading.Timer(1.0, bar.start)
    timer.daemon = True
    if console.is_interactive and sys.stderr.isatty():
        timer.start()
    try:
        yield hook
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()  # the bar must not start after it was stopped
        if bar.live.is_started:  # to stop what never started prints an empty line
            bar.stop()
