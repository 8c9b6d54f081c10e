"""The application: its commands, and how a refusal is said."""

from __future__ import annotations

import sys
import warnings

import typer

import lotrtensor
from lotrtensor.cli import analyze, convert, demo, export, extract, inspect, merge, truncate, verify
from lotrtensor.errors import LotrError, printable

app = typer.Typer(
    name="lotr",
    help="Low tensor rank adapters: convert trained LoRA adapters into LoTR form, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    inspect.inspect,
    convert.convert,
    truncate.truncate,
    export.export,
    analyze.analyze,
    verify.verify,
    extract.extract,
    merge.merge,
    demo.demo,
):
    app.command()(command)


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


def main() -> None:
    """Run ``lotr``; a refusal is one sentence on stderr and exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except LotrError as error:
        print(f"lotr: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"lotr: warning: {printable(message)}", file=sys.stderr)
