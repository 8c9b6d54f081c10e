"""Thin factors as given by the user: taken apart and checked."""

from __future__ import annotations

from collections.abc import Sequence

from array_api_compat import device

from lotrtensor.core.arrays import Array, check_plain, check_real_floating, constant, namespace
from lotrtensor.errors import ShapeError


def listed(factors: Sequence[Array] | Array, name: str) -> list[Array]:
    """The factors one by one: of a sequence, or of an array (K, ., .)."""
    if isinstance(factors, Sequence):
        for k, x in enumerate(factors):
            check_plain(x, f"{name} of slice {k}")
        return [constant(x) for x in factors]
    if hasattr(factors, "dtype"):
        check_plain(factors, name)
    if getattr(factors, "ndim", 0) != 3:
        shape = tuple(getattr(factors, "shape", ()))
        raise ShapeError(f"{name} has shape {shape}; expected (K, ., .) or a sequence of matrices")
    return [constant(factors)[k, :, :] for k in range(factors.shape[0])]


def check_factors(lefts: list[Array], rights: list[Array]) -> None:
    """Refuse factors that make no stack; the message names the slice."""
    if not lefts:
        raise ShapeError("the stack is empty; expected at least one slice B_k A_k")
    if len(lefts) != len(rights):
        raise ShapeError(
            f"found {len(lefts)} factors B and {len(rights)} factors A; expected pairs"
        )
    namespace(*lefts, *rights)
    for k, (b, a) in enumerate(zip(lefts, rights, strict=True)):
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or 0 in (*b.shape, *a.shape):
            raise ShapeError(
                f"slice {k}: B is {tuple(b.shape)} and A is {tuple(a.shape)}; "
                "expected (m, r) and (r, n) with r at least 1"
            )
        expected = (lefts[0].shape[0], rights[0].shape[1])
        if (b.shape[0], a.shape[1]) != expected:
            raise ShapeError(
                f"slice {k} is {b.shape[0]} × {a.shape[1]} but slice 0 is "
                f"{expected[0]} × {expected[1]}; slices of one stack have one shape"
            )
        for x, name in ((b, f"B of slice {k}"), (a, f"A of slice {k}")):
            check_real_floating(x, name)
            if device(x) != device(lefts[0]):
                raise ShapeError(f"{name} is on {device(x)}, slice 0 on {device(lefts[0])}")
