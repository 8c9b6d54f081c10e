"""A group in ``adapter_config.json``: what its entry holds, written and read here alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lotrtensor.adapters.lotr_group import FitRecord
from lotrtensor.errors import FormatError

LARGEST_NUMBER = 1e150
"""What no scale and no norm reaches: squares of smaller ones can be added up."""


@dataclass(frozen=True)
class GroupRecord:
    """The entry of a group.

    Attributes
    ----------
    name : str
        Name of the group; also its key in the file.
    modules : tuple of str
        Paths of the adapted modules, one per slice.
    shape : (int, int)
        Shape (m, n) of one ΔW_k.
    rank : (int, int)
        Left and right rank (p, q).
    slice_ranks : tuple of int
        Rank r_k that each ΔW_k had before.
    scale : float
        Factor of every ΔW beside U G_k Vᵀ.
    embedding : bool
        Whether the modules are embeddings.
    fit : FitRecord or None
        How well the group stands for what it was fitted to.
    private_ranks : tuple of int
        Width of the private part of each ΔW_k; empty, and not written, in version 1.
    """

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    rank: tuple[int, int]
    slice_ranks: tuple[int, ...]
    scale: float
    embedding: bool = False
    fit: FitRecord | None = None
    private_ranks: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON holds it."""
        entry = {
            "name": self.name,
            "modules": list(self.modules),
            "shape": list(self.shape),
            "rank": list(self.rank),
            "slice_ranks": list(self.slice_ranks),
            "scale": self.scale,
            "embedding": self.embedding,
            "fit": asdict(self.fit) if self.fit else None,
        }
        return entry | ({"private_ranks": list(self.private_ranks)} if self.private_ranks else {})

    @classmethod
    def from_json(cls, entry: Any, where: object, *, private: bool = False) -> GroupRecord:
        """Read an entry, every field of the type and length that the format says.

        Parameters
        ----------
        entry : object
            An element of ``groups``.
        where : object
            The file or adapter, named in messages.
        private : bool
            Whether there may be private parts, and groups that share nothing: in version 2.

        Raises
        ------
        FormatError
            Naming the field, what was found and what was expected.
        """
        if not isinstance(entry, Mapping):
            raise _refusal(where, "an entry", entry, "an object")
        for field, (holds, expected) in {**_EXPECTED, **(_PRIVATE if private else {})}.items():
            if not holds(entry.get(field)):
                raise _refusal(where, field, entry.get(field, "missing"), expected)
        modules, ranks, fit = entry["modules"], entry["slice_ranks"], entry.get("fit")
        private_ranks = tuple(entry.get("private_ranks") or ()) if private else ()
        if private_ranks and len(private_ranks) != len(modules):
            raise _refusal(where, "private_ranks", list(private_ranks), f"{len(modules)} integers")
        if len(ranks) != len(modules):
            raise _refusal(
                where, "slice_ranks", ranks, f"{len(modules)} positive integers, one per module"
            )
        return cls(
            name=entry["name"],
            modules=tuple(modules),
            shape=(entry["shape"][0], entry["shape"][1]),
            rank=(entry["rank"][0], entry["rank"][1]),
            slice_ranks=tuple(ranks),
            scale=float(entry["scale"]),
            embedding=bool(entry.get("embedding")),
            fit=FitRecord(**fit) if fit else None,
            private_ranks=private_ranks,
        )


def _refusal(where: object, field: str, found: object, expected: str) -> FormatError:
    return FormatError(f"{where}: {field} of a group is {str(found)[:80]}; expected {expected}")


def _integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(v) is int and 0 < v < 2**31 for v in value)


def _pair(value: Any) -> bool:
    return _integers(value) and len(value) == 2


def _counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(v) is int and 0 <= v < 2**31 for v in value)


def _rank_or_none(value: Any) -> bool:
    return _pair(value) or (_counts(value) and list(value) == [0, 0])


def _names(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(name, str) and name for name in value)
        and len(set(value)) == len(value)
    )


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER


def _fit(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and set(value) == set(_FIT_FIELDS)
        and all(
            type(number) in (int, float) and 0 <= number < LARGEST_NUMBER
            for number in value.values()
        )
    )


_FIT_FIELDS = tuple(field.name for field in fields(FitRecord))

_EXPECTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: isinstance(v, str) and bool(v), "a string"),
    "modules": (_names, "a list of different module paths"),
    "shape": (_pair, "two positive integers"),
    "rank": (_pair, "two positive integers"),
    "slice_ranks": (_integers, "positive integers, one per module"),
    "scale": (_finite, "a finite number"),
    "embedding": (lambda v: v is None or isinstance(v, bool), "true or false"),
    "fit": (_fit, f"null, or the numbers {', '.join(_FIT_FIELDS)}"),
}

_PRIVATE: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (_rank_or_none, "two positive integers, or two zeros"),
    "private_ranks": (lambda v: v is None or _counts(v), "integers of 0 or more, one a module"),
}
