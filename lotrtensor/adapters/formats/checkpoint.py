"""Checkpoints of whole models: safetensors, sharded or not, one tensor in memory at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.header import Stored, damaged, read_header
from lotrtensor.adapters.formats.json_text import read_json_object
from lotrtensor.adapters.formats.paths import children, is_dir, is_file, open_regular
from lotrtensor.adapters.formats.tensors import BFLOAT16, read_weight_map
from lotrtensor.errors import DataError, FormatError, LotrWarning, UnsupportedAdapterError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG = "config.json"
_DIFFUSION = "diffusion_pytorch_model.safetensors"

# What a library loads of a directory that has several: transformers the single file, diffusers
# the shards.
WEIGHT_NAMES = (SINGLE_NAME, INDEX_NAME, _DIFFUSION + ".index.json", _DIFFUSION)

FLOAT_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Types that weights are computed with, by their names in a safetensors header."""

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BLOCK = 2**24


@dataclass(frozen=True)
class Checkpoint:
    """Where every tensor of a checkpoint is; nothing is loaded.

    Attributes
    ----------
    directory : Path
        The checkpoint's directory.
    tensors : mapping of str to Stored
        Every tensor by its name: its key, without the prefixes of wrappers.
    config : mapping
        The model's ``config.json``; empty where there is none.
    single : bool
        Whether a single file was named, rather than a directory.
    index : str or None
        File that lists the shards, where there are several.
    """

    directory: Path
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any] = field(default_factory=dict)
    single: bool = False
    index: str | None = None

    def dtype(self, name: str) -> np.dtype:
        """Type of a weight.

        Raises
        ------
        DataError
            If the tensor is not floating point: it is quantised.
        """
        stored = self.tensors[name]
        if stored.dtype not in FLOAT_TYPES:
            raise DataError(
                f"{self.place(name)}: {stored.key} has dtype {stored.dtype}, which is quantised; "
                "expected floating point: dequantise the checkpoint first"
            )
        return FLOAT_TYPES[stored.dtype]

    def read(self, name: str) -> np.ndarray:
        """Read one weight, in its own type.

        Raises
        ------
        FormatError
            If the file cannot be read.
        DataError
            If the tensor is not floating point.
        """
        dtype, stored = self.dtype(name), self.tensors[name]
        content = np.empty(stored.stop - stored.start, dtype=np.uint8)
        try:
            with open_regular(self.place(name)) as file:
                file.seek(stored.start)
                count = file.readinto(content.data)  # type: ignore[attr-defined]
        except OSError as error:
            raise damaged(self.place(name), error) from error
        if count != content.size:
            raise damaged(self.place(name), "it has become shorter")
        return content.view(dtype).reshape(stored.shape)

    def blocks(self, name: str) -> Iterable[np.ndarray]:
        """Bytes of one tensor of any type, a block of them at a time."""
        stored = self.tensors[name]
        try:
            with open_regular(self.place(name)) as file:
                file.seek(stored.start)
                for start in range(stored.start, stored.stop, _BLOCK):
                    block = file.read(min(_BLOCK, stored.stop - start))
                    if len(block) < min(_BLOCK, stored.stop - start):
                        raise damaged(self.place(name), "it has become shorter")
                    yield np.frombuffer(block, dtype=np.uint8)
        except OSError as error:
            raise damaged(self.place(name), error) from error

    def place(self, name: str) -> Path:
        """Return the file that a tensor is in."""
        return self.directory / self.tensors[name].file

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """Return the checkpoint with other names for its tensors.

        A tensor that has a name already keeps it, whatever else would be renamed to that.

        Raises
        ------
        FormatError
            If two tensors get one name.
        """
        tensors: dict[str, Stored] = {}
        for name, stored in self.tensors.items():
            new = rename(name)
            if new != name and new in self.tensors:
                new = name
            if new in tensors:
                raise FormatError(
                    f"{self.directory}: {tensors[new].key} and {stored.key} are both {new} of the "
                    "model; expected one"
                )
            tensors[new] = stored
        return replace(self, tensors=tensors)


