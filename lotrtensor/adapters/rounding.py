"""Rounding to a storage type, which must hold the numbers."""

from __future__ import annotations

import numpy as np

from lotrtensor.errors import DataError


def rounded(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return ``x`` in ``dtype``.

    Raises
    ------
    DataError
        If a finite number becomes infinite: float16 ends at 65504. The message names ``name``.
    """
    with np.errstate(over="ignore"):
        found = x.astype(dtype)
    if not np.isfinite(found.astype(np.float64)).all():
        raise DataError(
            f"{name} has entries up to {float(np.max(np.abs(x))):.3g}, which {dtype.name} does not "
            "hold; store it as float32"
        )
    return found
