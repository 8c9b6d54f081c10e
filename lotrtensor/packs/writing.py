"""What a build has made, as the shards of a pack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lotrtensor.adapters.formats.tensors import Tensors, read_file
from lotrtensor.packs import tasks
from lotrtensor.packs.coding import cells_to_tensors
from lotrtensor.packs.files import ADAPTER_SHARD, Shard, write_shard
from lotrtensor.packs.members import Cell

SHARD_MEMBERS, SHARD_BYTES, SHARD_CODES = 16, 2**28, 2**24
"""Adapters and bytes of a shard of adapters, codes of a shard of cells, at most."""


def cells_tensors(build: str, cells: Sequence[tuple[int, str]]) -> list[Tensors]:
    """Return the tensors of every shard of cells; ``cells`` as `tasks.CellFiles` takes them."""
    found: list[Tensors] = []
    shard: list[Cell] = []
    room = SHARD_CODES
    for cell in tasks.CellFiles(build, cells).in_order():
        size = cell.basis.left.size + cell.basis.right.size
        if shard and size > room:
            found.append(cells_to_tensors(shard))
            shard, room = [], SHARD_CODES
        shard.append(cell)
        room -= size
    return [*found, cells_to_tensors(shard)] if shard else found


def cells_bytes(build: str, cells: Sequence[tuple[int, str]]) -> int:
    """Return the bytes that cells take in their shards."""
    return sum(
        tasks.tensor_bytes(key, tensor)
        for tensors in cells_tensors(build, cells)
        for key, tensor in tensors.items()
    )


def write_members(
    path: Path, build: str, members: Sequence[str], number: int, following: int
) -> tuple[list[Shard], list[str]]:
    """Write the shards of adapters.

    Parameters
    ----------
    path : Path
        The directory of the pack.
    build : str
        The build directory.
    members : sequence of str
        Files of the adapters in it.
    number : int
        Number of the first adapter.
    following : int
        Number of the first shard.

    Returns
    -------
    shards, places
        The shards, and for every adapter the file that it is in.
    """
    shards: list[Shard] = []
    places: list[str] = []
    waiting: Tensors = {}
    count, room = 0, SHARD_BYTES

    def flush() -> None:
        nonlocal waiting, count, room
        if count:
            shards.append(write_shard(path, ADAPTER_SHARD, following + len(shards), waiting))
            places.extend([shards[-1].file] * count)
            waiting, count, room = {}, 0, SHARD_BYTES

    for i, member in enumerate(members):
        tensors, _ = read_file(Path(build) / member)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if count == SHARD_MEMBERS or size > room:
            flush()
        waiting |= {f"{number + i}.{key}": x for key, x in tensors.items()}
        count, room = count + 1, room - size
    flush()
    return shards, places
