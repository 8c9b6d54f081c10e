"""lotr analyze: what each choice would cost and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lotrtensor.adapters.loading import load
from lotrtensor.analysis import analyze as analyze_adapter
from lotrtensor.analysis import similarity
from lotrtensor.cli.common import Json, output_console, print_json, progress_bar
from lotrtensor.errors import printable
from lotrtensor.report.analysis import analysis_document
from lotrtensor.report.page import check_page, page, plotly_source, write_page
from lotrtensor.report.tables import analysis_table, similarity_table


def analyze(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            path_type=str,
            help="Adapter directories, image models' LoRA files, or hf://owner/name.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PAGE", help="Page to write, one HTML file."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a page that stands there.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare LoTR and truncated LoRA at every size, and adapters with one another.

    With an output it writes one HTML page that opens from disk, needs no network, and lets you
    choose a size by eye.

    Example: lotr analyze my-lora -o report.html
    """
    drawing = None
    if output is not None:
        drawing = plotly_source()
        check_page(output, force=force)
    sources = [load(adapter) for adapter in adapters]
    with progress_bar() as progress:
        analyses = [analyze_adapter(source, progress=progress) for source in sources]
        alike = similarity(sources) if len(sources) > 1 else None
    document = analysis_document(adapters, sources, analyses, alike)
    if output is not None and drawing is not None:
        write_page(output, page(document, drawing), force=force)
    if json:
        print_json(document)
        return
    console = output_console()
    for entry in document["adapters"]:
        console.print(analysis_table(entry))
        console.print(printable(entry["recommendation"]), markup=False)
    if document["similarity"]:
        console.print(similarity_table(document["similarity"]))
    if output is not None:
        console.print(f"{printable(output)}: open it in a browser", markup=False)
