"""load: any adapter directory, told apart by its own files."""

from __future__ import annotations

import os

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.native import PEFT_TYPE
from lotrtensor.adapters.formats.tensors import read_config
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter

Adapter = LoraAdapter | LotrAdapter


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter directory: a PEFT LoRA or a LoTR.

    Parameters
    ----------
    path : path-like
        The directory that holds ``adapter_config.json``.

    Returns
    -------
    LoraAdapter or LotrAdapter
        By the ``peft_type`` of the config.

    Raises
    ------
    FormatError, UnsupportedAdapterError, DataError
        Naming the file and key, what was found and what was expected.
    """
    directory = expand(path)
    if read_config(directory).get("peft_type") == PEFT_TYPE:
        return LotrAdapter.load(directory)
    return LoraAdapter.load(directory)
