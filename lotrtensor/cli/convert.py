"""lotr convert: a LoRA adapter into LoTR form."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.formats.directory import check_inputs_outside, check_output
from lotrtensor.adapters.formats.native import check_native
from lotrtensor.adapters.loading import load
from lotrtensor.adapters.lotr import LotrAdapter
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
from lotrtensor.errors import OptionError, printable
from lotrtensor.report.documents import compressed_document, lotr_document
from lotrtensor.report.tables import compressed_table, file_line, lotr_table, size_line
from lotrtensor.verbs._compress import compress as compress_adapter
from lotrtensor.verbs._convert import DEFAULT_BUDGET, check_lora
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
    bits: Annotated[
        int | None,
        typer.Option(help="Bits of a number, 1 to 16, instead of a type: a compressed adapter."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Convert a trained LoRA into LoTR form, and say exactly what was lost.

    With no rank, tolerance, energy or budget, a quarter of the bytes is kept.

    Example: lotr convert my-lora -o my-lotr --rank 16
    """
    check_inputs_outside(output, adapter, in_place=True)
    check_output(output, force=force)
    if bits is not None and (dtype is not None or cluster is not None):
        raise OptionError(
            f"{'dtype' if cluster is None else 'cluster'} and bits given; expected one of them"
        )
    goals = {"rank": rank, "tolerance": tolerance, "energy": energy, "budget": budget}
    unasked = all(goal is None for goal in goals.values())
    with progress_bar() as progress:
        source = load(adapter)
        check_native(source.config, source.extras, adapter)
        options: dict[str, Any] = {**goals, "group_by": group_by, "progress": progress}
        found: LotrAdapter | CompressedAdapter
        if bits is None:
            found = convert_adapter(source, **options, cluster=cluster, dtype=dtype)
        else:
            check_lora(source)
            options |= {"budget": DEFAULT_BUDGET} if unasked else {}
            found = compress_adapter(source, **options, form="lotr", bits=bits)
    found.save(output, force=force)
    if unasked:
        typer.echo(f"no rank given: kept to {DEFAULT_BUDGET} of the bytes", err=True)
    whole = isinstance(found, LotrAdapter)
    document = (
        lotr_document(found) if isinstance(found, LotrAdapter) else compressed_document(found)
    )
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(lotr_table(document) if whole else compressed_table(document))
    line = size_line(document) if whole else file_line(document)
    console.print(f"{printable(output)}: {line}", markup=False)
