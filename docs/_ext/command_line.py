"""The reference of the command line, written by Typer from the commands themselves."""

import html
import re
import subprocess
import sys
from pathlib import Path

COMMAND = ["-m", "typer", "lotrtensor.cli.app", "utils", "docs", "--name", "lotr"]


def setup(app):
    """Write the page before Sphinx reads its sources."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write(app):
    run = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, check=True)
    text = html.unescape(run.stdout).replace("# `lotr`", "# Command line", 1)
    text = re.sub(r"^Example: (lotr .*?)$", r"```sh\n\1\n```", text, flags=re.MULTILINE)
    # Typer cuts the summaries of its list short.
    commands = re.findall(r"^## `lotr (\S+)`\n\n(.+)$", text, flags=re.MULTILINE)
    rows = [f"* [`{name}`](#lotr-{name}): {summary}" for name, summary in commands]
    text = re.sub(r"(?<=\*\*Commands\*\*:\n\n)(\* .*\n)+", "\n".join(rows) + "\n", text, count=1)
    path = Path(app.srcdir) / "reference" / "cli.md"
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
