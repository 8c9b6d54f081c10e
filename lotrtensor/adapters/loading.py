"""load: any adapter, told apart by its own files."""

from __future__ import annotations

import os
from pathlib import Path

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.formats.directory import CONFIG_NAME, SINGLE_FILE, expand
from lotrtensor.adapters.formats.native import COMPRESSED_VERSION, PEFT_TYPE
from lotrtensor.adapters.formats.paths import children, is_dir, is_file
from lotrtensor.adapters.formats.plain import read_plain
from lotrtensor.adapters.formats.tensors import WEIGHTS_NAME, check_exists, read_config
from lotrtensor.adapters.hub import DIFFUSERS_NAME, fetch, is_remote
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.errors import FormatError, UnsupportedAdapterError

Adapter = LoraAdapter | LotrAdapter | CompressedAdapter


def check_adapter(adapter: object) -> None:
    """Refuse what is no adapter.

    Raises
    ------
    UnsupportedAdapterError
        Saying what was found.
    """
    if not isinstance(adapter, LoraAdapter | LotrAdapter | CompressedAdapter):
        raise UnsupportedAdapterError(
            f"expected a LoraAdapter or a LotrAdapter, found a {type(adapter).__name__}: "
            "load(path) reads one"
        )


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter: a PEFT LoRA, a LoTR, or an image model's LoRA in a single file.

    Parameters
    ----------
    path : path-like
        The directory that holds ``adapter_config.json``; or a ``.safetensors`` file as kohya's
        sd-scripts or diffusers write it, or diffusers' directory of one; or either on a hub:
        ``hf://owner/name``, ``hf://owner/name@revision/path``, which is fetched into
        huggingface_hub's cache once.

    Returns
    -------
    LoraAdapter, LotrAdapter or CompressedAdapter
        By the ``peft_type`` and ``format_version`` of the config; a single file is a LoRA.

    Raises
    ------
    FormatError, UnsupportedAdapterError, DataError
        Naming the file and key, what was found and what was expected.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> len(adapter.modules), adapter.bytes
    (36, 663552)
    """
    found = fetch(path) if is_remote(path) else expand(path)
    check_exists(found)
    if found.name == WEIGHTS_NAME and is_file(found.parent / CONFIG_NAME):
        raise FormatError(
            f"{found} is a part of the adapter {found.parent}; name that directory, which holds "
            f"{CONFIG_NAME} too"
        )
    if found.suffix == SINGLE_FILE and is_file(found):
        return LoraAdapter.load(found)
    if is_dir(found) and not is_file(found / CONFIG_NAME):
        return LoraAdapter.load(_single_file(found))
    config = read_config(found)
    if config.get("peft_type") == PEFT_TYPE:
        if config.get("format_version") != COMPRESSED_VERSION:
            return LotrAdapter.load(found)
        if "groups" in config:  # in plain numbers, as PEFT saves it
            return LoraAdapter(*read_plain(found))
        return CompressedAdapter.load(found)
    return LoraAdapter.load(found)


def _single_file(directory: Path) -> Path:
    """Return the file of a directory that diffusers wrote, or say what the directory is instead."""
    if is_file(directory / DIFFUSERS_NAME):
        return directory / DIFFUSERS_NAME
    files = [p.name for p in children(directory) if p.suffix == SINGLE_FILE]
    if is_file(directory / "config.json") and files:
        raise FormatError(
            f"{directory} is a checkpoint of a whole model; expected an adapter, with its "
            f"{CONFIG_NAME}: lotr extract makes one of two checkpoints"
        )
    if files:
        raise FormatError(
            f"{directory} has no {CONFIG_NAME}; name one of its files, such as {files[0]}, if that "
            "is a LoRA of an image model"
        )
    raise FormatError(f"{directory} has no {CONFIG_NAME}; expected an adapter directory")