def open_checkpoint(path: Path) -> Checkpoint:
    """List the tensors of a checkpoint directory, or of a single safetensors file.

    Of a directory with several, the file that transformers or diffusers would load is taken:
    the one that ``transformers_weights`` of the config names, else the first of `WEIGHT_NAMES`.

    Raises
    ------
    FormatError
        If there is no checkpoint, or a shard is missing, damaged or lacks a tensor.
    UnsupportedAdapterError
        If there are only pickled weights.

    Warns
    -----
    LotrWarning
        If the directory holds a second set of weights, or names have the prefix of a wrapper.
    """
    path = expand(path)
    single = path.suffix == ".safetensors" and is_file(path)
    directory = path.parent if single else path
    config = read_json_object(directory / CONFIG) if is_file(directory / CONFIG) else {}
    weights = path if single else directory / _chosen(directory, config)
    if weights.suffix != ".json":
        return _unwrapped(Checkpoint(directory, read_header(weights), config, single))
    return _unwrapped(Checkpoint(directory, _read_shards(weights), config, index=weights.name))


def _chosen(directory: Path, config: Mapping[str, Any]) -> str:
    """Name of the file of a directory that says which weights count."""
    named = config.get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named:
            raise FormatError(
                f"{directory / CONFIG}: transformers_weights is {named!r}; expected "
                "the name of a file beside it"
            )
        if not is_file(directory / named):
            raise FormatError(f"{directory / CONFIG} names the weights {named}, which are missing")
        return named
    found = [name for name in WEIGHT_NAMES if is_file(directory / name)]
    if len(found) > 1:
        warnings.warn(
            f"{directory} holds {' and '.join(found)}; {found[0]} is read, as from_pretrained does",
            LotrWarning,
            stacklevel=2,
        )
    if found:
        return found[0]
    raise _no_weights(directory)


def _no_weights(directory: Path) -> FormatError | UnsupportedAdapterError:
    """Say what a directory without weights in safetensors form holds instead."""
    for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if is_file(directory / pickled):
            return UnsupportedAdapterError(
                f"{directory / pickled} is a pickle, which can run code when opened and is not "
                f"read; load the model and save it with save_pretrained, which writes {SINGLE_NAME}"
            )
    if is_file(directory / "model_index.json"):
        return FormatError(
            f"{directory} is a pipeline of several models; name the directory of one of them, such "
            f"as {directory / 'transformer'}"
        )
    files = children(directory) if is_dir(directory) else []
    others = [path.name for path in files if path.suffix == ".safetensors"]
    hint = f": name one of its files, such as {others[0]}, if that is it" if others else ""
    return FormatError(
        f"{directory} has no {SINGLE_NAME} and no {INDEX_NAME}; expected a checkpoint in "
        f"safetensors form{hint}"
    )


def _read_shards(index: Path) -> dict[str, Stored]:
    directory, weight_map = index.parent, read_weight_map(index)
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        for key, stored in read_header(directory / name).items():
            # Where two shards hold a key, the index says which of them counts.
            if weight_map.get(key, name) != name:
                continue
            if key in tensors:
                raise FormatError(
                    f"{directory}: {tensors[key].file} and {name} both hold {key}, and the index "
                    "does not say which counts; fetch the checkpoint again"
                )
            tensors[key] = stored
    missing = next((key for key in weight_map if key not in tensors), None)
    if missing is not None:
        raise FormatError(
            f"{index} names {missing} in {weight_map[missing]}, which does not "
            "hold it; fetch the checkpoint again"
        )
    return tensors


def _unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """Take the names that wrappers (compile, DDP, FSDP) put into a path out of it."""
    distributed = all(key.startswith("module.") for key in checkpoint.tensors)

    def plain(key: str) -> str:
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        return ".".join(parts[1:] if distributed and parts[0] == "module" else parts)

    wrapped = [key for key in checkpoint.tensors if plain(key) != key]
    if not wrapped:
        return checkpoint
    warnings.warn(
        f"{checkpoint.directory}: {len(wrapped)} names carry the prefix of a wrapper, such as "
        f"{wrapped[0]}; read as {plain(wrapped[0])}",
        LotrWarning,
        stacklevel=3,
    )
    return checkpoint.renamed(plain)
