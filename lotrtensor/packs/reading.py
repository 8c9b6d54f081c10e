"""Cells and members from the files of a pack: of a member, its own bytes and the bases alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.errors import FormatError
from lotrtensor.packs.coding import cells_from_tensors, member_from_tensors
from lotrtensor.packs.files import Entry, Index, read_index, read_some
from lotrtensor.packs.members import Cell, Member


class Packed(NamedTuple):
    """An adapter that is in a pack: the directory of that, and its name."""

    path: str
    name: str


def read_cells(path: Path, index: Index) -> tuple[Cell, ...]:
    """Return the bases of a pack.

    Raises
    ------
    FormatError
        If a file is missing or damaged.
    """
    return tuple(
        cell
        for shard in index.cells
        for cell in cells_from_tensors(read_some(path, shard), str(path / shard.file))
    )


def entry_of(path: Path, index: Index, name: str) -> Entry:
    """Return what the index says of one adapter.

    Raises
    ------
    FormatError
        If there is none of that name.
    """
    if not isinstance(name, str) or name not in index.adapters:
        known = ", ".join(list(index.adapters)[:8]) + (", …" if len(index.adapters) > 8 else "")
        raise FormatError(f"{path} holds no adapter {name!r}; it has {known or 'none'}")
    return index.adapters[name]


def read_member(path: Path, index: Index, name: str, cells: Sequence[Cell]) -> Member:
    """Return one adapter; ``cells`` are those of the pack.

    Raises
    ------
    FormatError
        If there is none of that name, or its file is missing or damaged.
    """
    entry = entry_of(path, index, name)
    shard = index.files[entry.shard]
    tensors = read_some(path, shard, f"{entry.number}.")
    where = f"{path / shard.file}: {name}"
    return member_from_tensors(tensors, cells if entry.uses_bases else (), where)


def load_packed(source: Packed) -> LoraAdapter:
    """Return an adapter of a pack as a LoRA that is exactly what is stored.

    Raises
    ------
    FormatError
        As `read_member` does.
    """
    path = Path(source.path)
    index = read_index(path)
    cells = read_cells(path, index) if entry_of(path, index, source.name).uses_bases else ()
    member = read_member(path, index, source.name, cells)
    own = member.own
    return LoraAdapter(member.updates(), own.config, own.dtype, own.extras)
