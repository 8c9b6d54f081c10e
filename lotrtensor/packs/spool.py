"""Adapters on their way into a pack: factors where a task can fetch those of one module alone.

An adapter of any format is read once and written to the build directory, its factors in float32 at
the least. So the tasks that follow need no reader, hold one cell or one adapter at a time, and run
on any machine that sees the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.native import check_native
from lotrtensor.adapters.formats.tensors import FLOATS, Tensors, file_bytes, read_file, read_some
from lotrtensor.adapters.hub import is_remote
from lotrtensor.adapters.loading import Adapter, check_adapter, load
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.errors import FormatError
from lotrtensor.packs.coding import CARRIED
from lotrtensor.packs.encoding import common_config, norm_of, settled
from lotrtensor.packs.files import INDEX
from lotrtensor.packs.reading import Packed, load_packed

Source = str | os.PathLike[str] | Adapter | Packed
"""A path, a hub's address, an adapter in memory, or one that is in a pack already."""


NORMS = "norms.json"
"""File of the norms of all adapters, in the build directory."""


class SpooledModule(NamedTuple):
    """A module of a spooled adapter: path, shape (m, n), LoRA rank, whether it is an embedding."""

    name: str
    shape: tuple[int, int]
    rank: int
    embedding: bool


class Spooled(NamedTuple):
    """A spooled adapter, its factors apart."""

    name: str
    modules: tuple[SpooledModule, ...]
    dtype: str
    stored: tuple[tuple[str, str] | None, ...]
    bytes: int
    norm: float
    config: dict[str, Any]


def spool(build: str, number: int, name: str, source: Source) -> None:
    """Write an adapter to the build directory, once.

    Parameters
    ----------
    build : str
        The build directory.
    number : int
        Number of the adapter in it.
    name : str
        Its name in the pack.
    source : path or adapter
        Where it is.

    Raises
    ------
    FormatError, UnsupportedAdapterError, DataError
        If it cannot be read, or not be packed.
    """
    record, factors = _paths(build, number)
    if record.is_file():
        return
    lora = as_lora(source, name)
    tensors: Tensors = {CARRIED + key: tensor for key, tensor in lora.extras.items()}
    for i, module in enumerate(lora.modules):
        tensors[f"{i}.B"], tensors[f"{i}.A"] = module.factors()
    write_once(factors, file_bytes(tensors, {}))
    modules = [[m.name, list(m.shape), m.rank, m.embedding] for m in lora.modules]
    content = {
        "name": name,
        "modules": modules,
        "dtype": lora.dtype.name,
        "stored": [m.stored and [x.name for x in m.stored] for m in lora.modules],
        "bytes": lora.bytes,
        "norm": settled(norm_of(lora)),
        "config": common_config(lora),
    }
    write_once(record, json.dumps(content).encode())


def as_lora(source: Source, name: str) -> LoraAdapter:
    """Return an adapter as a LoRA, if a pack can hold it.

    Raises
    ------
    FormatError, UnsupportedAdapterError, DataError
        If it cannot be read, or has what a pack has no place for.
    """
    if isinstance(source, Packed):
        return load_packed(source)
    adapter = load(source) if isinstance(source, str | os.PathLike) else source
    check_adapter(adapter)
    lora = adapter if isinstance(adapter, LoraAdapter) else adapter.to_lora()
    check_native(lora.config, lora.extras, name)
    return lora


def _paths(build: str, number: int) -> tuple[Path, Path]:
    stem = Path(build) / f"adapter-{number:05}"
    return stem.with_suffix(".json"), stem.with_suffix(".safetensors")


def read_spooled(build: str, number: int) -> Spooled:
    """Return what was noted of an adapter."""
    content = json.loads(_paths(build, number)[0].read_text("utf-8"))
    modules = tuple(
        SpooledModule(name, (shape[0], shape[1]), rank, embedding)
        for name, shape, rank, embedding in content.pop("modules")
    )
    return Spooled(modules=modules, **content)


def write_norms(build: str, norms: Mapping[int, float]) -> None:
    """Write the norms of all adapters in one file, for tasks that need those of many."""
    content = json.dumps({str(number): norm for number, norm in norms.items()})
    write_once(Path(build) / NORMS, content.encode())


def read_norms(build: str) -> dict[int, float]:
    """Return the norms of all adapters by their numbers."""
    content = json.loads((Path(build) / NORMS).read_text("utf-8"))
    return {int(number): norm for number, norm in content.items()}


def read_factors(build: str, number: int, module: int) -> tuple[np.ndarray, np.ndarray]:
    """Return B and A of one module; no other is read."""
    found = read_some(_paths(build, number)[1], f"{module}.")
    return found["B"], found["A"]


def read_lora(build: str, number: int) -> LoraAdapter:
    """Return a spooled adapter."""
    found, (tensors, _) = read_spooled(build, number), read_file(_paths(build, number)[1])
    types = {known.name: known for known in FLOATS}
    modules = []
    for i, (module, stored) in enumerate(zip(found.modules, found.stored, strict=True)):
        pair = None if stored is None else (types[stored[0]], types[stored[1]])
        b, a = tensors[f"{i}.B"], tensors[f"{i}.A"]
        modules.append(LoraModule(module.name, b, a, module.embedding, pair))
    extras = {k.removeprefix(CARRIED): x for k, x in tensors.items() if k.startswith(CARRIED)}
    return LoraAdapter(tuple(modules), found.config, types[found.dtype], extras)


def write_once(path: Path, content: bytes) -> None:
    """Write a file of the build directory, whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error


def fingerprint(names: Sequence[str], sources: Sequence[Source], options: Any) -> str:
    """Return what tells whether a build that was stopped is the one that is asked for again.

    Of paths the sizes and times of their files, of adapters in memory their numbers.
    """
    found = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for name, source in zip(names, sources, strict=True):
        found.update(f"\0{name}\0".encode())
        if isinstance(source, Packed):
            found.update((Path(source.path) / INDEX).read_bytes())
        elif not isinstance(source, str | os.PathLike):
            lora = as_lora(source, name)
            for module in lora.modules:
                found.update(module.name.encode())
                found.update(np.ascontiguousarray(module.B).tobytes())
                found.update(np.ascontiguousarray(module.A).tobytes())
        elif is_remote(source):
            found.update(str(source).encode())
        else:
            path = expand(source)
            files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
            for file in files:
                state = file.stat()
                found.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    return found.hexdigest()
