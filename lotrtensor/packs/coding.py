"""Cells and members of a pack as tensors, and back; byte by byte on the page of file formats.

The tensors of a shard of cells are

    lotr_cells    bytes   a record of every cell, as JSON, deflated
    lotr_codes    bytes   the codes of all columns of U and V, then those of all mean cores
    lotr_kinds    int8    kind of every column

and those of a member, each key behind the member's number,

    coded         bytes   its own part and its cores; see `lotrtensor.adapters.formats.coded_row`
    carried.…             tensors that it carries along

Codes of a core whose places are of one kind are one column, whose kinds the bases tell.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.formats.coded_row import LONGEST, from_row, to_row
from lotrtensor.adapters.formats.compressed import code_groups, decode_groups
from lotrtensor.adapters.formats.json_text import parse_json
from lotrtensor.adapters.formats.lora_config import CARRIED_FIELDS, check_types
from lotrtensor.adapters.formats.names import fold, unfold
from lotrtensor.adapters.formats.tensors import Tensors
from lotrtensor.core.bits import stream
from lotrtensor.core.bits.basis import QuantisedBasis
from lotrtensor.core.options import shown
from lotrtensor.errors import FormatError
from lotrtensor.packs.members import Cell, Member, by_cluster

CELLS, CODES, KINDS = "lotr_cells", "lotr_codes", "lotr_kinds"
CODED, CARRIED = "coded", "carried."


def deflated(content: Any) -> np.ndarray:
    """Return JSON, with sorted keys and no spaces, as a zlib stream."""
    text = json.dumps(content, separators=(",", ":"), sort_keys=True).encode()
    return np.frombuffer(zlib.compress(text, 9), np.uint8)


def inflated(tensor: np.ndarray, where: str) -> Any:
    """Return the JSON in a tensor of bytes.

    Raises
    ------
    FormatError
        Naming the tensor, if it is damaged.
    """
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(tensor.tobytes(), LONGEST)
    except zlib.error as error:
        raise FormatError(f"{where} is damaged ({error}); fetch the pack again") from error
    if decoder.unconsumed_tail:
        raise FormatError(f"{where} is longer than {LONGEST} bytes; fetch the pack again")
    return parse_json(text, where)


class KindColumns(NamedTuple):
    """Codes of cores (… × p × q) by the kinds of their places, as columns."""

    columns: list[np.ndarray]
    kinds: list[int]


def by_kind(kinds: np.ndarray, codes: np.ndarray) -> KindColumns:
    """Return the codes of every kind as one column: slices, and within a slice by rows."""
    present = np.unique(kinds).tolist()
    slices = codes.reshape(-1, *kinds.shape)
    return KindColumns([slices[:, kinds == kind].ravel() for kind in present], present)


def from_columns(kinds: np.ndarray, columns: Sequence[np.ndarray], slices: int) -> np.ndarray:
    """Return codes (slices × p × q) from their columns: the inverse of `by_kind`."""
    codes = np.zeros((slices, *kinds.shape), np.int16)
    for kind, column in zip(np.unique(kinds).tolist(), columns, strict=True):
        codes[:, kinds == kind] = column.reshape(slices, -1)
    return codes


def column_sizes(kinds: np.ndarray, slices: int) -> tuple[list[int], list[int]]:
    """Return the kinds of the columns of `by_kind`, and their lengths."""
    present, counts = np.unique(kinds, return_counts=True)
    return present.tolist(), (slices * counts).tolist()


def cells_to_tensors(cells: Sequence[Cell]) -> Tensors:
    """Return the three tensors of a shard of cells."""
    columns = [x for cell in cells for side in (cell.basis.left, cell.basis.right) for x in side.T]
    means = [by_kind(cell.basis.kinds, cell.basis.mean) for cell in cells]
    kinds = stream.kinds_of(columns)
    codes = stream.pack(columns, kinds) + _pack(means)
    records = [
        {
            "modules": fold(cell.modules),
            "shape": list(cell.shape),
            "ranks": list(cell.basis.rank),
            "step": cell.basis.step,
            "slices": cell.basis.slices,
        }
        | ({"cluster": cell.cluster} if cell.cluster else {})
        for cell in cells
    ]
    return {CELLS: deflated(records), CODES: np.frombuffer(codes, np.uint8), KINDS: kinds}


def _pack(parts: Sequence[KindColumns]) -> bytes:
    kinds = np.array([kind for part in parts for kind in part.kinds], np.int8)
    return stream.pack([column for part in parts for column in part.columns], kinds)


def cells_from_tensors(tensors: Tensors, where: str) -> tuple[Cell, ...]:
    """Return the cells of a shard.

    Raises
    ------
    FormatError
        If the tensors are damaged, incomplete, or contradict each other; ``where`` names the file.
    """
    records = inflated(_bytes(tensors, CELLS, where), f"{where}: {CELLS}")
    known = [_cell_record(r, where) for r in records] if isinstance(records, list) else []
    if not known:
        raise FormatError(f"{where}: {CELLS} holds no list of cells; fetch the pack again")
    codes = _bytes(tensors, CODES, where).tobytes()
    kinds = tensors.get(KINDS)
    lengths = [side for r in known for side in [r.m] * r.p + [r.n] * r.q]
    if kinds is None or kinds.dtype != np.int8 or kinds.shape != (len(lengths),):
        raise FormatError(f"{where}: {KINDS} does not hold the kinds of {len(lengths)} columns")
    try:
        columns, size = stream.unpack_nonzero(codes, kinds, lengths)
        bases = []
        for r in known:
            left, right = np.stack(columns[: r.p], 1), np.stack(columns[r.p : r.p + r.q], 1)
            columns = columns[r.p + r.q :]
            mean = np.zeros((r.p, r.q), np.int16)
            bases.append(QuantisedBasis(left, right, mean, r.step, r.slices))
        told = [column_sizes(basis.kinds, 1) for basis in bases]
        means = _unpack(codes[size:], told)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    cells = []
    for r, basis, own in zip(known, bases, means, strict=True):
        core = from_columns(basis.kinds, own, 1)[0]
        whole = QuantisedBasis(basis.left, basis.right, core, r.step, r.slices)
        cells.append(Cell(r.modules, (r.m, r.n), whole, r.cluster))
    return tuple(cells)


def _unpack(content: bytes, told: Sequence[tuple[list[int], list[int]]]) -> list[list[np.ndarray]]:
    kinds = np.array([kind for own, _ in told for kind in own], np.int8)
    lengths = [length for _, own in told for length in own]
    columns, size = stream.unpack(content, kinds, lengths)
    if size != len(content):
        raise FormatError(f"{len(content) - size} bytes follow the codes; expected none")
    found = []
    for own, _ in told:
        found.append(columns[: len(own)])
        columns = columns[len(own) :]
    return found


class _CellRecord(NamedTuple):
    modules: tuple[str, ...]
    m: int
    n: int
    p: int
    q: int
    step: float
    slices: int
    cluster: int


def _cell_record(record: Any, where: str) -> _CellRecord:
    fields = record if isinstance(record, dict) else {}
    modules, step = unfold(fields.get("modules")), fields.get("step")
    slices: Any = fields.get("slices")
    cluster: Any = fields.get("cluster", 0)
    (m, n), (p, q) = _pair(fields.get("shape")), _pair(fields.get("ranks"))
    numbers = is_number(step) and is_natural(slices) and slices > 0 and is_natural(cluster)
    if modules and numbers and step and 0 < p <= m and 0 < q <= n:
        return _CellRecord(modules, m, n, p, q, float(step), slices, cluster)
    raise FormatError(
        f"{where}: the record of a cell is {str(record)[:120]}; expected modules, a shape, ranks "
        "no larger than that, a step, a number of slices and of the cluster: fetch the pack again"
    )


def _pair(value: Any) -> tuple[int, int]:
    """Two positive integers of a JSON document, or two zeros where it has something else."""
    if not isinstance(value, list) or len(value) != 2:
        return 0, 0
    first, second = value
    fits = all(type(x) is int and 0 < x < 2**31 for x in value)
    return (first, second) if fits else (0, 0)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON document is a finite number that is not negative."""
    return type(value) in (int, float) and 0 <= value < 1e30  # NaN is neither


