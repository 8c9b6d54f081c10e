"""A LoRA adapter in memory: named pairs of thin factors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.peft import read_lora, write_lora
from lotrtensor.adapters.modules import LoraModule


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A LoRA adapter: the updates, and what travels with them.

    Attributes
    ----------
    modules : tuple of LoraModule
        In the order of their names, layer 2 before layer 10.
    config : mapping
        PEFT's ``adapter_config.json`` as read.
    dtype : numpy dtype
        Type that the factors are stored in.
    extras : mapping of str to ndarray
        Tensors carried unchanged under their own keys: fully trained modules, biases.
    """

    modules: tuple[LoraModule, ...]
    config: Mapping[str, Any]
    dtype: np.dtype
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> LoraAdapter:
        """Read a PEFT LoRA directory; see `lotrtensor.adapters.formats.peft.read_lora`."""
        return cls(*read_lora(expand(directory)))

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        uniform: bool = True,
        pad: bool = False,
        force: bool = False,
    ) -> None:
        """Write a portable PEFT LoRA directory, atomically.

        All modules get the largest rank r, zero-padded where theirs is lower; alpha = r.

        Parameters
        ----------
        directory : path-like
            The directory to make.
        uniform : bool
            False keeps every module's own rank, in PEFT's rank and alpha patterns: smaller, but
            vLLM and llama.cpp do not read it.
        pad : bool
            Raise r to the next of vLLM's sizes: 8, 16, 32, 64, 128, 256, 320, 512.
        force : bool
            Replace an adapter directory that stands there.

        Raises
        ------
        FormatError
            If ``directory`` exists and ``force`` is not given, or cannot be written.
        RankError
            If ``pad`` is given and the rank exceeds vLLM's largest.
        """
        content = (self.modules, self.config, self.dtype, self.extras)
        write_lora(expand(directory), content, uniform=uniform, pad=pad, force=force)

    @property
    def parameters(self) -> int:
        """Number of stored numbers of the updates; carried tensors do not count."""
        return sum(module.parameters for module in self.modules)

    @property
    def bytes(self) -> int:
        """Bytes of the updates as read, or as they would be stored: parameters × itemsize."""
        return sum(module.bytes_in(self.dtype) for module in self.modules)
