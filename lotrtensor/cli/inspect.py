"""lotr inspect: what an adapter holds."""

from __future__ import annotations

from typing import Annotated

import typer

from lotrtensor.adapters.loading import load
from lotrtensor.cli.common import (
    AdapterPath,
    Json,
    holds_pack,
    output_console,
    print_json,
    progress_bar,
)
from lotrtensor.errors import printable
from lotrtensor.report.documents import inspect_document
from lotrtensor.report.spectra import add_spectra, spectra_table
from lotrtensor.report.tables import adapter_table, size_line


def inspect(
    adapter: AdapterPath,
    group_by: Annotated[
        str, typer.Option(help="Grouping to show a LoRA by: type, shape or PATTERNS.")
    ] = "type",
    spectra: Annotated[
        bool | None,
        typer.Option(
            "--spectra/--no-spectra",
            help="Singular values of the groups; where all take some seconds if not given.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what an adapter holds: groups, shapes, ranks, errors, sizes, singular values; or a pack.

    Example: lotr inspect my-adapter

    Example: lotr inspect a-pack
    """
    if holds_pack(adapter):
        from lotrtensor.cli.packs import show_pack
        from lotrtensor.packs.pack import Pack

        show_pack(Pack(adapter), json=json)
        return
    with progress_bar():
        source = load(adapter)
        document = inspect_document(source, group_by)
        add_spectra(document, source, asked=spectra)
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(adapter_table(document))
    if all(group["singular_values"] for group in document["groups"]):
        console.print(spectra_table(document))
    elif spectra is None:
        console.print("singular values are left out, which take long: add --spectra")
    console.print(f"{size_line(document)}, {document['dtype']}")
    if document["file_style"]:
        style = printable(document["file_style"])
        console.print(f"single file of an image model, {style} keys", markup=False)
    if document["base_model"]:
        console.print(f"base model: {printable(document['base_model'])}", markup=False)
    if document["carried_tensors"]:
        carried = ", ".join(map(printable, document["carried_tensors"]))
        console.print(f"carried unchanged: {carried}", markup=False)
