"""What differs between two checkpoints: weight deltas, read one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from lotrtensor.adapters.formats.checkpoint import Checkpoint
from lotrtensor.adapters.layers import WEIGHT
from lotrtensor.adapters.layers import pattern as compiled
from lotrtensor.adapters.names import NameIndex
from lotrtensor.adapters.quantised import check_not_quantised
from lotrtensor.errors import DataError, FormatError, LotrWarning

Resized = Literal["refuse", "common-rows"]
"""What becomes of a weight of which one checkpoint has more rows: a larger vocabulary."""


@dataclass(frozen=True, eq=False)
class Deltas:
    """Two checkpoints, and what differs between them.

    Attributes
    ----------
    base, tuned : Checkpoint
        Before and after fine-tuning, with the same names.
    names : tuple of str
        Names of the weight matrices that were asked for and differ.
    others : tuple of str
        Names of other tensors that differ, or that one side lacks.
    left_out : tuple of str
        Names of weight matrices that were not asked for; they were not compared.
    """

    base: Checkpoint
    tuned: Checkpoint
    names: tuple[str, ...]
    others: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    _checked: set[str] = field(default_factory=set)

    def read(self, name: str) -> np.ndarray:
        """Return tuned − base of one weight, as stored, in float32 at the least.

        It has the shape of the base; rows that the tuned checkpoint lacks are zero.

        Raises
        ------
        DataError
            If the weight is quantised, or the difference is not finite.
        """
        rows, columns = self.base.tensors[name].shape
        tuned, base = self.tuned.read(name), self.base.read(name)
        widest = max((base.dtype, tuned.dtype), key=lambda dtype: dtype.itemsize)
        working = widest if widest.itemsize > 2 else np.dtype(np.float32)
        common = min(rows, tuned.shape[0])
        # Numbers are widened a few thousand at a time: no wide copy is made of either side.
        delta: np.ndarray = np.subtract(
            tuned[:common], base[:common], dtype=working, casting="unsafe"
        )
        if tuned.shape != base.shape:
            found = np.zeros((rows, columns), dtype=working)
            found[:common] = delta
            delta = found
        if name not in self._checked:
            if not np.isfinite(delta).all():
                raise DataError(
                    f"{self._culprit(name)}: {name} holds NaN or infinite values; expected finite "
                    "numbers"
                )
            self._checked.add(name)
        return delta

    def without(self, names: set[str]) -> Deltas:
        """Return the deltas without some weights."""
        return replace(self, names=tuple(name for name in self.names if name not in names))

    def nothing(self) -> FormatError:
        """Say why no weight matrix that was asked for differs: what does differ, if anything."""
        both = f"{self.tuned.directory} and {self.base.directory}"
        rest = (name for name in self.left_out if _differs(self.base, self.tuned, name))
        matrix = next(rest, None)
        if matrix is not None:
            return FormatError(
                f"{both} differ in no weight that the pattern for modules matches, but in others "
                f"such as {matrix}; choose another pattern"
            )
        if self.others:
            first = self.others[0]
            held = self.base if first in self.base.tensors else self.tuned
            shape = " × ".join(map(str, held.tensors[first].shape)) or "a number"
            return FormatError(
                f"{both} differ in {len(self.others)} tensors that are no two-dimensional weights "
                f"of both, such as {first} ({shape}), and in no other; expected weight matrices: "
                "these have no LoTR form"
            )
        return FormatError(
            f"{self.tuned.directory} has the same weights as {self.base.directory}; there is "
            "nothing to extract"
        )

    def _culprit(self, name: str) -> str:
        finite = np.isfinite(self.base.read(name).astype(np.float64)).all()
        return str((self.tuned if finite else self.base).directory)


def compare_checkpoints(
    base: Checkpoint, tuned: Checkpoint, pattern: str | None, resized: Resized = "refuse"
) -> Deltas:
    """Find what differs; tensors of equal bytes are left out.

    Parameters
    ----------
    base, tuned : Checkpoint
        Before and after fine-tuning.
    pattern : str, optional
        Regular expression that occurs in the names of the weight matrices wanted; all if not
        given.
    resized : str
        Weights of unlike numbers of rows: refused, or their common rows taken, with a warning.

    Raises
    ------
    FormatError
        If the pattern is no regular expression, no weight matches, or two have unlike shapes.
    DataError
        If a weight that is wanted is quantised in one of the two.
    """
    wanted = compiled("" if pattern is None else pattern, "modules")
    tuned = _aligned(base, tuned)

    def differs(name: str) -> bool:
        return name not in base.tensors or name not in tuned.tensors or _differs(base, tuned, name)

    check_not_quantised(base, tuned, wanted.search, differs)
    common = [name for name in base.tensors if name in tuned.tensors]
    matrices = {name for name in common if _is_matrix(base, name)}
    matching = {name for name in matrices if wanted.search(name.removesuffix(WEIGHT))}
    if not matching:
        raise _no_matrix(base, tuned, pattern)
    names = []
    others = sorted(base.tensors.keys() ^ tuned.tensors.keys())
    for name in common:
        if name in matching:
            if base.tensors[name].shape != tuned.tensors[name].shape:
                _check_resized(base, tuned, name, resized)
            if _differs(base, tuned, name):
                base.dtype(name)
                tuned.dtype(name)
                names.append(name)
        elif name not in matrices and _differs(base, tuned, name):
            others.append(name)
    left_out = tuple(name for name in common if name in matrices - matching)
    return Deltas(base, tuned, tuple(names), tuple(others), left_out)


def _aligned(base: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """Return the tuned checkpoint with the base's names, where prefixes or containers differ."""
    index = NameIndex(base.tensors.keys() - tuned.tensors.keys())
    clear: dict[str, str] = {}
    for name in sorted(tuned.tensors.keys() - base.tensors.keys()):
        found = index.find(name)
        if len(found) == 1 and base.tensors[found[0]].shape == tuned.tensors[name].shape:
            clear[name] = found[0]
    if not clear or len(set(clear.values())) < len(clear):
        return tuned
    first = next(iter(clear))
    warnings.warn(
        f"{tuned.directory} and {base.directory} have other names for {len(clear)} tensors; "
        f"{first} is taken for {clear[first]}",
        LotrWarning,
        stacklevel=4,
    )
    return tuned.renamed(lambda name: clear.get(name, name))


