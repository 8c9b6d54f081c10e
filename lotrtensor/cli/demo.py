"""lotr demo: the main job on the bundled adapter."""

from __future__ import annotations

import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from lotrtensor.adapters.loading import load
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.cli.common import Json, output_console, print_json
from lotrtensor.report.documents import Document, lotr_document
from lotrtensor.report.tables import error, lotr_table, size_line
from lotrtensor.verbs._compare import compare
from lotrtensor.verbs._convert import convert

RANK = 16


def demo(json: Json = False) -> None:
    """Convert the bundled trained adapter, write it, export it back, and verify both.

    Example: lotr demo
    """
    with as_file(files("lotrtensor") / "data" / "amazon-sentiment") as source:
        document = _run(source)
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(
        "A LoRA of rank 8 on a 6-layer sentence encoder, trained on Amazon review snippets:"
    )
    console.print(f"[bold]lotr convert amazon-sentiment -o lotr --rank {RANK}")
    console.print(lotr_table(document))
    console.print(size_line(document))
    console.print("[bold]\nlotr export lotr -o lora[/]  and  [bold]lotr verify")
    console.print(f"LoTR against its export as LoRA:    {error(document['export_difference'])}")
    console.print(f"original LoRA against that export:  {error(document['round_trip_error'])}")


def _run(source: Path) -> Document:
    lora = load(source)
    with tempfile.TemporaryDirectory() as scratch:
        lotr_path, lora_path = Path(scratch) / "lotr", Path(scratch) / "lora"
        convert(lora, rank=RANK).save(lotr_path)
        lotr = LotrAdapter.load(lotr_path)
        lotr.to_lora().save(lora_path)
        exported = load(lora_path)
    return lotr_document(lotr) | {
        "export_difference": compare(lotr, exported).relative_error,
        "round_trip_error": compare(lora, exported).relative_error,
    }
