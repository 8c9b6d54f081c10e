"""To and from TensorLy's ``TuckerTensor``, both ways exact."""

from __future__ import annotations

from typing import Any

from array_api_compat import device

from lotrtensor.core.arrays import namespace
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import DataError, MissingPackageError, ShapeError

try:
    from tensorly.tucker_tensor import TuckerTensor
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise MissingPackageError(
        "lotrtensor.tensorly needs TensorLy; install it with: pip install 'lotrtensor[tensorly]'"
    ) from error


def to_tensorly(tucker2: Tucker2) -> TuckerTensor:
    """Return the decomposition as a Tucker tensor of shape (K, m, n).

    Parameters
    ----------
    tucker2 : Tucker2
        The decomposition, in arrays of the library that TensorLy's backend is set to.

    Returns
    -------
    TuckerTensor
        The core is (K, p, q) and the factors are the K × K identity, U (m × p) and V (n × q).

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> from lotrtensor.tensorly import to_tensorly
    >>> found = lt.tucker2(np.ones((3, 4, 5)), rank=1).tucker2
    >>> [factor.shape for factor in to_tensorly(found).factors]
    [(3, 3), (4, 1), (5, 1)]
    """
    if not isinstance(tucker2, Tucker2):
        raise DataError(f"expected a Tucker2, found a {type(tucker2).__name__}")
    xp, core = tucker2.xp, tucker2.core
    identity = xp.eye(tucker2.shape[0], dtype=core.dtype, device=device(core))
    return TuckerTensor((core, [identity, tucker2.left, tucker2.right]))


def from_tensorly(tensor: Any) -> Tucker2:
    """Return a Tucker tensor of shape (K, m, n) as a Tucker-2 decomposition.

    Parameters
    ----------
    tensor : TuckerTensor or (core, factors)
        Three factors, one per mode; or two, of the modes 1 and 2, as ``partial_tucker`` with
        ``modes=[1, 2]`` returns them. A first factor goes into the cores, G ← G ×₁ F.

    Returns
    -------
    Tucker2
        With left factor U of mode 1 and right factor V of mode 2.

    Raises
    ------
    ShapeError
        If the tensor is not third-order, or has another number of factors.

    Examples
    --------
    >>> import numpy as np
    >>> from lotrtensor.tensorly import from_tensorly
    >>> found = from_tensorly((np.ones((3, 1, 2)), [np.ones((4, 1)), np.ones((5, 2))]))
    >>> found.shape, found.rank
    ((3, 4, 5), (1, 2))
    """
    try:
        core, factors = tensor
        factors = list(factors)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"expected a TuckerTensor or (core, factors), found a {type(tensor).__name__}"
        ) from error
    namespace(core, *factors)
    if core.ndim != 3 or len(factors) not in (2, 3):
        raise ShapeError(
            f"the core has {core.ndim} modes and there are {len(factors)} factors; expected a core "
            "(K, p, q) and three factors, or two for the modes 1 and 2"
        )
    if len(factors) == 3:
        xp, first = namespace(core, *factors), factors.pop(0)
        if first.ndim != 2 or first.shape[1] != core.shape[0]:
            raise ShapeError(
                f"the first factor is {tuple(first.shape)} and the core {tuple(core.shape)}; "
                "expected (K, a) and (a, p, q)"
            )
        core = xp.tensordot(first, core, axes=1)
    return Tucker2(factors[0], core, factors[1])
