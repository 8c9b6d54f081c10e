"""lotr export: a LoTR adapter as a LoRA that every server reads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
import typer

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.formats.directory import check_inputs_outside, expand
from lotrtensor.adapters.formats.layout import check_lora_output, output_format
from lotrtensor.adapters.formats.native import PEFT_TYPE
from lotrtensor.adapters.formats.publish import whole
from lotrtensor.adapters.loading import Adapter, load
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.sizes import check_dtype
from lotrtensor.cli.common import (
    AdapterPath,
    Force,
    Json,
    OutputPath,
    output_console,
    print_json,
    progress_bar,
)
from lotrtensor.errors import UnsupportedAdapterError, printable
from lotrtensor.report.documents import inspect_document
from lotrtensor.report.tables import error, lora_table, size_line
from lotrtensor.verbs._compare import compare
from lotrtensor.verbs._shared_outer import shared_outer


def export(
    adapter: AdapterPath,
    output: OutputPath,
    rank: Annotated[
        int | None, typer.Option(help="Largest LoRA rank; the original one if not given.")
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Pad the rank with zeros to a size that vLLM accepts.")
    ] = False,
    file_format: Annotated[
        Literal["peft", "kohya"] | None,
        typer.Option(
            "--format",
            help="A PEFT directory, or kohya's single file; what the LoRA was before if not given.",
        ),
    ] = None,
    experts: Annotated[
        Literal["parameters", "modules", "shared-outer"] | None,
        typer.Option(
            help="Layout of experts: PEFT's target_parameters, a module each, or stacks that "
            "share one side; what the adapter's target_parameters say if not given.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type to store: float32, float16, bfloat16, float8_e4m3fn, …"),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a LoTR adapter as a portable LoRA: alpha = r, scale baked in.

    A PEFT directory has one rank, for vLLM, SGLang and llama.cpp; a single file is for image
    models.

    Example: lotr export my-lotr -o my-lora

    Example: lotr export image-lotr -o image-lora.safetensors --format kohya

    With --experts a LoRA is taken as well: its experts are laid out anew, and brought to a shared
    side of --rank first where they are to share one.

    Example: lotr export moe-lotr -o moe-lora --experts shared-outer
    """
    check_inputs_outside(output, adapter, in_place=True)
    check_lora_output(output, force=force)
    lotr = load(adapter)
    is_lora = isinstance(lotr, LoraAdapter) and lotr.config.get("peft_type") != PEFT_TYPE
    if is_lora and experts is None:
        raise UnsupportedAdapterError(f"{adapter} is a LoRA already; expected a LoTR adapter")
    output_format(output, lotr.config, file_format)
    with progress_bar("exporting"):
        if dtype is not None:
            lotr = _stored_in(lotr, check_dtype(dtype))
        shared = experts == "shared-outer"
        lora = shared_outer(lotr, rank) if shared else lotr.to_lora(rank)
        with whole(expand(output), partial(check_lora_output, force=True), force=force) as place:
            lora.save(place, file_format=file_format, pad=pad, experts=experts)
            del lora  # as large as what is read again
            written = load(place)
            difference = compare(lotr, written).relative_error
        document = inspect_document(written) | {"relative_error": difference}
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(lora_table(document))
    console.print(f"{printable(output)}: {size_line(document)}", markup=False)
    console.print(
        f"relative difference to {printable(adapter)}: {error(document['relative_error'])}",
        markup=False,
    )


def _stored_in(adapter: Adapter, dtype: np.dtype) -> Adapter:
    """The adapter as one whose export has another type."""
    if isinstance(adapter, CompressedAdapter):
        return replace(adapter, source=replace(adapter.source, dtype=dtype))
    return replace(adapter, dtype=dtype)
