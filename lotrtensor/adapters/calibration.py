"""What a model does around its adapted layers, measured on some inputs: second moments, on disk.

`lotrtensor.torch.calibrate` measures; `lotrtensor.compress` keeps what they say counts. The file is
one of safetensors: a matrix a moment, and in its metadata which module has which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.directory import expand, write_file
from lotrtensor.adapters.formats.json_text import parse_json
from lotrtensor.adapters.formats.paths import exists
from lotrtensor.adapters.formats.tensors import file_bytes, read_file
from lotrtensor.core.options import check_flag, shown
from lotrtensor.errors import DataError, FormatError

FORMAT, VERSION = "lotr-calibration", 1


@dataclass(frozen=True, eq=False)
class Moment:
    """A second moment E x xᵀ ≈ RᵀR + what is left of its trace, evenly.

    Attributes
    ----------
    factor : ndarray (d, n)
        R: its leading eigenvectors times the roots of their eigenvalues.
    trace : float
        E ‖x‖², that beyond R included.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.Moment(np.eye(2, 8), trace=3.0).left_out
    1.0
    """

    factor: np.ndarray
    trace: float

    @property
    def size(self) -> int:
        """Entries n of x."""
        return int(self.factor.shape[1])

    @property
    def left_out(self) -> float:
        """What of the trace lies beyond R."""
        return max(self.trace - float(np.sum(self.factor.astype(np.float64) ** 2)), 0.0)


class ModuleMoments(NamedTuple):
    """Of one module: the moment of its inputs (n) and of the gradients at its outputs (m).

    ``norm`` is ‖ΔW‖ of the adapter that was in the model.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> one = lt.Moment(np.eye(2, 8), trace=3.0)
    >>> lt.ModuleMoments(one, one, norm=1.0).shape
    (8, 8)
    """

    inputs: Moment
    outputs: Moment
    norm: float

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the module's weight."""
        return self.outputs.size, self.inputs.size


@dataclass(frozen=True, eq=False)
class Calibration:
    """Moments of every adapted module.

    Attributes
    ----------
    modules : mapping of str to ModuleMoments
        By the path of the module. Modules that see one input share its moment.
    places : int
        How many inputs of a layer (tokens) were looked at.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> one = lt.Moment(np.eye(2, 8), trace=3.0)
    >>> calibration = lt.Calibration({"layers.0.q": lt.ModuleMoments(one, one, 1.0)}, places=100)
    >>> list(calibration.modules)
    ['layers.0.q']
    """

    modules: Mapping[str, ModuleMoments]
    places: int

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file of `save`.

        Raises
        ------
        FormatError
            If it is no calibration, or is damaged.
        """
        found = expand(path)
        if not exists(found):
            raise FormatError(f"{found} does not exist; expected what lotr calibrate wrote")
        tensors, metadata = read_file(found)
        if metadata.get("format") != FORMAT:
            raise FormatError(f"{found} is no calibration; expected what lotr calibrate wrote")
        if metadata.get("version") != str(VERSION):
            raise FormatError(
                f"{found} is a calibration of version {metadata.get('version')!r}; expected "
                f"{VERSION}: upgrade lotrtensor"
            )
        told = parse_json(metadata.get("modules", ""), f"{found}, its modules,")
        try:
            return cls(_modules(tensors, told), _count(metadata["places"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise FormatError(f"{found} is damaged: {what}; calibrate again") from error

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write one safetensors file, atomically; moments in float32.

        Raises
        ------
        FormatError
            If it exists and ``force`` is not given, or cannot be written.
        DataError
            If a number is not one that `load` takes back.
        """
        try:
            tensors, records = self._stored()
            _modules(tensors, parse_json(records, "the names and numbers of its modules"))
            _count(str(self.places))
        except (TypeError, ValueError, FormatError) as error:
            raise DataError(f"the calibration cannot be stored: {error}") from error
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "places": str(self.places),
            "modules": records,
        }
        content = file_bytes(tensors, metadata, checksums=True)
        write_file(expand(path), content, force=check_flag(force, "force"))

    def _stored(self) -> tuple[dict[str, np.ndarray], str]:
        """Every moment once, in float32, and which module has which."""
        tensors: dict[str, np.ndarray] = {}
        keys: dict[int, str] = {}
        records: dict[str, Any] = {}
        for name, found in self.modules.items():
            records[name] = {"norm": found.norm}
            for side in ("inputs", "outputs"):
                moment: Moment = getattr(found, side)
                key = keys.setdefault(id(moment), f"{len(keys)}.{side}")
                with np.errstate(over="ignore"):  # what is infinite is refused
                    tensors[key] = np.asarray(moment.factor, dtype=np.float32)
                records[name][side] = {"key": key, "trace": moment.trace}
        return tensors, json.dumps(records, sort_keys=True)

    def of(self, name: str, shape: tuple[int, int]) -> ModuleMoments:
        """Return the moments of a module.

        Raises
        ------
        DataError
            If it was not measured, or in another shape.
        """
        found = self.modules.get(name)
        if found is None:
            raise DataError(
                f"the calibration has no {name}, which the adapter adapts; it was made for another "
                "model or adapter"
            )
        if found.shape != shape:
            raise DataError(
                f"{name} is {shape} in the adapter and {found.shape} in the calibration, which was "
                "made for another model"
            )
        return found


def _modules(tensors: Mapping[str, np.ndarray], told: Any) -> dict[str, ModuleMoments]:
    """The modules of a file; a moment of several is one object."""
    known: dict[tuple[str, float], Moment] = {}
    found = {}
    for name, record in told.items():
        sides = []
        for side in ("inputs", "outputs"):
            key, trace = record[side]["key"], _number(record[side]["trace"])
            if (key, trace) not in known:
                known[key, trace] = _moment(key, tensors[key], trace)
            sides.append(known[key, trace])
        found[name] = ModuleMoments(sides[0], sides[1], _number(record["norm"]))
    return found


def _number(value: object) -> float:
    """A number as `Calibration.save` writes it; not negative, and as float32 holds it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LARGEST:
        raise ValueError(f"a number is {shown(value)}")
    return float(value)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or not int(text):
        raise ValueError(f"places is {shown(text)}")
    return int(text)


def _moment(key: str, factor: np.ndarray, trace: float) -> Moment:
    fits = factor.ndim == 2 and factor.dtype == np.float32 and 1 <= len(factor) <= factor.shape[1]
    if not fits or not np.isfinite(factor).all():
        raise ValueError(f"{key} is no moment of finite numbers")
    inside = float(np.sum(factor.astype(np.float64) ** 2))
    if not trace > SMALLEST or inside > (1 + ROUNDED) * trace:
        raise ValueError(f"the trace of {key} is {trace:.3g}, and its part {inside:.3g}")
    return Moment(factor, trace)


SMALLEST, LARGEST = 1e-30, 1e30
"""Traces are between these: a layer that sees, or answers, less has no part in the outputs."""

ROUNDED = 1e-3
"""How much of a moment's trace its rows may be too large by, rounded as they are."""
