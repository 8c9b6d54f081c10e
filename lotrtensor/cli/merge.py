"""lotr merge: base weights and an adapter's update as one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lotrtensor.adapters.formats.checkpoint_writer import check_checkpoint_output
from lotrtensor.adapters.formats.directory import check_inputs_outside
from lotrtensor.adapters.loading import load
from lotrtensor.cli.common import (
    AdapterPath,
    FanInFanOut,
    Force,
    Json,
    OutputPath,
    output_console,
    print_json,
)
from lotrtensor.errors import printable
from lotrtensor.verbs._merge import merge as merge_adapter


def merge(
    adapter: AdapterPath,
    base: Annotated[Path, typer.Option(help="Checkpoint that the adapter was trained on.")],
    output: OutputPath,
    fan_in_fan_out: FanInFanOut = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write base + ΔW as a checkpoint, shard by shard, every tensor in its own type.

    Example: lotr merge my-lotr --base base-model -o merged-model
    """
    check_checkpoint_output(output, force=force)
    check_inputs_outside(output, adapter)
    changed = merge_adapter(base, load(adapter), output, fan_in_fan_out=fan_in_fan_out, force=force)
    if json:
        print_json({"changed": list(changed)})
        return
    output_console().print(f"{printable(output)}: {len(changed)} weights changed", markup=False)
