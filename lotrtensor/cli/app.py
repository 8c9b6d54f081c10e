"""The application: its commands, and how a refusal is said."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import warnings
from typing import NoReturn

import typer

import lotrtensor
from lotrtensor.cli.allocator import keep_freed_memory
from lotrtensor.cli.commands import Commands
from lotrtensor.errors import LotrError, printable

app = typer.Typer(
    name="lotr",
    cls=Commands,
    help="Low tensor rank adapters: convert trained LoRA adapters into LoTR form, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="New here? [bold]lotr demo[/] does all of the main job on an adapter that comes with "
    "the package; [bold]lotr COMMAND --help[/] shows an example of every command.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lotr {lotrtensor.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and stop.",
        callback=_print_version,
        is_eager=True,
    ),
) -> None:
    """Take the options that come before a command."""


def run() -> None:
    """Run ``lotr``; a refusal is one sentence on stderr and exit code 1.

    An interrupt ends with 130, and so does what typer's own handler sees of it.
    """
    keep_freed_memory()
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × and ΔW still gets the rest
    try:
        try:
            app(prog_name="lotr")
        finally:
            sys.stdout.flush()
    except LotrError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except MemoryError as error:
        _refuse(f"out of memory: {printable(error) or 'an array does not fit'}")
    except OSError as error:
        # Only what is printed gets here: files are named by the errors above.
        _close_stdout()
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        _refuse(f"the output cannot be printed: {printable(error.strerror or error)}")


def _refuse(message: str) -> NoReturn:
    _say(f"lotr: error: {message}")
    raise SystemExit(1) from None


def _close_stdout() -> None:
    """Let what is left in the buffer go nowhere, or the interpreter complains on its way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"lotr: warning: {printable(message)}")


def _say(line: str) -> None:
    """Print a line for the user; where that fails, the exit code says as much."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
