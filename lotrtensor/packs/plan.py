"""Which modules of which adapters share a basis: the cells of a pack, before any is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from lotrtensor.adapters.grouping import Slot, group_modules
from lotrtensor.errors import FormatError
from lotrtensor.packs.spool import Spooled, SpooledModule, write_once


@dataclass(frozen=True)
class PlannedCell:
    """A cell that may be made.

    Attributes
    ----------
    kind : str
        Group of modules that it belongs to.
    scope : str
        ``"adapters"``: one module, over all adapters; ``"both"``: all modules of the kind, too.
    modules : tuple of str
        Paths.
    shape : (int, int)
        Shape (m, n) of ΔW.
    members : tuple of (int, int)
        Its slices: number of the adapter, and of the module in it.
    ranks : tuple of int
        LoRA rank of each.
    cluster : int
        Cluster that these adapters are.
    """

    kind: str
    scope: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    members: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...] = ()
    cluster: int = 0


class Place(NamedTuple):
    """Number of an adapter, of a module in it, and its LoRA rank."""

    adapter: int
    module: int
    rank: int


def plan_cells(
    adapters: Mapping[int, Spooled], clusters: Mapping[int, int] | None = None
) -> list[PlannedCell]:
    """Return the cells that adapters could share: of single modules, and of all of a kind.

    Parameters
    ----------
    adapters : mapping of int to Spooled
        The adapters by their numbers.
    clusters : mapping of int to int, optional
        Cluster of each, which shares with no other; one of all if not given.

    Raises
    ------
    FormatError
        If a module has unlike shapes in two adapters.
    """
    known: dict[str, tuple[SpooledModule, str]] = {}
    places: dict[str, list[Place]] = {}
    for number, adapter in adapters.items():
        for i, module in enumerate(adapter.modules):
            first, owner = known.setdefault(module.name, (module, adapter.name))
            if (first.shape, first.embedding) != (module.shape, module.embedding):
                raise FormatError(
                    f"{module.name} is {first.shape[0]} × {first.shape[1]} in {owner} and "
                    f"{module.shape[0]} × {module.shape[1]} in {adapter.name}; they belong to "
                    "different base models, and to different packs"
                )
            places.setdefault(module.name, []).append(Place(number, i, module.rank))
    slots = [Slot(m.name, m.shape, m.embedding) for m, _ in known.values()]
    groups = group_modules(slots, "type")
    cells = []
    for cluster in sorted(set(clusters.values())) if clusters else [0]:
        own = {
            name: [place for place in each if not clusters or clusters[place.adapter] == cluster]
            for name, each in places.items()
        }
        for kind, group in groups.items():
            names = tuple(slot.name for slot in group if own[slot.name])
            kind = f"{kind} of {cluster}" if cluster else kind
            for name in names:
                cells.append(_cell(kind, "adapters", (name,), group[0], own, cluster))
            if len(names) > 1:
                cells.append(_cell(kind, "both", names, group[0], own, cluster))
    return cells


def _cell(
    kind: str,
    scope: str,
    names: tuple[str, ...],
    slot: Slot,
    places: Mapping[str, Sequence[Place]],
    cluster: int,
) -> PlannedCell:
    own = [place for name in names for place in places[name]]
    members = tuple((place.adapter, place.module) for place in own)
    ranks = tuple(place.rank for place in own)
    return PlannedCell(kind, scope, names, slot.shape, members, ranks, cluster)


def write_plan(build: str, cells: Sequence[PlannedCell]) -> None:
    """Write the plan, for the tasks to read: two files a cell, as members may be thousands."""
    for number, cell in enumerate(cells):
        content = asdict(cell)
        slices = content.pop("members"), content.pop("ranks")
        for path, part in zip(_paths(build, number), (content, slices), strict=True):
            write_once(path, json.dumps(part).encode())


def _paths(build: str, number: int) -> tuple[Path, Path]:
    return Path(build) / f"plan-{number:05}.json", Path(build) / f"members-{number:05}.json"


def read_cell(build: str, number: int, *, members: bool = True) -> PlannedCell:
    """Return a cell of the plan, with its members or without."""
    path, slices = _paths(build, number)
    item = json.loads(path.read_text("utf-8"))
    item["modules"], item["shape"] = tuple(item["modules"]), tuple(item["shape"])
    places, ranks = json.loads(slices.read_text("utf-8")) if members else ([], [])
    pairs = tuple((adapter, module) for adapter, module in places)
    return PlannedCell(**item, members=pairs, ranks=tuple(ranks))
