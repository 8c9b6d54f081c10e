"""lotr calibrate and lotr heal: what a model does on a text, measured, and kept by an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lotrtensor.adapters.formats.directory import (
    check_file_output,
    check_inputs_outside,
    check_output,
    expand,
)
from lotrtensor.adapters.loading import load
from lotrtensor.cli.common import AdapterPath, Force, Json, OutputPath, output_console, print_json
from lotrtensor.errors import (
    DataError,
    FormatError,
    LotrError,
    MissingPackageError,
    OptionError,
    printable,
)

if TYPE_CHECKING:
    from lotrtensor.adapters.loading import Adapter

BasePath = Annotated[Path, typer.Option(help="The base model, as transformers saves it.")]
TextPath = Annotated[
    Path, typer.Option(help="Text of the kind that the adapter is for, a line each; no labels.")
]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a text at most.")]
Batch = Annotated[int, typer.Option(min=1, help="Texts that go through the model at once.")]


def calibrate(
    adapter: AdapterPath,
    base: BasePath,
    text: TextPath,
    output: OutputPath,
    length: Length = 512,
    batch: Batch = 8,
    rank: Annotated[
        int, typer.Option(min=1, help="Directions of every layer's input and output to keep.")
    ] = 64,
    force: Force = False,
    json: Json = False,
) -> None:
    """Measure on a text which errors of an adapter its model's outputs see, for lotr compress.

    Example: lotr calibrate my-lora --base base-model --text texts.txt -o my-lora.calibration
    """
    check_inputs_outside(output, adapter, base, text)
    check_file_output(output, force=force)
    _check_no_input(output, adapter, base)
    found = load(adapter)
    model, batches = _inputs(found, base, text, length, batch)
    from lotrtensor.torch.calibration import calibrate as calibrate_adapter

    with _said_of(base, text):
        calibration = calibrate_adapter(model, found, batches, rank=rank)
    calibration.save(output, force=force)
    if json:
        print_json({"modules": len(calibration.modules), "places": calibration.places})
        return
    output_console().print(
        f"{printable(output)}: {len(calibration.modules)} modules, measured on "
        f"{calibration.places:,} tokens",
        markup=False,
    )


def heal(
    compressed: Annotated[
        str, typer.Argument(metavar="COMPRESSED", path_type=str, help="What lotr compress wrote.")
    ],
    original: Annotated[
        str, typer.Argument(metavar="ORIGINAL", path_type=str, help="The adapter before.")
    ],
    base: BasePath,
    text: TextPath,
    output: OutputPath,
    length: Length = 512,
    batch: Batch = 8,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fit the values of a compressed adapter's terms to what the original makes of a text.

    Example: lotr heal small my-lora --base base-model --text texts.txt -o healed
    """
    check_inputs_outside(output, original, base, text)
    check_inputs_outside(output, compressed, in_place=True)
    check_output(output, force=force)
    small, before = load(compressed), load(original)
    from lotrtensor.adapters.compressed import CompressedAdapter

    if not isinstance(small, CompressedAdapter):
        raise DataError(f"{compressed} is no compressed adapter; expected what lotr compress wrote")
    if isinstance(before, CompressedAdapter):
        raise DataError(f"{original} is a compressed adapter; expected the adapter before")
    model, batches = _inputs(before, base, text, length, batch)
    from lotrtensor.torch.healing import HELD_OUT
    from lotrtensor.torch.healing import heal as heal_adapter

    if len(batches) < 2 * HELD_OUT:
        raise OptionError(
            f"the text makes {len(batches)} batches of {batch} lines, and healing needs "
            f"{2 * HELD_OUT}; give more lines, or a smaller --batch"
        )
    with _said_of(base, text):
        healed = heal_adapter(model, small, before, batches)
    healed.adapter.save(output, force=force)
    if json:
        print_json(
            {
                "distance_before": healed.before,
                "distance_after": healed.after,
                "relative_error": healed.adapter.relative_error,
                "file_bytes": healed.adapter.file_bytes,
            }
        )
        return
    output_console().print(
        f"{printable(output)}: distance from the original's outputs {healed.before:.3g} before, "
        f"{healed.after:.3g} now, on texts that were held out",
        markup=False,
    )


def _inputs(
    adapter: Adapter, base: Path, text: Path, length: int, batch: int
) -> tuple[Any, list[Any]]:
    """The base model of an adapter, and the text in batches."""
    try:
        from lotrtensor.torch.texts import base_model, text_batches
    except ImportError as error:
        raise MissingPackageError(
            "this needs torch and transformers: pip install 'lotrtensor[peft]'"
        ) from error
    model = base_model(base, adapter)
    return model, text_batches(model, base, text, length=length, batch=batch)


@contextmanager
def _said_of(base: Path, text: Path) -> Iterator[None]:
    """Say in one sentence what another package's model makes of a text that it cannot run."""
    try:
        yield
    except LotrError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the model of {base} does not run on {text}: {told}") from error


def _check_no_input(output: Path, *directories: str | Path) -> None:
    """Refuse to replace a file of what is read."""
    for directory in directories:
        inside = output.resolve().is_relative_to(expand(directory).resolve())
        if output.exists() and inside:
            raise FormatError(
                f"{output} is a file of {directory}, which is read; it is not replaced"
            )
