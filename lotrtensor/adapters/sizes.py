"""Storage types and budgets as people write them."""

from __future__ import annotations

import re

import numpy as np

from lotrtensor.adapters.formats.tensors import FLOATS
from lotrtensor.core.options import is_huge, shown
from lotrtensor.errors import OptionError, RankError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


_BUDGET = re.compile(r"\s*(\d{1,30}(?:\.\d{0,30})?)\s*([a-zA-Z%]*)\s*")


MOST_PARAMETERS = 2.0**62
"""What no adapter has, and what arrays of sizes still hold."""


def check_dtype(dtype: np.dtype | str) -> np.dtype:
    """Return a storage type by name.

    Raises
    ------
    OptionError
        If adapters are not stored in it: float64, float32, float16, bfloat16, float8_e4m3fn and
        float8_e5m2 are.
    """
    found = next((known for known in FLOATS if str(dtype) == known.name), None)
    if found is None:
        names = ", ".join(known.name for known in FLOATS)
        raise OptionError(f"dtype is {str(dtype)!r}; expected one of {names}")
    return found


def budget_bytes(budget: int | str, source_bytes: int) -> int:
    """Return a budget in bytes: ``80000``, ``"80KB"``, or a share of the source's, ``"12%"``.

    Raises
    ------
    RankError
        If it is none of these.

    Examples
    --------
    >>> budget_bytes("1KiB", 4096), budget_bytes("25%", 4096)
    (1024, 1024)
    """
    found = budget_parameters(budget, 1, source_bytes, smallest=0)
    if not found:
        raise RankError(f"budget is {shown(budget)}; expected a byte at least")
    if str(budget).strip().upper().endswith("P"):
        raise RankError(
            f"budget is {shown(budget)}; expected bytes such as 500KB, or a share such as 25%"
        )
    return found


def budget_parameters(
    budget: int | str, itemsize: int, source_bytes: int, smallest: int = 1
) -> int:
    """Return a budget as a number of parameters.

    Parameters
    ----------
    budget : int or str
        Bytes: ``500000``, ``"500KB"``, ``"1.5MiB"``; a share of the source's bytes: ``"25%"``; or
        parameters: ``"20000p"``.
    itemsize : int
        Bytes of a stored number.
    source_bytes : int
        Bytes of the adapter that a share refers to.
    smallest : int
        Parameters of the smallest result possible.

    Raises
    ------
    RankError
        If it is none of these, or below ``smallest``.

    Examples
    --------
    >>> budget_parameters("1KiB", 2, 4096), budget_parameters("25%", 2, 4096)
    (512, 512)
    """
    match = None if is_huge(budget) else _BUDGET.fullmatch(str(budget))
    unit = match[2].upper() if match else None
    if match is None or unit not in (*_UNITS, "%", "P"):
        raise RankError(
            f"budget is {shown(budget)}; expected bytes such as 500KB, a share such as 25%, or "
            "parameters such as 20000p"
        )
    number = float(match[1])
    if unit == "P":
        parameters = number
    elif unit == "%":
        parameters = number / 100 * source_bytes / itemsize
    else:
        parameters = number * _UNITS[unit] / itemsize
    if parameters < smallest:
        raise RankError(
            f"budget is {shown(budget)}; the smallest result, of rank 1 throughout, needs "
            f"{smallest} parameters, {smallest * itemsize} bytes"
        )
    return int(min(parameters, MOST_PARAMETERS))
