"""lotr verify: how far two adapters are apart."""

from __future__ import annotations

from typing import Annotated

import typer

from lotrtensor.adapters.loading import load
from lotrtensor.cli.common import Json, output_console, print_json, progress_bar
from lotrtensor.report.documents import difference_document
from lotrtensor.report.tables import difference_table, error
from lotrtensor.verbs._compare import compare


def verify(
    a: Annotated[
        str, typer.Argument(metavar="A", path_type=str, help="The reference, LoRA or LoTR.")
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", path_type=str, help="The other one, LoRA or LoTR.")
    ],
    json: Json = False,
) -> None:
    """Compare the weight updates of two adapters, module by module.

    Example: lotr verify my-lora my-lotr
    """
    with progress_bar("comparing"):
        document = difference_document(compare(load(a), load(b)))
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(difference_table(document))
    console.print(
        f"relative difference {error(document['relative_error'])}, "
        f"largest of a module {error(document['max_slice_error'])}"
    )
