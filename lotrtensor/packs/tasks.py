"""The independent pieces of work of a build, for any executor: a cell, or an adapter, at a time.

Each is a plain function of the build directory, numbers and text, keeps what it found in a file
there, and returns that where the file stands already: so a build that was stopped goes on, and a
piece that is run twice does no harm.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lotrtensor.adapters.formats.header import read_header
from lotrtensor.adapters.formats.tensors import Tensors, file_bytes, read_file
from lotrtensor.core.bits.basis import QuantisedBasis
from lotrtensor.core.bits.collection import CollectionInBits, cheapest
from lotrtensor.core.bits.spaces import strata
from lotrtensor.core.similarity import pair_products
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.packs.coding import CARRIED, member_to_tensors
from lotrtensor.packs.encoding import alone, on_bases
from lotrtensor.packs.members import Cell
from lotrtensor.packs.plan import PlannedCell, read_cell
from lotrtensor.packs.spool import read_factors, read_lora, read_norms, read_spooled, write_once
from lotrtensor.verbs._compress import Form

STEPS = tuple(2.0 ** (-i / 2) for i in range(4, 30))
"""Steps at which cells are priced, in norms of an adapter: from one at which nothing is left to the
finest that codes of 16 bits are sure to hold, no singular value being above the norm."""


def tensor_bytes(key: str, tensor: np.ndarray) -> int:
    """Bytes of a tensor in a shard with its entry in the header, whose offsets have 8 digits."""
    entry = f'"{key}":{{"dtype":"F16","shape":[{tensor.size}],"data_offsets":[00000000,00000000]}},'
    return tensor.nbytes + len(entry)


class Priced(NamedTuple):
    """What a cell would cost at `STEPS`.

    ``rows`` holds, by falling step, bits and squared error of the slices alone, those of the best
    basis, its price and its ranks; they end where the error is small enough. ``distances2`` are the
    squared distances of the slices from their mean.
    """

    rows: list[list[float]]
    distances2: list[float]


def slices_of(
    build: str, cell: PlannedCell, weights: str = ""
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Factors of the slices of a cell, all adapters brought to norm 1, or to weights in a file."""
    own = json.loads((Path(build) / weights).read_text("utf-8")) if weights else {}
    norms = read_norms(build)
    for adapter, module in cell.members:
        b, a = read_factors(build, adapter, module)
        yield b * (own.get(str(adapter), 1.0) / (norms[adapter] or 1.0)), a


ENTRIES = 2**24
"""Numbers in the factors of the slices that a cell is made of, 64 MiB in float32, at most, but for
`FEWEST` and ranks that are asked for."""

FEWEST = 128
"""Slices that a cell is made of, if it has as many, whatever their size."""


def collection_of(
    build: str,
    cell: PlannedCell,
    weights: str = "",
    widest: tuple[int, int] | None = None,
    rank: int | None = None,
) -> CollectionInBits:
    """The slices of a cell, or one from each of as many equal parts as memory is given to.

    So neither memory nor the time of a decomposition grows with the number of adapters. What many
    adapters share is told by some hundreds of them; what is private, by each when it is encoded.
    Where they have too few columns for a ``rank`` that is asked for, there are more of them.
    """
    count, columns = len(cell.members), sum(cell.ranks) / len(cell.ranks)
    most = max(FEWEST, int(ENTRIES / (sum(cell.shape) * columns)))
    most = max(most, math.ceil(2 * (rank or 0) / columns))
    members = tuple(cell.members[i] for i in strata(count, most))
    pairs = list(slices_of(build, replace(cell, members=members), weights))
    stack = LowRankStack([b for b, _ in pairs], [a for _, a in pairs])
    return CollectionInBits(stack, widest, count)


def module_products(build: str, places: Sequence[tuple[int, int]]) -> np.ndarray:
    """Inner products of every two adapters over one module, each adapter brought to norm 1.

    Parameters
    ----------
    build : str
        The build directory.
    places : sequence of (int, int)
        Numbers of the adapters, and of the module in each.
    """
    pairs = [read_factors(build, adapter, module) for adapter, module in places]
    own = read_norms(build)
    norms = [own[adapter] or 1.0 for adapter, _ in places]
    found = pair_products([b for b, _ in pairs], [a for _, a in pairs])
    scaled: np.ndarray = found / np.outer(norms, norms)
    return scaled


