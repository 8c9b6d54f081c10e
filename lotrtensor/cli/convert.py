"""lotr convert: a LoRA adapter into LoTR form."""

from __future__ import annotations

from typing import Annotated

import typer

from lotrtensor.adapters.formats.directory import check_inputs_outside, check_output
from lotrtensor.adapters.formats.native import check_native
from lotrtensor.adapters.loading import load
from lotrtensor.cli.common import (
    AdapterPath,
    Budget,
    Energy,
    Force,
    Json,
    OutputPath,
    Tolerance,
    output_console,
    print_json,
    progress_bar,
)
from lotrtensor.report.documents import lotr_document
from lotrtensor.report.tables import lotr_table, size_line
from lotrtensor.verbs._convert import DEFAULT_BUDGET
from lotrtensor.verbs._convert import convert as convert_adapter


def convert(
    adapter: AdapterPath,
    output: OutputPath,
    rank: Annotated[
        int | None, typer.Option(help="Left and right rank of every group, at most what it needs.")
    ] = None,
    tolerance: Tolerance = None,
    energy: Energy = None,
    budget: Budget = None,
    group_by: Annotated[
        str,
        typer.Option(
            help="Which modules share factors: type, shape, or PATTERNS such as 'qv=query|value'."
        ),
    ] = "type",
    cluster: Annotated[
        int | None, typer.Option(help="Split every group among this many pairs of factors.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type to store: float32, float16, bfloat16, float64, float8_e4m3fn, float8_e5m2."
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Convert a trained LoRA into LoTR form, and say exactly what was lost.

    With no rank, tolerance, energy or budget, a quarter of the bytes is kept.

    Example: lotr convert my-lora -o my-lotr --rank 16
    """
    check_output(output, force=force)
    check_inputs_outside(output, adapter, in_place=True)
    with progress_bar() as progress:
        source = load(adapter)
        check_native(source.config, source.extras, adapter)
        lotr = convert_adapter(
            source,
            rank=rank,
            tolerance=tolerance,
            energy=energy,
            budget=budget,
            group_by=group_by,
            cluster=cluster,
            dtype=dtype,
            progress=progress,
        )
    lotr.save(output, force=force)
    if all(goal is None for goal in (rank, tolerance, energy, budget)):
        typer.echo(f"no rank given: kept to {DEFAULT_BUDGET} of the bytes", err=True)
    document = lotr_document(lotr)
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(lotr_table(document))
    console.print(f"{output}: {size_line(document)}", markup=False)