def _no_matrix(base: Checkpoint, tuned: Checkpoint, pattern: str | None) -> FormatError:
    return FormatError(
        f"{base.directory} and {tuned.directory} have no two-dimensional weight in common"
        + (f" that matches {pattern!r}" if pattern else "")
    )


def _check_resized(base: Checkpoint, tuned: Checkpoint, name: str, resized: Resized) -> None:
    first, second = base.tensors[name].shape, tuned.tensors[name].shape
    rows_only = len(second) == 2 and first[1] == second[1]
    if not rows_only or resized != "common-rows":
        way = (
            "leave it out by a pattern for modules, or take the rows that both have with "
            "--resized common-rows"
            if rows_only
            else "they belong to different models: leave it out by a pattern for modules"
        )
        raise FormatError(
            f"{tuned.directory}: {name} is {second}, in {base.directory} it is {first}"
            + (", so it was resized; " if rows_only else "; ")
            + way
        )
    common = min(first[0], second[0])
    more = "tuned" if second[0] > common else "base"
    warnings.warn(
        f"{name}: the {more} checkpoint has {max(first[0], second[0]) - common} rows more; the "
        f"{common} rows in common are taken, the rest is left out",
        LotrWarning,
        stacklevel=4,
    )


def _is_matrix(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(WEIGHT) and len(checkpoint.tensors[name].shape) == 2


def _differs(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Whether a tensor differs: byte by byte, or in its values where the types are unlike.

    Of two that differ in their number of rows alone, whether the common rows do.
    """
    first, second = base.tensors[name], tuned.tensors[name]
    if first.shape == second.shape and first.dtype == second.dtype:
        pairs = zip(base.blocks(name), tuned.blocks(name), strict=True)
        return any(not np.array_equal(a, b) for a, b in pairs)
    if len(first.shape) != len(second.shape) or first.shape[1:] != second.shape[1:]:
        return True
    if first.shape != second.shape and not _is_matrix(base, name):
        return True
    try:
        one, other = base.read(name), tuned.read(name)
    except DataError:
        return True
    if one.dtype != other.dtype:
        one, other = _widened(one), _widened(other)
    if not first.shape:
        return bool(one != other)
    common = min(len(one), len(other))
    return not np.array_equal(one[:common], other[:common])


def _widened(tensor: np.ndarray) -> np.ndarray:
    return tensor if tensor.dtype.itemsize > 2 else tensor.astype(np.float32)


def with_tied(checkpoint: Checkpoint, ties: Mapping[str, frozenset[str]]) -> Checkpoint:
    """Return a checkpoint in which every tied weight is found under each of its names.

    Parameters
    ----------
    checkpoint : Checkpoint
        Holds a shared weight once, or more often.
    ties : mapping of str to frozenset of str
        The names of a weight by each of them.
    """
    tensors = dict(checkpoint.tensors)
    for name, members in ties.items():
        stored = next((m for m in sorted(members) if m in checkpoint.tensors), None)
        if name not in tensors and stored is not None:
            tensors[name] = checkpoint.tensors[stored]
    return replace(checkpoint, tensors=tensors)
