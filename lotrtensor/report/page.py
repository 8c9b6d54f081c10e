"""An analysis as one HTML page: opens from disk, loads nothing, runs no script but its own."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import importlib.util
import json
import string
from functools import partial
from importlib.resources import files
from pathlib import Path

from lotrtensor.adapters.formats.directory import check_file_output, expand, write_file
from lotrtensor.adapters.formats.paths import exists, open_regular
from lotrtensor.errors import FormatError, LotrError
from lotrtensor.report.documents import Document, finite

SCRIPTS = ("format.js", "tables.js", "plots.js", "sizes.js", "sharing.js", "main.js")
"""Parts of the page's own script, in their order."""

MARK = '<meta name="generator" content="lotrtensor">'
"""What tells a page of ours from another file: only that is ever replaced."""


def plotly_source() -> str:
    """Return the source of plotly.js, from the installed package.

    Raises
    ------
    LotrError
        If plotly is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        raise LotrError(
            "the page is drawn by plotly, which is not installed: pip install 'lotrtensor[report]'"
        )
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    return source


def page(document: Document, plotly: str) -> str:
    """Return the page of an analysis document.

    Parameters
    ----------
    document : dict
        See `analysis_document`; it is embedded as it is.
    plotly : str
        Source of plotly.js, embedded once, compressed.

    Notes
    -----
    The page carries a content security policy that allows the scripts with the hashes of those
    embedded, and no connection at all; names that come from files are text everywhere.
    """
    scripts = "".join(_part(name) for name in SCRIPTS)
    own = f'(function () {{\n"use strict";\n{scripts}}})();\n'
    names = ", ".join(adapter["name"] for adapter in document["adapters"])
    return string.Template(_part("template.html")).substitute(
        policy=f"'{_digest(own)}' '{_digest(plotly)}'",
        mark=MARK,
        title=html.escape(names),
        version=html.escape(document["lotrtensor"]),
        style=_part("style.css"),
        data=_embedded(document),
        plotly=base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode(),
        script=own,
    )


def check_page(path: Path, *, force: bool) -> None:
    """Refuse an output that exists, before any work is done.

    Raises
    ------
    FormatError
        If ``path`` exists and ``force`` is not given, or is no page of ours, which ``force`` does
        not replace either.
    """
    check_file_output(path, force=force)
    path = expand(path)
    if not exists(path):
        return
    try:
        with open_regular(path) as file:
            ours = MARK.encode() in file.read(4096)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    if not ours:
        raise FormatError(
            f"{path} exists and is not a page of lotr analyze; it is not replaced: choose another "
            "output"
        )


def write_page(path: Path, text: str, *, force: bool) -> None:
    """Write a page, whole or not at all.

    Raises
    ------
    FormatError
        If the output may not be replaced, or cannot be written; nothing has changed then.
    """
    check_page(path, force=force)
    # A path that is no UTF-8 is in the title: what stands for its bytes is replaced.
    content = text.encode(errors="replace")
    write_file(expand(path), content, force=force, check=partial(check_page, force=True))


def _part(name: str) -> str:
    return (files("lotrtensor") / "report" / "page_parts" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _embedded(document: Document) -> str:
    """The document as JSON that cannot end the element it stands in."""
    text = json.dumps(finite(document), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