def price_cell(build: str, number: int, error: float, most_bytes: float) -> Priced:
    """Price a cell, down to the step at which its relative error is ``error``.

    Parameters
    ----------
    build : str
        The build directory.
    number : int
        Number of the cell in the plan.
    error : float
        Relative error at which to stop.
    most_bytes : float
        Bytes of the slices alone at which to stop, too.
    """
    target = Path(build) / f"price-{number:05}.json"
    if target.is_file():
        return Priced(*json.loads(target.read_text("utf-8")))
    cell = read_cell(build, number)
    collection = collection_of(build, cell)
    rows: list[list[float]] = []
    for step in STEPS if len(cell.members) > 1 else ():
        shares = collection.shares(step)
        best = cheapest(shares, step)
        row = [shares[0].bits, shares[0].lost2, best.bits, best.lost2, best.price(step)]
        row += best.ranks
        rows.append([float(value) for value in row])
        if best.lost2 <= error**2 * collection.norm2 or shares[0].bits > 8 * most_bytes:
            break
    means = cell.scope == "adapters"
    all_slices = partial(slices_of, build, cell)
    distances2 = collection.distances2(all_slices).tolist() if means else []
    write_once(target, json.dumps([rows, distances2]).encode())
    return Priced(rows, distances2)


def fit_cell(
    build: str,
    number: int,
    step: float,
    widest: tuple[int, int],
    weights: str = "",
    rank: int | None = None,
) -> str:
    """Make the basis of a cell; the name of its file, empty where none is worth its bits.

    Parameters
    ----------
    build : str
        The build directory.
    number : int
        Number of the cell in the plan.
    step : float
        Step of its grid, in norms of an adapter.
    widest : (int, int)
        Ranks that it does not exceed.
    weights : str
        File of `write_weights`, if adapters do not weigh the same.
    rank : int, optional
        Both ranks of the basis; those that are worth their bits if not given.
    """
    mark = weights.removeprefix("weights-").removesuffix(".json")
    target = Path(build) / f"cell-{number:05}-{step:.9e}{mark and '-' + mark}.safetensors"
    if not target.is_file():
        collection = collection_of(build, read_cell(build, number), weights, widest, rank)
        ranks = (rank, rank) if rank is not None else collection.best(step).ranks
        basis = collection.quantise(ranks, step)
        # Not an npz, whose header NumPy parses as Python: in threads that fails now and then.
        content: Tensors = {"step": np.array([step])}
        if basis is not None:
            content |= {"left": basis.left, "right": basis.right, "mean": basis.mean}
            content["slices"] = np.array([basis.slices])
            bound = SquaredError(collection.lower_bound2(basis.rank), collection.norm2)
            content |= {"bound": np.array([bound.relative]), "norm2": np.array([bound.norm2])}
            content["times"] = np.array([collection.times])
        write_once(target, file_bytes(content, {}))
    return target.name if "left" in read_header(target) else ""


def write_weights(build: str, weights: Mapping[int, float]) -> str:
    """Write weights of adapters, by their numbers; return the name of the file."""
    content = json.dumps({str(number): weight for number, weight in weights.items()}).encode()
    name = f"weights-{hashlib.sha256(content).hexdigest()[:16]}.json"
    write_once(Path(build) / name, content)
    return name


