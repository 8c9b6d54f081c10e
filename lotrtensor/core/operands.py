"""as_stack: make a stack of anything that stands for K slices of one shape."""

from __future__ import annotations

from typing import Any

from array_api_compat import is_array_api_obj

from lotrtensor.core.arrays import Array
from lotrtensor.core.stacks.dense import DenseStack
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import DataError

Operand = SliceStack | Tucker2 | Array
"""A stack, a decomposition, an array (K, m, n), or a list of pairs (B_k, A_k)."""


def as_stack(slices: Operand) -> SliceStack:
    """Return what stands for K slices ΔW_k (m × n) as a stack.

    Parameters
    ----------
    slices : SliceStack, Tucker2, array (K, m, n), or sequence of pairs (B_k, A_k)
        A stack is returned as it is; a Tucker2 keeps thin factors; pairs are those of a
        `LowRankStack`, (m × r_k) and (r_k × n).

    Returns
    -------
    SliceStack
        A stack of the same slices.

    Raises
    ------
    DataError
        If it is none of these.
    ShapeError
        If arrays do not fit together.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(4, 20, 2)), rng.normal(size=(4, 2, 30))
    >>> lt.as_stack(list(zip(B, A))).shape, lt.as_stack(np.ones((3, 4, 5))).shape
    ((4, 20, 30), (3, 4, 5))
    """
    if isinstance(slices, Tucker2):
        return slices.to_low_rank()
    if isinstance(slices, SliceStack) and not isinstance(slices, type):
        return slices
    if is_array_api_obj(slices):
        return DenseStack(slices)
    if isinstance(slices, list | tuple) and slices and all(map(_is_pair, slices)):
        lefts, rights = zip(*slices, strict=True)
        return LowRankStack(lefts, rights)
    kind = f"{type(slices).__module__}.{type(slices).__name__}"
    raise DataError(
        f"expected a stack of slices, found a {kind}: give an array (K, m, n), a list of pairs "
        "(B_k, A_k) of thin factors, a DenseStack, LowRankStack, LazyStack or Tucker2"
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_array_api_obj, value))
