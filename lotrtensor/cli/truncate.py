"""lotr truncate: an adapter to lower ranks."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.formats.directory import (
    check_inputs_outside,
    check_output,
    expand,
)
from lotrtensor.adapters.formats.layout import check_lora_output, output_format
from lotrtensor.adapters.formats.publish import whole
from lotrtensor.adapters.loading import load
from lotrtensor.adapters.lora import LoraAdapter
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
from lotrtensor.errors import RankError, printable
from lotrtensor.report.documents import inspect_document
from lotrtensor.report.tables import (
    compressed_table,
    error,
    file_line,
    lora_table,
    lotr_table,
    size_line,
)
from lotrtensor.verbs._compare import compare
from lotrtensor.verbs._truncate import padded_rank
from lotrtensor.verbs._truncate import truncate as truncate_adapter


def truncate(
    adapter: AdapterPath,
    output: OutputPath,
    rank: Annotated[int | None, typer.Option(help="Largest rank of a module or group.")] = None,
    tolerance: Tolerance = None,
    energy: Energy = None,
    budget: Budget = None,
    allocation: Annotated[
        Literal["optimal", "uniform"],
        typer.Option(help="A LoRA's ranks: the best of every module, or one for all."),
    ] = "optimal",
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="One rank for all of a LoRA, zero-padded: vLLM and llama.cpp need it."
        ),
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Lower the ranks of an adapter: a LoRA stays a LoRA, a LoTR a LoTR.

    Example: lotr truncate my-lora -o small-lora --budget 25%
    """
    check_inputs_outside(output, adapter, in_place=True)
    check_lora_output(output, force=force)
    source = load(adapter)
    if isinstance(source, LoraAdapter):
        output_format(output, source.config)
    else:
        check_output(output, force=force)
        if uniform:
            raise RankError(f"--uniform is for a LoRA; {adapter} is a LoTR")
    if isinstance(source, LoraAdapter) and uniform:
        # Padding is paid for: one rank is chosen for all, and a budget buys it for every module.
        allocation = "uniform"
        if budget is not None and rank is None and tolerance is None and energy is None:
            rank, budget = padded_rank(source, budget), None
    with progress_bar() as progress:
        found = truncate_adapter(
            source,
            rank=rank,
            tolerance=tolerance,
            energy=energy,
            budget=budget,
            allocation=allocation,
            progress=progress,
        )
    with whole(expand(output), partial(check_lora_output, force=True), force=force) as place:
        if isinstance(found, LoraAdapter):
            found.save(place, uniform=uniform)
        else:
            found.save(place)
        written = load(place)
        document = inspect_document(written) | {
            "relative_error": compare(source, written).relative_error,
            "source_parameters": source.parameters,
            "source_bytes": source.bytes,
        }
    if json:
        print_json(document)
        return
    console = output_console()
    if isinstance(found, CompressedAdapter):
        console.print(compressed_table(document))
        console.print(f"{printable(output)}: {file_line(document)}", markup=False)
    else:
        console.print(lora_table(document) if document["type"] == "LORA" else lotr_table(document))
        console.print(f"{printable(output)}: {size_line(document)}", markup=False)
    console.print(f"relative error: {error(document['relative_error'])}")
