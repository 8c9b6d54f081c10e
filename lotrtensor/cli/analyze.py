"""lotr analyze: what each choice would cost and keep."""

from __future__ import annotations

from lotrtensor.adapters.loading import load
from lotrtensor.analyze import analyze as analyze_adapter
from lotrtensor.cli.common import AdapterPath, Json, output_console, print_json, progress_bar
from lotrtensor.report.documents import analysis_document
from lotrtensor.report.tables import analysis_table


def analyze(adapter: AdapterPath, json: Json = False) -> None:
    """Compare LoTR and truncated LoRA at several sizes: errors, bounds, bytes.

    Example: lotr analyze my-lora
    """
    source = load(adapter)
    with progress_bar() as progress:
        document = analysis_document(analyze_adapter(source, progress=progress))
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(analysis_table(document))
    console.print(document["recommendation"])
