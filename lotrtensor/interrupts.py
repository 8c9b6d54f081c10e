"""Ctrl-C while the command line is still loading: it ends at once, and says nothing.

The package imports this module before all else. Where it is the command ``lotr`` that imports the
package, nothing has been begun yet that would have to be cleaned up, and an interrupt inside an
import would end in a traceback of whatever was being imported.
"""

from __future__ import annotations

import os
import signal
import sys

CODE = 130
"""Exit code of what was interrupted: 128 and the number of the signal."""


def end_while_loading() -> None:
    """Let an interrupt end the process, if it is the command ``lotr`` that starts."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119 - pathlib is not loaded
    if name.removesuffix(".exe").removesuffix("-script.py") == "lotr":
        _handle(lambda *_: os._exit(CODE))


def end_as_usual() -> None:
    """Let an interrupt be a KeyboardInterrupt from now on, also in a process in the background."""
    _handle(signal.default_int_handler)


def _handle(handler: object) -> None:
    try:
        signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    except ValueError:  # not the main thread, which alone is interrupted
        return


end_while_loading()
