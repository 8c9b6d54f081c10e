"""Array library, device and type, found from the arguments of a public function."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import (
    array_namespace,
    device,
    is_array_api_obj,
    is_numpy_namespace,
    is_torch_namespace,
    to_device,
)

from lotrtensor.errors import DataError, OptionError

Array = Any
"""An array of any array-API library; the standard has no runtime type for it."""


Namespace = Any
"""The module of functions that belongs to an `Array`."""


def namespace(*arrays: Array) -> Namespace:
    """Return the array-API namespace that all ``arrays`` share.

    Raises
    ------
    DataError
        If an argument is no array, or the arrays belong to different libraries.
    """
    if arrays and all(isinstance(x, np.ndarray) for x in arrays):
        # NumPy 2 is the standard's namespace itself. Its wrapper imports all of NumPy, testing and
        # f2py included, which takes as long as NumPy.
        return np
    try:
        if not all(map(is_array_api_obj, arrays)):
            raise TypeError  # array_namespace passes over None and Python's numbers
        return array_namespace(*arrays)
    except TypeError as error:
        found = ", ".join(sorted({type(a).__module__ + "." + type(a).__name__ for a in arrays}))
        raise DataError(
            f"expected arrays of one array library (NumPy, PyTorch, JAX, ...), found {found}"
        ) from error


def is_bfloat16(x: Array) -> bool:
    """Whether ``x`` holds brain floats, which the standard's ``isdtype`` does not know of."""
    return str(x.dtype).rpartition(".")[2] == "bfloat16"


def check_plain(x: Array, name: str) -> None:
    """Refuse, by name, what passes for an array of numbers and is none.

    Raises
    ------
    DataError
        A masked array, a matrix whose product is another one, a tensor without numbers or with
        zeros left out, a value inside ``jax.jit``.
    """
    namespace(x)
    kinds = {kind.__name__ for kind in type(x).__mro__}
    if kinds & {"MaskedArray", "matrix"}:
        way = "filled(0)" if "MaskedArray" in kinds else "numpy.asarray"
        raise DataError(f"{name} is a {type(x).__name__}; expected a plain array: use {way}")
    if "Tracer" in kinds:
        raise DataError(f"{name} has no numbers inside jax.jit; decompose outside of it")
    layout = str(getattr(x, "layout", "torch.strided"))
    for word, is_so in (
        ("on the meta device", getattr(x, "is_meta", False)),
        ("nested", getattr(x, "is_nested", False)),
        ("quantised", getattr(x, "is_quantized", False)),
        ("sparse", is_torch_namespace(namespace(x)) and layout != "torch.strided"),
    ):
        if is_so:
            raise DataError(f"{name} is {word}; expected a dense tensor that holds its numbers")


def check_real_floating(x: Array, name: str) -> None:
    """Refuse integer, boolean and complex arrays by name.

    Raises
    ------
    DataError
        Integers would be truncated and complex factors conjugated silently.
    """
    check_plain(x, name)
    xp = namespace(x)
    try:
        known = is_bfloat16(x) or xp.isdtype(x.dtype, "real floating")
    except TypeError:  # a type from outside of the library
        known = False
    if not known:
        raise DataError(
            f"{name} has dtype {x.dtype}; expected real floating point: convert it first, "
            "for example with astype(float)"
        )


def check_finite(x: Array, name: str) -> None:
    """Refuse NaN and infinite entries by name.

    Raises
    ------
    DataError
        If any entry of ``x`` is not finite.
    """
    xp = namespace(x)
    if not bool(xp.all(xp.isfinite(x))):
        raise DataError(f"{name} holds NaN or infinite values; expected finite numbers")


def as_dtype(x: Array, dtype: Any) -> Array:
    """Return ``x`` rounded to a floating-point type that the user chose.

    Raises
    ------
    OptionError
        If the library of ``x`` has no such type.
    DataError
        If the type is not real floating point.
    """
    xp = namespace(x)
    try:
        with np.errstate(over="ignore"):  # what a type does not hold is refused by the caller
            cast = xp.astype(x, dtype)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"dtype is {dtype!r}; expected a real floating dtype of {xp.__name__}"
        ) from error
    check_real_floating(cast, "dtype")
    return cast


def as_working(x: Array) -> Array:
    """Return ``x`` in the precision that sums are taken in: its own, float32 at the least."""
    xp = namespace(x)
    if x.dtype in (xp.float32, xp.float64):
        return x
    half = is_bfloat16(x) or str(x.dtype).endswith("float16")
    return xp.astype(x, xp.float32 if half else xp.float64)


def as_accumulator(x: Array) -> Array:
    """Return ``x`` in the widest real type of its library and device, usually float64."""
    xp = namespace(x)
    if x.dtype == xp.float64:
        return x
    if is_numpy_namespace(xp):
        has_float64 = True  # NumPy 2.0 cannot be asked
    elif is_torch_namespace(xp):
        has_float64 = x.device.type != "mps"
    else:
        info = xp.__array_namespace_info__()
        has_float64 = "float64" in info.dtypes(device=device(x), kind="real floating")
    return xp.astype(x, xp.float64 if has_float64 else xp.float32)


def itemsize(x: Array) -> int:
    """Bytes of one entry of ``x``."""
    known = getattr(x.dtype, "itemsize", None)  # all libraries but the strict one have it
    return int(known or namespace(x).finfo(x.dtype).bits // 8)


def to_numpy(x: Array) -> np.ndarray:
    """Return a small real array as NumPy float64."""
    x = constant(x)
    xp = namespace(x)
    if not is_numpy_namespace(xp):
        x = to_device(x, xp.__array_namespace_info__().default_device())
    return np.asarray(x, dtype=np.float64)


def constant(x: Array) -> Array:
    """Return ``x`` outside of any gradient tape: a decomposition is not differentiated."""
    return x.detach() if hasattr(x, "detach") else x


def common_dtype(arrays: list[Array]) -> Any:
    """Return the type that all ``arrays`` promote to; float32 for a mix of half-precision types."""
    dtypes = list({x.dtype: None for x in arrays})
    if len(dtypes) == 1:
        return dtypes[0]
    xp = namespace(*arrays)
    return xp.result_type(*(as_working(x) for x in arrays))
