"""Stacks of K slices ΔW_k, each m × n: what a Tucker-2 decomposition is taken of.

An algorithm asks a stack for a few products and never for its entries, so that a LoRA slice stays
a pair of thin factors. ``to_dense`` exists for tests and tiny cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lotrtensor.core.arrays import Array
from lotrtensor.core.options import shown
from lotrtensor.errors import DataError, OptionError, ShapeError


class Sweep(NamedTuple):
    """The products of one pass over the slices, for blocks U (m × b) and V (n × c).

    ``left`` is Σ_k (ΔW_k V)(ΔW_k V)ᵀ U (m × b), ``right`` Σ_k (ΔW_kᵀ U)(ΔW_kᵀ U)ᵀ V (n × c),
    ``core`` UᵀΔW_k V (K × b × c) and ``norms2`` ‖ΔW_k‖² (K).

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> left, right = np.eye(4)[:, :2], np.eye(5)[:, :1]
    >>> sweep = lt.DenseStack(np.ones((3, 4, 5))).sweep(left, right)
    >>> sweep.left.shape, sweep.right.shape, sweep.core.shape, sweep.norms2.tolist()
    ((4, 2), (5, 1), (3, 2, 1), [20.0, 20.0, 20.0])
    """

    left: Array
    right: Array
    core: Array
    norms2: Array


@runtime_checkable
class SliceStack(Protocol):
    """The products that every algorithm is written in.

    K slices ΔW_k of shape m × n. U (m × p) and V (n × q) have orthonormal columns.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> isinstance(lt.DenseStack(np.ones((3, 4, 5))), lt.SliceStack)
    True
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices and the shape of one: (K, m, n)."""

    @property
    def max_rank(self) -> tuple[int, int]:
        """Largest left and right rank (p, q) that the stack can need."""

    @property
    def dtype(self) -> Any:
        """Type that a decomposition of the stack comes back in."""

    @property
    def lazy(self) -> bool:
        """Whether every pass reads the slices again."""

    def empty(self) -> Array:
        """An array of no entries: library, device and working type of the products."""

    def slice(self, k: int) -> Array:
        """Return ΔW_k (m × n), dense."""

    def scaled(self, weights: Sequence[float]) -> SliceStack:
        """Return the stack of w_k ΔW_k."""

    def __add__(self, other: SliceStack) -> SliceStack:
        """Slice-wise sum."""

    def __sub__(self, other: SliceStack) -> SliceStack:
        """Slice-wise difference."""

    def __mul__(self, factor: float) -> SliceStack:
        """Every slice times a number."""

    def reduce(self) -> tuple[Array | None, SliceStack, Array | None]:
        """Return Q, a small stack in float64, and P with ΔW_k = Q · small_k · Pᵀ, exactly.

        Q and P have orthonormal columns; None stands for the identity.
        """

    def sweep(self, left: Array, right: Array) -> Sweep:
        """The products of one pass over the slices."""

    def project(self, left: Array, right: Array) -> tuple[Array, Array]:
        """`core` and `residual_norms2` in one pass over the slices."""

    def magnitude(self) -> float:
        """Order of the largest entries, where it is known without a pass; else 1."""

    def norms2(self) -> Array:
        """Squared Frobenius norms ‖ΔW_k‖², one per slice (K)."""

    def left_factor(self, right: Array | None = None) -> Array:
        """Return F (m × c) with F Fᵀ = Σ_k ΔW_k V Vᵀ ΔW_kᵀ; V is the identity if not given."""

    def right_factor(self, left: Array | None = None) -> Array:
        """Return F (n × c) with F Fᵀ = Σ_k ΔW_kᵀ U Uᵀ ΔW_k; U is the identity if not given."""

    def core(self, left: Array, right: Array) -> Array:
        """Cores Uᵀ ΔW_k V (K × p × q)."""

    def residual_norms2(self, left: Array, right: Array) -> Array:
        """Squared norms ‖ΔW_k − U Uᵀ ΔW_k V Vᵀ‖², without cancellation, one per slice (K)."""

    def to_dense(self) -> Array:
        """The slices as one array (K × m × n)."""


def check_stack(stack: object) -> None:
    """Refuse what offers no products of slices.

    Raises
    ------
    DataError
        Saying which stacks there are.
    """
    if not isinstance(stack, SliceStack):
        kind = f"{type(stack).__module__}.{type(stack).__name__}"
        raise DataError(
            f"expected a stack of slices, found a {kind}: as_stack makes one of an array "
            "(K, m, n), of a list of pairs (B_k, A_k) or of a Tucker2"
        )


def check_one_shape(a: SliceStack, b: SliceStack) -> None:
    """Refuse to add stacks of unlike shapes.

    Raises
    ------
    ShapeError
        If K, m or n differ.
    """
    if a.shape != b.shape:
        raise ShapeError(f"stacks of shapes (K, m, n) = {a.shape} and {b.shape} have no sum")


def check_weights(weights: Sequence[float], slices: int) -> list[float]:
    """Return one number per slice.

    Raises
    ------
    OptionError
        If they are no finite numbers.
    ShapeError
        If there are more or fewer than slices.
    """
    try:
        found = [float(w) for w in weights] if not isinstance(weights, str | bytes) else [math.nan]
    except (TypeError, ValueError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise OptionError(f"weights is {shown(weights)}; expected {slices} finite numbers")
    if len(found) != slices:
        raise ShapeError(f"found {len(found)} weights; expected {slices}, one per slice")
    return found
