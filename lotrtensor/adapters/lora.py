"""A LoRA adapter in memory: named pairs of thin factors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from lotrtensor.adapters.formats.directory import SINGLE_FILE, expand
from lotrtensor.adapters.formats.experts import ExpertsLayout
from lotrtensor.adapters.formats.kohya import read_single_file, write_single_file
from lotrtensor.adapters.formats.layout import output_format
from lotrtensor.adapters.formats.paths import is_file
from lotrtensor.adapters.formats.peft import read_lora, write_lora
from lotrtensor.adapters.formats.tensors import check_exists
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.adapters.parts import lowered
from lotrtensor.core.options import check_choice, check_flag, shown
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import FormatError, RankError


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A LoRA adapter: the updates, and what travels with them.

    Attributes
    ----------
    modules : tuple of LoraModule
        In the order of their names, layer 2 before layer 10. Of an adapter above 256 MiB they read
        their factors, which are then read-only, whenever these are asked for; ``module.held()``
        keeps them.
    config : mapping
        PEFT's ``adapter_config.json`` as read.
    dtype : numpy dtype
        Type that the factors are stored in.
    extras : mapping of str to ndarray
        Tensors carried unchanged under their own keys: fully trained modules, biases.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> adapter.modules[0].name, adapter.parameters, str(adapter.dtype)
    ('encoder.layer.0.attention.output.dense', 331776, 'bfloat16')
    """

    modules: tuple[LoraModule, ...]
    config: Mapping[str, Any]
    dtype: np.dtype
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoraAdapter:
        """Read a PEFT LoRA directory, or a single file of an image model's LoRA.

        See `lotrtensor.adapters.formats.peft.read_lora` and
        `lotrtensor.adapters.formats.kohya.read_single_file`.
        """
        path = expand(path)
        check_exists(path)
        single = path.suffix == SINGLE_FILE and is_file(path)
        return cls(*(read_single_file(path) if single else read_lora(path)))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        file_format: str | None = None,
        uniform: bool = True,
        pad: bool = False,
        force: bool = False,
        experts: ExpertsLayout | None = None,
    ) -> None:
        """Write a portable PEFT LoRA directory, or a single ``.safetensors`` file; atomically.

        In a directory all modules get the largest rank r, zero-padded where theirs is lower;
        alpha = r. In kohya's file every module keeps its rank, which its alpha equals.

        Parameters
        ----------
        path : path-like
            The directory, or the file ending in ``.safetensors``, to make.
        file_format : str, optional
            ``"peft"`` or ``"kohya"``. Not given, a LoRA that came from a single file goes back to
            one with the same names, and any other becomes a PEFT directory.
        uniform : bool
            False keeps every module's own rank, in PEFT's rank and alpha patterns: smaller, but
            vLLM and llama.cpp do not read it.
        pad : bool
            Raise r to the next of vLLM's sizes: 8, 16, 32, 64, 128, 256, 320, 512.
        force : bool
            Replace an adapter that stands there.
        experts : str, optional
            How experts (``experts.0.down_proj``) are laid out in a directory: ``"parameters"``,
            stacked for PEFT's ``target_parameters``; ``"modules"``, one by one;
            ``"shared-outer"``, stacked with one side shared, of what `lotrtensor.shared_outer`
            returns. Not given, as the adapter's ``target_parameters`` say.

        Raises
        ------
        FormatError
            If ``path`` exists and ``force`` is not given, cannot be written, or does not suit the
            format; or if experts are missing for a layout that stacks them.
        UnsupportedAdapterError
            If experts differ in the side that the layout shares.
        OptionError
            If ``experts`` is no layout.
        RankError
            If ``pad`` is given and the rank exceeds vLLM's largest.
        """
        path, force = expand(path), check_flag(force, "force")
        uniform, pad = check_flag(uniform, "uniform"), check_flag(pad, "pad")
        content = (self.modules, self.config, self.dtype, self.extras)
        file_format = output_format(path, self.config, file_format)
        if experts is not None:
            check_choice(experts, "experts", get_args(ExpertsLayout))
        if file_format == "peft":
            write_lora(path, content, uniform=uniform, pad=pad, force=force, experts=experts)
        elif experts is not None:
            raise FormatError(f"{path}: experts are laid out in PEFT directories alone")
        elif pad:
            raise FormatError(f"{path}: padding is for vLLM, which reads PEFT directories alone")
        else:
            write_single_file(path, content, kohya=file_format == "kohya", force=force)

    @on_one_thread
    def to_lora(self, rank: int | None = None) -> LoraAdapter:
        """Return the adapter itself, or the best of a lower rank, as other adapters' do.

        Parameters
        ----------
        rank : int, optional
            Largest LoRA rank of a module.

        Raises
        ------
        RankError
            If ``rank`` is below 1.
        """
        if rank is None:
            return self
        if not isinstance(rank, int | np.integer) or isinstance(rank, bool) or rank < 1:
            raise RankError(f"rank is {shown(rank)}; expected an integer of at least 1")
        modules = (m if m.rank <= rank else lowered(m, rank) for m in self.modules)
        return replace(self, modules=tuple(modules))

    @property
    def parameters(self) -> int:
        """Number of stored numbers of the updates; carried tensors do not count."""
        return sum(module.parameters for module in self.modules)

    @property
    def bytes(self) -> int:
        """Bytes of the updates as read, or as they would be stored: parameters × itemsize."""
        return sum(module.bytes_in(self.dtype) for module in self.modules)
