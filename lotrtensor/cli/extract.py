"""lotr extract: weight deltas of two checkpoints as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lotrtensor.adapters.formats.directory import check_output
from lotrtensor.cli.common import (
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
from lotrtensor.extract import extract as extract_adapter
from lotrtensor.report.documents import lotr_document
from lotrtensor.report.tables import lotr_table, size_line


def extract(
    base: Annotated[Path, typer.Option(help="Checkpoint before fine-tuning.")],
    tuned: Annotated[Path, typer.Option(help="Checkpoint after fine-tuning.")],
    output: OutputPath,
    rank: Annotated[int | None, typer.Option(help="Rank of every group at most.")] = None,
    tolerance: Tolerance = None,
    energy: Energy = None,
    budget: Budget = None,
    form: Annotated[
        Literal["lotr", "lora"], typer.Option(help="Factors shared by groups, or a PEFT LoRA.")
    ] = "lotr",
    group_by: Annotated[str, typer.Option(help="type, shape, or PATTERNS.")] = "type",
    modules: Annotated[
        str | None, typer.Option(help="Only modules in whose path this regular expression occurs.")
    ] = None,
    fan_in_fan_out: Annotated[
        bool, typer.Option("--fan-in-fan-out", help="Weights are in × out, as in GPT-2.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="Type to store.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fit an adapter to the difference of two checkpoints, slice by slice.

    Example: lotr extract --base base-model --tuned tuned-model -o adapter --rank 16
    """
    check_output(output, force=force)
    with progress_bar() as progress:
        lotr = extract_adapter(
            base,
            tuned,
            rank=rank,
            tolerance=tolerance,
            energy=energy,
            budget=budget,
            group_by="none" if form == "lora" else group_by,
            modules=modules,
            fan_in_fan_out=fan_in_fan_out,
            dtype=dtype,
            progress=progress,
        )
    (lotr.to_lora() if form == "lora" else lotr).save(output, force=force)
    document = lotr_document(lotr)
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(lotr_table(document))
    console.print(f"{output}: {size_line(document)}", markup=False)
