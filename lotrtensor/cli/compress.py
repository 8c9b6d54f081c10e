"""lotr compress: an adapter into the smallest file of an error, or the best one of a size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lotrtensor.adapters.calibration import Calibration
from lotrtensor.adapters.formats.directory import check_inputs_outside, check_output
from lotrtensor.adapters.loading import load
from lotrtensor.cli.common import (
    AdapterPath,
    Energy,
    Force,
    Json,
    OutputPath,
    Tolerance,
    output_console,
    print_json,
    progress_bar,
)
from lotrtensor.errors import printable
from lotrtensor.report.documents import compressed_document
from lotrtensor.report.tables import alternative_lines, compressed_table, file_line
from lotrtensor.verbs._compress import compress as compress_adapter


def compress(
    adapter: AdapterPath,
    output: OutputPath,
    budget: Annotated[
        str | None, typer.Option(help="Size of the output at most: 80KB, or 12% of the adapter's.")
    ] = None,
    tolerance: Tolerance = None,
    energy: Energy = None,
    form: Annotated[
        Literal["auto", "lotr", "lora"],
        typer.Option(help="Shared factors, terms of single modules, or what is better."),
    ] = "auto",
    bits: Annotated[
        str, typer.Option(help="auto: what every column is worth; 1 to 16: one width for all.")
    ] = "auto",
    group_by: Annotated[
        str, typer.Option(help="Which modules may share factors: type, shape, or PATTERNS.")
    ] = "type",
    calibration: Annotated[
        Path | None,
        typer.Option(help="What lotr calibrate measured: keep the outputs, not the updates."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compress an adapter into one small file, its bits spent where they reduce the error most.

    Example: lotr compress my-lora -o small --budget 10%
    """
    check_inputs_outside(output, adapter, in_place=True)
    check_output(output, force=force)
    with progress_bar() as progress:
        found = compress_adapter(
            load(adapter),
            budget=budget,
            tolerance=tolerance,
            energy=energy,
            form=form,
            bits=bits,
            group_by=group_by,
            calibration=None if calibration is None else Calibration.load(calibration),
            progress=progress,
        )
    found.save(output, force=force)
    document = compressed_document(found)
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(compressed_table(document))
    console.print(f"{printable(output)}: {file_line(document)}", markup=False)
    for line in alternative_lines(document):
        console.print(line, markup=False)
