"""What differs between two checkpoints: weight deltas, read one at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from lotrtensor.adapters.formats.checkpoint import Checkpoint
from lotrtensor.errors import DataError, FormatError

WEIGHT = ".weight"


@dataclass(frozen=True, eq=False)
class Deltas:
    """Two checkpoints, and what differs between them.

    Attributes
    ----------
    base, tuned : Checkpoint
        Before and after fine-tuning.
    names : tuple of str
        Keys of the weight matrices that were asked for and differ.
    others : tuple of str
        Keys of other tensors that differ, or that one side lacks.
    """

    base: Checkpoint
    tuned: Checkpoint
    names: tuple[str, ...]
    others: tuple[str, ...]
    _checked: set[str] = field(default_factory=set)

    def read(self, key: str) -> np.ndarray:
        """Return tuned − base of one weight, as stored, in float32 at the least.

        Raises
        ------
        DataError
            If the weight is quantised, or the difference is not finite.
        """
        delta: np.ndarray = _widened(self.tuned.read(key))
        base = self.base.read(key)
        if base.dtype.itemsize > delta.dtype.itemsize:
            delta = delta.astype(base.dtype)
        delta = np.require(delta, requirements="W")
        np.subtract(delta, base, out=delta, casting="unsafe")
        if key not in self._checked:
            if not np.isfinite(delta).all():
                raise DataError(
                    f"{self._culprit(key)}: {key} holds NaN or infinite values; expected finite "
                    "numbers"
                )
            self._checked.add(key)
        return delta

    def _culprit(self, key: str) -> str:
        finite = np.isfinite(self.base.read(key)).all()
        return str((self.tuned if finite else self.base).directory)


def compare_checkpoints(base: Checkpoint, tuned: Checkpoint, pattern: str | None) -> Deltas:
    """Find what differs; tensors of equal bytes are left out.

    Parameters
    ----------
    base, tuned : Checkpoint
        Before and after fine-tuning.
    pattern : str, optional
        Regular expression that occurs in the names of the weight matrices wanted; all if not
        given.

    Raises
    ------
    FormatError
        If the pattern is no regular expression, no weight matches, or two have unlike shapes.
    DataError
        If a weight that is wanted is quantised in one of the two.
    """
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise FormatError(f"modules {pattern!r} is no regular expression: {error}") from error
    keys = [key for key in {**base.tensors, **tuned.tensors} if key.endswith(WEIGHT)]
    keys = [key for key in keys if wanted.search(key.removesuffix(WEIGHT))]
    _check_packed(base, tuned, keys)
    matrices = {k for k in keys if k in base.tensors and k in tuned.tensors and _is_matrix(base, k)}
    if not matrices:
        raise FormatError(
            f"{base.directory} and {tuned.directory} have no two-dimensional weight in common"
            + (f" that matches {pattern!r}" if pattern else "")
        )
    names = []
    others = sorted(base.tensors.keys() ^ tuned.tensors.keys())
    for key in base.tensors:
        if key in matrices:
            shapes = (base.tensors[key].shape, tuned.tensors[key].shape)
            if shapes[0] != shapes[1]:
                raise FormatError(
                    f"{tuned.directory}: {key} is {shapes[1]}, in {base.directory} it is "
                    f"{shapes[0]}; the checkpoints belong to different models, or the weight was "
                    "resized: leave it out by a pattern for modules"
                )
            if _differs(base, tuned, key):
                base.dtype(key)
                tuned.dtype(key)
                names.append(key)
        elif key.endswith(WEIGHT) and _is_matrix(base, key):
            continue  # a matrix that the pattern leaves out is no news
        elif key in tuned.tensors and _differs(base, tuned, key):
            others.append(key)
    return Deltas(base, tuned, tuple(names), tuple(others))


def _is_matrix(checkpoint: Checkpoint, key: str) -> bool:
    return len(checkpoint.tensors[key].shape) == 2


def _check_packed(base: Checkpoint, tuned: Checkpoint, keys: list[str]) -> None:
    """Refuse a weight that one side holds in packed form, under other keys."""
    for whole, other in ((base, tuned), (tuned, base)):
        packed = other.packed()
        for key in keys:
            module = key.removesuffix(WEIGHT)
            if key in whole.tensors and key not in other.tensors and module in packed:
                raise DataError(
                    f"{other.directory}: {packed[module]} is quantised and there is no {key}; "
                    "dequantise the checkpoint first"
                )


def _differs(base: Checkpoint, tuned: Checkpoint, key: str) -> bool:
    """Whether a tensor differs: byte by byte, or in its values where the types are unlike."""
    first, second = base.tensors[key], tuned.tensors[key]
    if first.shape != second.shape:
        return True
    if first.dtype == second.dtype:
        pairs = zip(base.blocks(key), tuned.blocks(key), strict=True)
        return any(not np.array_equal(a, b) for a, b in pairs)
    try:
        return not np.array_equal(_widened(base.read(key)), _widened(tuned.read(key)))
    except DataError:
        return True


def _widened(tensor: np.ndarray) -> np.ndarray:
    return tensor if tensor.dtype.itemsize > 2 else tensor.astype(np.float32)
