"""lotr export: a LoTR adapter as a LoRA that every server reads."""

from __future__ import annotations

from typing import Annotated

import typer

from lotrtensor.adapters.formats.directory import check_output
from lotrtensor.adapters.loading import load
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.cli.common import AdapterPath, Force, Json, OutputPath, output_console, print_json
from lotrtensor.compare import compare
from lotrtensor.errors import UnsupportedAdapterError
from lotrtensor.report.documents import inspect_document
from lotrtensor.report.tables import error, lora_table, size_line


def export(
    adapter: AdapterPath,
    output: OutputPath,
    rank: Annotated[
        int | None, typer.Option(help="Largest LoRA rank; the original one if not given.")
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Pad the rank with zeros to a size that vLLM accepts.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a LoTR adapter as a portable PEFT LoRA: one rank, alpha = r, scale baked in.

    Example: lotr export my-lotr -o my-lora
    """
    check_output(output, force=force)
    lotr = load(adapter)
    if not isinstance(lotr, LotrAdapter):
        raise UnsupportedAdapterError(f"{adapter} is a LoRA already; expected a LoTR adapter")
    lora = lotr.to_lora(rank)
    lora.save(output, force=force, pad=pad)
    written = load(output)
    document = inspect_document(written) | {"relative_error": compare(lotr, written).relative_error}
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(lora_table(document))
    console.print(f"{output}: {size_line(document)}", markup=False)
    console.print(
        f"relative difference to {adapter}: {error(document['relative_error'])}", markup=False
    )
