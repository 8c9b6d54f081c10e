"""The command line ``lotr``: one file a command, parsing and printing only."""

import os
import sys

from lotrtensor.interrupts import CODE, end_as_usual


def main() -> None:
    """Run ``lotr``; a refusal is one sentence on stderr and exit code 1."""
    _open_streams()
    try:
        from lotrtensor.cli.app import run
    except KeyboardInterrupt:
        raise SystemExit(CODE) from None
    end_as_usual()
    run()


def _open_streams() -> None:
    """Let what is printed go nowhere where a stream is closed, and no file take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, closefd=False, encoding="utf-8"))
