"""lotr extract: weight deltas of two checkpoints as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lotrtensor.adapters.formats.directory import check_inputs_outside, check_output
from lotrtensor.adapters.formats.layout import output_format
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.cli.common import (
    Budget,
    Energy,
    FanInFanOut,
    Force,
    Json,
    OutputPath,
    Tolerance,
    output_console,
    print_json,
    progress_bar,
)
from lotrtensor.errors import printable
from lotrtensor.report.documents import inspect_document, lotr_document
from lotrtensor.report.tables import error, lora_table, lotr_table, size_line
from lotrtensor.verbs._extract import extract as extract_adapter
from lotrtensor.verbs._extract import extraction_error


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
    allocation: Annotated[
        Literal["optimal", "uniform"],
        typer.Option(help="A LoRA's ranks: the best of every module, or one for all."),
    ] = "optimal",
    modules: Annotated[
        str | None, typer.Option(help="Only modules in whose path this regular expression occurs.")
    ] = None,
    fan_in_fan_out: FanInFanOut = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN", help="Embeddings, where the model's class does not tell them."
        ),
    ] = None,
    resized: Annotated[
        Literal["refuse", "common-rows"],
        typer.Option(help="Weights with more rows on one side: refuse, or take those in common."),
    ] = "refuse",
    dtype: Annotated[str | None, typer.Option(help="Type to store.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fit an adapter to the difference of two checkpoints, slice by slice.

    Example: lotr extract --base base-model --tuned tuned-model -o adapter --rank 16
    """
    check_inputs_outside(output, base, tuned)
    check_output(output, force=force)
    if form == "lora":
        output_format(output, {})
    with progress_bar() as progress:
        found = extract_adapter(
            base,
            tuned,
            rank=rank,
            tolerance=tolerance,
            energy=energy,
            budget=budget,
            form=form,
            group_by=group_by,
            allocation=allocation,
            modules=modules,
            fan_in_fan_out=fan_in_fan_out or False,
            embeddings=embeddings,
            resized=resized,
            dtype=dtype,
            progress=progress,
        )
    console = output_console()
    if isinstance(found, LoraAdapter):
        found.save(output, uniform=False, force=force)
        told = extraction_error(
            base,
            tuned,
            LoraAdapter.load(output),
            modules=modules,
            resized=resized,
            fan_in_fan_out=fan_in_fan_out or False,
            embeddings=embeddings,
        )
        document = inspect_document(found) | {"relative_error": told}
        table = lora_table(document)
    else:
        found.save(output, force=force)
        document = lotr_document(found)
        table = lotr_table(document)
    if json:
        print_json(document)
        return
    console.print(table)
    line = size_line({key: document[key] for key in ("parameters", "bytes")})
    console.print(f"{printable(output)}: {line}", markup=False)
    if isinstance(found, LoraAdapter):
        console.print(f"relative error: {error(document['relative_error'])}")
