"""What the commands share: arguments, output streams, progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lotrtensor.convert import Progress as ProgressHook
from lotrtensor.report.documents import Document, dumps

# A string that is completed like a path: a Path would turn hf://owner/name into hf:/owner/name.
AdapterPath = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        path_type=str,
        help="Adapter directory, image model's LoRA file, or hf://owner/name.",
    ),
]
OutputPath = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")]
Tolerance = Annotated[
    float | None, typer.Option(help="Relative error of the whole adapter that is not exceeded.")
]
Energy = Annotated[float | None, typer.Option(help="Share of the squared norm to keep.")]
Budget = Annotated[
    str | None, typer.Option(help="Size at most: 500KB, 25% of the source, or 20000p parameters.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter that stands there.")]


def output_console() -> Console:
    """Console for results; wide enough for any table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_json(document: Document) -> None:
    """Print one JSON document on stdout."""
    typer.echo(dumps(document))


@contextmanager
def progress_bar() -> Iterator[ProgressHook]:
    """A progress bar on stderr that shows itself only after a second, and only on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task("")
    started = time.monotonic()

    def hook(name: str, done: int, total: int) -> None:
        bar.update(task, description=escape(name), completed=done, total=total)
        if console.is_terminal and time.monotonic() - started > 1.0:
            bar.start()

    try:
        yield hook
    finally:
        if bar.live.is_started:  # to stop what never started prints an empty line
            bar.stop()
