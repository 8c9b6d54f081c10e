"""Groups of a compressed adapter as records of its index, checked when they are read."""

from __future__ import annotations

from typing import Any, NamedTuple

from lotrtensor.adapters.compressed_group import CompressedGroup, SourceRecord
from lotrtensor.adapters.formats.group_record import LARGEST_NUMBER
from lotrtensor.adapters.formats.names import fold, unfold
from lotrtensor.adapters.formats.tensors import FLOATS
from lotrtensor.errors import FormatError

LARGEST_SIDE = 2**22
"""Of a ΔW: a vocabulary has a sixteenth of that. Where nothing is left, a file backs no side."""


class GroupIndex(NamedTuple):
    """A group of the config, checked."""

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    slice_ranks: tuple[int, ...]
    shared: tuple[int, int]
    private: tuple[int, ...]
    step: float
    fit: tuple[float, float]
    embedding: bool

    @property
    def columns(self) -> int:
        """Columns of codes."""
        return sum(self.shared) + 2 * sum(self.private)

    @property
    def lengths(self) -> list[int]:
        """Entries of every column."""
        (m, n), (p, q) = self.shape, self.shared
        terms = [side for rank in self.private for side in [m] * rank + [n] * rank]
        return [m] * p + [n] * q + terms


def write_record(group: CompressedGroup) -> dict[str, Any]:
    """Return a group as the index lists it."""
    stack, ranks = group.stack, set(group.slice_ranks)
    record: dict[str, Any] = {
        "name": group.name,
        "modules": fold(group.modules),
        "shape": list(group.shape),
        "slice_ranks": list(group.slice_ranks) if len(ranks) > 1 else ranks.pop(),
        "private_ranks": list(group.private_ranks),
        # Rounded up: what is told is never below what is stored.
        "relative_error": rounded_up(group.relative_error),
        "norm": float(f"{group.norm:.9g}"),
    }
    if stack.shared is not None:
        record |= {"shared_ranks": list(stack.shared.rank), "step": stack.shared.step}
    if group.embedding:
        record["embedding"] = True
    return record


def rounded_up(x: float) -> float:
    """Return a number with six digits that is not below ``x``."""
    found = float(f"{x:.6g}")
    return found if found >= x else float(f"{x * (1 + 1e-5):.6g}")


def read_record(record: Any, directory: object) -> GroupIndex:
    """Return what `write_record` made.

    Raises
    ------
    FormatError
        Naming the field that is missing or mistyped; ``directory`` names the file.
    """

    def refuse(field: str, expected: str) -> FormatError:
        found = record.get(field) if isinstance(record, dict) else record
        return FormatError(
            f"{directory}: {field} of a group is {str(found)[:80]}; expected {expected}"
        )

    if not isinstance(record, dict):
        raise refuse("groups", "a list of objects")
    name, modules = record.get("name"), unfold(record.get("modules"))
    if not isinstance(name, str) or not name:
        raise refuse("name", "a string")
    if not modules or not all(modules) or len(set(modules)) != len(modules):
        raise refuse("modules", "different module paths, or a pattern and its numbers")
    count = len(modules)
    shape = _integers(record.get("shape"), 2, 1)
    private = _integers(record.get("private_ranks"), count, 0)
    slice_ranks = record.get("slice_ranks")
    slice_ranks = [slice_ranks] * count if isinstance(slice_ranks, int) else slice_ranks
    ranks = _integers(slice_ranks, count, 1)
    shared = _integers(record.get("shared_ranks", [0, 0]), 2, 0)
    if shape is None or max(shape) > LARGEST_SIDE:
        raise refuse("shape", f"two positive integers up to {LARGEST_SIDE}")
    if ranks is None or max(ranks) > min(shape):
        raise refuse(
            "slice_ranks", f"{count} positive integers no larger than {min(shape)}, or one"
        )
    if private is None or max(private) > min(shape):
        raise refuse("private_ranks", f"{count} integers between 0 and {min(shape)}")
    fits = shared is not None and shared[0] <= shape[0] and shared[1] <= shape[1]
    if shared is None or not fits or (0 in shared and shared != (0, 0)):
        raise refuse("shared_ranks", "two positive integers no larger than the shape")
    step = record.get("step", 1.0)
    fit = record.get("relative_error"), record.get("norm")
    if not all(_number(x) for x in (step, *fit)) or not step:
        raise refuse("step, relative_error and norm", "positive numbers")
    embedding = record.get("embedding", False)
    if type(embedding) is not bool:
        raise refuse("embedding", "true or false")
    return GroupIndex(
        name,
        modules,
        (shape[0], shape[1]),
        ranks,
        (shared[0], shared[1]),
        private,
        float(step),
        (float(fit[0] or 0), float(fit[1] or 0)),
        embedding,
    )


def _integers(value: Any, length: int, least: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) != length:
        return None
    return tuple(value) if all(type(x) is int and least <= x < 2**31 for x in value) else None


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < LARGEST_NUMBER  # NaN is neither


def read_source(record: Any, directory: object) -> SourceRecord:
    """Return what an adapter was made of: type, numbers and bytes.

    Raises
    ------
    FormatError
        If the record holds something else; ``directory`` names the file.
    """
    if isinstance(record, list) and len(record) == 3:
        dtype = next((known for known in FLOATS if known.name == record[0]), None)
        if dtype is not None and all(type(x) is int and 0 < x < 2**63 for x in record[1:]):
            return SourceRecord(dtype, record[1], record[2])
    raise FormatError(
        f"{directory}: source is {str(record)[:80]}; expected a type, its numbers and its bytes"
    )