def is_natural(value: object) -> bool:
    """Whether a value of a JSON document is a whole number that is not negative."""
    return type(value) is int and 0 <= value < 2**31


def member_to_tensors(member: Member, cells: Sequence[Cell]) -> Tensors:
    """Return the tensors of a member, without its number; ``cells`` are all of the pack."""
    coded = code_groups(member.own.groups, member.own.source)
    index = coded.records | ({"config": member.own.config} if member.own.config else {})
    cores = b""
    if member.cores:
        index |= {"weight": member.weight, "step": member.step}
        cluster = next(cell.cluster for cell in member.cells.values())
        if cluster:
            index |= {"cluster": cluster}
        shared = []
        for cell in by_cluster(cells)[cluster]:
            own = [member.cores[name] for name in cell.modules if name in member.cores]
            if own:
                shared.append(by_kind(cell.basis.kinds, np.stack(own)))
        cores = _pack(shared)
    row = to_row(coded._replace(records=index), cores)
    return {CODED: row} | {CARRIED + key: tensor for key, tensor in member.own.extras.items()}


def member_from_tensors(tensors: Tensors, cells: Sequence[Cell], where: str) -> Member:
    """Return a member; its modules that a cell names have cores where it has any.

    Raises
    ------
    FormatError
        If the tensors are damaged, incomplete, or contradict each other; ``where`` names the file.
    """
    coded, content = from_row(_bytes(tensors, CODED, where), f"{where}: {CODED}")
    record = coded.records
    config = record.get("config", {})
    if not isinstance(config, dict):
        raise FormatError(f"{where}: {CODED} holds no config; fetch the pack again")
    check_types(config, CARRIED_FIELDS, where)
    groups, source = decode_groups(coded, where)
    extras = {k.removeprefix(CARRIED): x for k, x in tensors.items() if k.startswith(CARRIED)}
    own = CompressedAdapter(groups, config, source, extras)
    weight: Any = record.get("weight")
    step: Any = record.get("step")
    if weight is None and step is None and not content:
        return Member(own)
    if not is_number(weight) or not is_number(step) or not step:
        raise FormatError(f"{where}: {CODED} has no weight and step; fetch the pack again")
    shapes = {name: group.shape for group in groups for name in group.modules}
    cluster: Any = record.get("cluster", 0)
    own_cells = by_cluster(cells).get(cluster) if is_natural(cluster) else None
    if own_cells is None:
        raise FormatError(
            f"{where}: {CODED} is of the cluster {shown(cluster)}, which shares no bases; fetch "
            "the pack again"
        )
    named = [(cell, [name for name in cell.modules if name in shapes]) for cell in own_cells]
    used = [(cell, names) for cell, names in named if names]
    unlike = next((n for c, ns in used for n in ns if shapes[n] != c.shape), None)
    if unlike is not None:
        raise FormatError(f"{where}: {unlike} has another shape in the pack; fetch the pack again")
    try:
        told = [column_sizes(cell.basis.kinds, len(names)) for cell, names in used]
        parts = _unpack(content, told)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    cores: dict[str, np.ndarray] = {}
    for (cell, names), columns in zip(used, parts, strict=True):
        codes = from_columns(cell.basis.kinds, columns, len(names))
        cores |= dict(zip(names, codes, strict=True))
    return Member(own, cores, float(weight), float(step), cells_by_module(c for c, _ in used))


def cells_by_module(cells: Any) -> Mapping[str, Cell]:
    """Return the cell of every module."""
    return {name: cell for cell in cells for name in cell.modules}


def _bytes(tensors: Mapping[str, np.ndarray], key: str, where: str) -> np.ndarray:
    found = tensors.get(key)
    if found is None or found.dtype != np.uint8 or found.ndim != 1:
        raise FormatError(f"{where}: {key} is missing or no row of bytes; fetch the pack again")
    return found
