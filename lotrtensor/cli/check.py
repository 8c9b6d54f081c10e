"""lotr check: whether the files of an adapter, or of a pack, are as they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lotrtensor.adapters.hub import fetch, is_remote
from lotrtensor.adapters.integrity import FileCheck, check_files
from lotrtensor.cli.common import Json, holds_pack, output_console, print_json, progress_bar
from lotrtensor.errors import FormatError, printable

NAMED = 3
"""Tensors of a file that a refusal names; it counts the others."""


def check(
    path: Annotated[
        str,
        typer.Argument(metavar="FILE", path_type=str, help="Adapter directory or file, or pack."),
    ],
    json: Json = False,
) -> None:
    """Compare every tensor of an adapter with its checksum; of a pack, decode every adapter too.

    Exit code 1 if one differs, or if a file holds no checksums: other programs write none.

    Example: lotr check my-lotr

    Example: lotr check a-pack
    """
    if holds_pack(path):
        from lotrtensor.cli.packs import check_pack

        check_pack(Path(path), json=json)
        return
    with progress_bar("checking"):
        files = check_files(fetch(path) if is_remote(path) else path)
    for file in files:
        _refuse(file)
    if json:
        print_json({"files": [{"path": str(f.path), "tensors": f.tensors} for f in files]})
        return
    console = output_console()
    for file in files:
        line = f"{printable(file.path)}: {file.tensors} tensors are as they were written"
        console.print(line, markup=False)


def _refuse(file: FileCheck) -> None:
    if not file.checked:
        raise FormatError(
            f"{file.path} holds no checksums to compare with: another program wrote it, or an "
            "older lotrtensor"
        )
    if file.damaged:
        more = ", …" if len(file.damaged) > NAMED else ""
        raise FormatError(
            f"{file.path}: {len(file.damaged)} of {file.tensors} tensors are not as they were "
            f"written ({', '.join(file.damaged[:NAMED])}{more}); fetch the file again"
        )
