"""The layout of a single-file LoRA: what is needed to write a file like the one that was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lotrtensor.adapters.formats.directory import (
    SINGLE_FILE,
    check_file_output,
    check_output,
    expand,
)
from lotrtensor.adapters.formats.header import read_header
from lotrtensor.adapters.formats.image_names import ALPHA, KOHYA, STYLES, is_difference, split_key
from lotrtensor.adapters.formats.paths import exists
from lotrtensor.core.options import check_choice
from lotrtensor.errors import FormatError

LAYOUT = "single_file"
"""Field of an adapter's config that holds the layout of the file it came from."""

KERNELS = "conv_kernels"
"""Field of a config in memory: kernels of the modules that are convolutions, never in a file."""


@dataclass(frozen=True)
class Layout:
    """How a single file names and shapes its tensors: what is needed to write it back.

    Attributes
    ----------
    style : str
        Style of the keys; see `STYLES`.
    styles : dict of str to str
        Modules of another style.
    kernels : dict of str to list of int
        Kernel of every module that is a convolution.
    metadata : dict of str to str
        The header's metadata: kohya's ``ss_`` fields and all others.
    """

    style: str = KOHYA
    styles: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, list[int]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def style_of(self, module: str) -> str:
        """Return the style of a module's keys."""
        return self.styles.get(module, self.style)


def check_lora_output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists: a directory, or a file if it ends in ``.safetensors``.

    Raises
    ------
    FormatError
        As `check_output` and `check_lora_file` do.
    """
    check = check_lora_file if path.suffix == SINGLE_FILE else check_output
    check(path, force=force)


def check_lora_file(path: Path, *, force: bool) -> None:
    """Refuse an output file that exists, or that ``force`` would replace though it is no LoRA.

    Raises
    ------
    FormatError
        Before any work is done.
    """
    check_file_output(path, force=force)
    path = expand(path)
    if not exists(path):
        return
    try:
        keys = list(read_header(path))
    except FormatError:
        keys = [""]
    other = next((key for key in keys if not _is_lora_key(key)), None)
    if other is not None:
        raise FormatError(
            f"{path} is no LoRA of an image model{f' (it holds {other})' if other else ''}; it is "
            "not replaced: choose another output"
        )


def _is_lora_key(key: str) -> bool:
    return split_key(key) is not None or is_difference(key) or key.endswith(ALPHA)


def output_format(path: Path, config: Mapping[str, Any], file_format: str | None = None) -> str:
    """Return the format of a LoRA that is to be written, before any work is done.

    Parameters
    ----------
    path : Path
        The output: a file if it ends in ``.safetensors``, else a directory.
    config : mapping
        The adapter's config.
    file_format : str, optional
        ``"peft"`` or ``"kohya"``; what suits the adapter and the output if not given.

    Returns
    -------
    str
        ``"peft"``, ``"kohya"``, or ``"source"``: the keys of the file the adapter came from.

    Raises
    ------
    FormatError
        If output, adapter and format do not fit together.
    """
    is_file, from_file = path.suffix == SINGLE_FILE, bool(config.get(LAYOUT))
    if file_format is not None:
        check_choice(file_format, "the format", ("peft", KOHYA))
    if file_format == KOHYA and not is_file:
        raise FormatError(f"{path}: kohya's LoRA is one file; name it {path.name}{SINGLE_FILE}")
    if file_format == "peft" and is_file:
        raise FormatError(f"{path}: a PEFT LoRA is a directory; leave {SINGLE_FILE} away")
    if from_file and not is_file:
        raise FormatError(
            f"{path}: this LoRA has the module names of a single file, which PEFT finds in no "
            f"model; name the output {path.name}{SINGLE_FILE}"
        )
    if is_file and not from_file and file_format is None:
        raise FormatError(
            f"{path}: this LoRA is a PEFT directory; leave {SINGLE_FILE} away, or choose the "
            "format kohya"
        )
    return file_format or ("source" if is_file else "peft")


def read_layout(config: Mapping[str, Any], path: Path | str = "the adapter") -> Layout:
    """Return the layout in an adapter's config; the default one where there is none.

    Raises
    ------
    FormatError
        If it is damaged.
    """
    record = config.get(LAYOUT) or {}
    try:
        layout = Layout(**record)
        styles = {layout.style, *layout.styles.values()}
        kernels = [kernel for kernel in layout.kernels.values()]
        texts = all(isinstance(text, str) for item in layout.metadata.items() for text in item)
        sizes = all(type(size) is int and size > 0 for kernel in kernels for size in kernel)
        known = styles <= set(STYLES)
    except (TypeError, AttributeError) as error:
        raise FormatError(f"{path}: {LAYOUT} of the config is damaged ({error})") from error
    if not (known and texts and sizes):
        raise FormatError(f"{path}: {LAYOUT} of the config is damaged; convert the source again")
    return layout


def read_kernels(config: Mapping[str, Any], path: Path | str = "the adapter") -> dict[str, Any]:
    """Return the kernel of every module that is a convolution, wherever the adapter came from.

    Raises
    ------
    FormatError
        If the layout in the config is damaged.
    """
    return {**read_layout(config, path).kernels, **config.get(KERNELS, {})}
