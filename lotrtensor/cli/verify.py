"""lotr verify: how far two adapters are apart."""

from __future__ import annotations

from typing import Annotated

import typer

from lotrtensor.adapters.loading import load
from lotrtensor.cli.common import Json, holds_pack, output_console, print_json, progress_bar
from lotrtensor.errors import FormatError
from lotrtensor.report.documents import difference_document
from lotrtensor.report.tables import difference_table, error
from lotrtensor.verbs._compare import compare


def verify(
    a: Annotated[
        str,
        typer.Argument(metavar="A", path_type=str, help="The reference, LoRA or LoTR; or a pack."),
    ],
    b: Annotated[
        list[str],
        typer.Argument(
            metavar="B...",
            path_type=str,
            help="The other one; or originals of a pack's.",
        ),
    ],
    json: Json = False,
) -> None:
    """Compare the weight updates of two adapters, module by module; or of a pack and its originals.

    Example: lotr verify my-lora my-lotr

    Example: lotr verify a-pack tuned-1 tuned-2
    """
    if holds_pack(a):
        _verify_pack(a, b, json=json)
        return
    if len(b) != 1:
        raise FormatError(
            f"{a} is no pack, and is compared with one adapter; found {len(b)} of them"
        )
    with progress_bar("comparing"):
        document = difference_document(compare(load(a), load(b[0])))
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(difference_table(document))
    console.print(
        f"relative difference {error(document['relative_error'])}, "
        f"largest of a module {error(document['max_slice_error'])}"
    )


def _verify_pack(path: str, originals: list[str], *, json: bool) -> None:
    from lotrtensor.cli.packs import named
    from lotrtensor.packs.pack import Pack
    from lotrtensor.packs.verifying import VerifiedRow
    from lotrtensor.report.packs import verified_document, verified_table

    pack = Pack(path)
    rows: list[VerifiedRow] = []
    with progress_bar("comparing") as progress:
        sources = named(originals)
        for done, (name, source) in enumerate(sources.items()):
            progress(name, done, len(sources))
            rows += pack.verify({name: load(str(source))})
    document = verified_document(rows)
    if json:
        print_json(document)
        return
    output_console().print(verified_table(document))