class CellFiles(Mapping[str, Cell]):
    """The cells of a build by module, read from their files when they are asked for.

    Parameters
    ----------
    build : str
        The build directory.
    files : sequence of (int, str)
        Number of every cell in the plan, and its file.
    """

    KEPT = 2**24
    """Codes that are kept in memory, with their columns in float64 about 400 MiB."""

    def __init__(self, build: str, files: Sequence[tuple[int, str]]) -> None:
        self.build, self.files = build, files
        self._planned = {number: read_cell(build, number, members=False) for number, _ in files}
        self._owner = {m: i for i, (n, _) in enumerate(files) for m in self._planned[n].modules}
        self._kept: dict[int, Cell] = {}
        self._room = self.KEPT

    def __getitem__(self, module: str) -> Cell:
        return self._cell(self._owner[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def bounds(self) -> tuple[SquaredError, ...]:
        """Squared errors that no basis of a cell's ranks falls below, nothing being private."""
        found = (read_file(Path(self.build) / file)[0] for _, file in self.files)
        pairs = ((float(x["bound"][0]), float(x["norm2"][0])) for x in found)
        return tuple(SquaredError(bound**2 * norm2, norm2) for bound, norm2 in pairs)

    def sampled(self) -> tuple[bool, ...]:
        """Whether a cell was made of a sample of its slices: its bound is of these alone."""
        found = (read_file(Path(self.build) / file)[0] for _, file in self.files)
        return tuple(float(x["times"][0]) > 1 for x in found)

    def in_order(self) -> Iterator[Cell]:
        """The cells, in the order of the plan."""
        return (self._cell(i) for i in range(len(self.files)))

    def _cell(self, place: int) -> Cell:
        if place in self._kept:
            return self._kept[place]
        number, file = self.files[place]
        planned = self._planned[number]
        found, _ = read_file(Path(self.build) / file)
        sides = found["left"], found["right"], found["mean"]
        basis = QuantisedBasis(*sides, float(found["step"][0]), int(found["slices"][0]))
        cell = Cell(planned.modules, planned.shape, basis, planned.cluster)
        if sum(side.size for side in sides) <= self._room:
            self._room -= sum(side.size for side in sides)
            self._kept[place] = cell
        return cell


class Encoded(NamedTuple):
    """A member in a file of the build: its name, bytes without carried tensors, relative error.

    ``uses_bases`` tells whether it has a core on any.
    """

    file: str
    bytes: int
    error: float
    uses_bases: bool


def member_bytes(tensors: Tensors) -> int:
    """Bytes that a member takes in a shard, tensors that it carries along not counted."""
    own = ((key, tensor) for key, tensor in tensors.items() if not key.startswith(CARRIED))
    return sum(tensor_bytes(f"000.{key}", tensor) for key, tensor in own)


def encode(
    build: str,
    number: int,
    files: Sequence[tuple[int, str]],
    step: float,
    tolerance: float | None,
    form: Form,
    private: bool = True,
) -> Encoded:
    """Encode an adapter.

    Parameters
    ----------
    build : str
        The build directory.
    number : int
        Number of the adapter.
    files : sequence of (int, str)
        The cells whose bases it may use, as `CellFiles` takes them; none stores it alone.
    step : float
        Step of its grid in norms of the adapter; with a tolerance, where the search begins.
    tolerance : float or None
        Relative error that is not exceeded.
    form : str
        What it is made of where it is stored alone; see `compress`.
    private : bool
        False keeps cores alone of modules that have a basis.
    """
    asked = json.dumps([list(files), step, tolerance, form, private]).encode()
    stem = f"member-{number:05}-{hashlib.sha256(asked).hexdigest()[:16]}"
    note = Path(build) / f"{stem}.json"
    if note.is_file():
        return Encoded(*json.loads(note.read_text("utf-8")))
    lora, norm = read_lora(build, number), read_spooled(build, number).norm
    if files:
        cells = CellFiles(build, files)
        member = on_bases(lora, cells, norm, tolerance=tolerance, step=step, private=private)
        tensors = member_to_tensors(member, list(cells.in_order()))
    else:
        member = alone(lora, form, tolerance=tolerance, step=step * norm or 1.0)
        tensors = member_to_tensors(member, ())
    write_once(Path(build) / f"{stem}.safetensors", file_bytes(tensors, {}))
    size = member_bytes(tensors)
    found = Encoded(f"{stem}.safetensors", size, member.relative_error, bool(member.cores))
    write_once(note, json.dumps(found).encode())
    return found
