"""What a model does around its adapted layers, measured on some inputs: second moments, on disk.

`lotrtensor.torch.calibrate` measures; `lotrtensor.compress` keeps what they say counts. The file is
one of safetensors: a matrix a moment, and in its metadata which module has which.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.directory import expand, write_file
from lotrtensor.adapters.formats.json_text import parse_json
from lotrtensor.adapters.formats.tensors import check_exists, check_floating, file_bytes, read_file
from lotrtensor.core.options import check_flag
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
        DataError
            If it holds numbers that are not finite.
        """
        found = expand(path)
        check_exists(found)
        tensors, metadata = read_file(found)
        if metadata.get("format") != FORMAT:
            raise FormatError(
                f"{found} is no calibration; expected a file that lotr calibrate wrote"
            )
        if metadata.get("version") != str(VERSION):
            raise FormatError(
                f"{found} is a calibration of version {metadata.get('version')!r}; expected "
                f"{VERSION}: upgrade lotrtensor"
            )
        for key, tensor in tensors.items():
            check_floating(key, tensor, found)
        try:
            told = parse_json(metadata["modules"], f"{found}, its modules,")
            known: dict[str, Moment] = {}
            modules = {name: _module(tensors, record, known) for name, record in told.items()}
            return cls(modules, int(metadata["places"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{found} is damaged: {error!r}; calibrate again") from error

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write one safetensors file, atomically.

        Raises
        ------
        FormatError
            If it exists and ``force`` is not given, or cannot be written.
        """
        tensors: dict[str, np.ndarray] = {}
        keys: dict[int, str] = {}
        records: dict[str, Any] = {}
        for name, found in self.modules.items():
            records[name] = {"norm": found.norm}
            for side in ("inputs", "outputs"):
                moment: Moment = getattr(found, side)
                key = keys.setdefault(id(moment), f"{len(keys)}.{side}")
                tensors[key] = moment.factor
                records[name][side] = {"key": key, "trace": moment.trace}
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "places": str(self.places),
            "modules": json.dumps(records, sort_keys=True),
        }
        content = file_bytes(tensors, metadata, checksums=True)
        write_file(expand(path), content, force=check_flag(force, "force"))

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


def _module(
    tensors: Mapping[str, np.ndarray], record: Mapping[str, Any], known: dict[str, Moment]
) -> ModuleMoments:
    """One module's record; a moment of several modules is one object."""
    inputs, outputs = (
        known.setdefault(own["key"], _moment(tensors[own["key"]], own))
        for own in (record["inputs"], record["outputs"])
    )
    norm = float(record["norm"])
    if not math.isfinite(norm):
        raise ValueError(f"a norm is {norm}")
    return ModuleMoments(inputs, outputs, norm)


def _moment(factor: np.ndarray, record: Mapping[str, Any]) -> Moment:
    trace = float(record["trace"])
    if factor.ndim != 2 or not math.isfinite(trace) or trace <= 0.0:
        raise ValueError(f"{record['key']} is no moment")
    return Moment(factor, trace)
