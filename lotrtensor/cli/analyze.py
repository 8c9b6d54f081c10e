"""lotr analyze: what each choice would cost and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lotrtensor.adapters.loading import load
from lotrtensor.analysis import analyze as analyze_adapter
from lotrtensor.analysis import analyze_collection, similarity
from lotrtensor.cli.common import Json, holds_pack, output_console, print_json, progress_bar
from lotrtensor.errors import OptionError, printable
from lotrtensor.report.analysis import analysis_document
from lotrtensor.report.packs import collection_document, collection_line, collection_table
from lotrtensor.report.page import check_page, page, plotly_source, write_page
from lotrtensor.report.tables import analysis_table, similarity_table


def analyze(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            path_type=str,
            help="Adapter directories, image models' LoRA files, or hf://owner/name; or one pack.",
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

    Of a pack it tells which adapters are alike: clusters, outliers and duplicates.

    Example: lotr analyze my-lora -o report.html

    Example: lotr analyze a-pack
    """
    packs = [path for path in adapters if holds_pack(path)]
    if packs:
        if len(adapters) > 1 or output is not None:
            raise OptionError(
                f"{packs[0]} is a pack, which is analysed by itself and has no page; leave out "
                "other adapters and --output"
            )
        _show_collection(packs[0], json=json)
        return
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


def _show_collection(path: str, *, json: bool) -> None:
    from lotrtensor.packs.pack import Pack

    found = Pack(path)
    document = collection_document(
        analyze_collection({name: found.unpack(name) for name in found.names})
    )
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(collection_table(document))
    console.print(printable(collection_line(document)), markup=False)
