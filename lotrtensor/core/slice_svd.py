"""Truncated LoRA: the best approximation of each slice at a lower rank, by small SVDs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from array_api_compat import device

from lotrtensor.core.arrays import Array, as_accumulator, namespace, to_numpy
from lotrtensor.core.stacks.low_rank import LowRankStack


class SliceSvd(NamedTuple):
    """ΔW_k = left · diag(values) · rightᵀ: the thin singular value decomposition of one slice.

    ``left`` (m × c) and ``right`` (n × c) have orthonormal columns; ``values`` (c) fall and are
    NumPy's. c is the smallest of m, n and r_k.
    """

    left: Array
    values: np.ndarray
    right: Array


def slice_svds(stack: LowRankStack) -> list[SliceSvd]:
    """Return the SVD of every slice: QRs of B_k and A_kᵀ, then of an r_k × r_k matrix.

    The product is never built: with B = Q T and Aᵀ = P S, ΔW = Q (T Sᵀ) Pᵀ. Slices of one rank go
    through each step together. Cost Σ_k 6 (m + n) r_k² flops.
    """
    found: dict[int, SliceSvd] = {}
    for some in _batches(stack):
        found.update(zip(some, _svds(stack, some), strict=True))
    return [found[k] for k in range(stack.shape[0])]


def slice_spectra(stack: LowRankStack) -> list[np.ndarray]:
    """Return the falling singular values of every slice; its singular vectors are not kept."""
    found: dict[int, np.ndarray] = {}
    for some in _batches(stack):
        found.update((k, svd.values) for k, svd in zip(some, _svds(stack, some), strict=True))
    return [found[k] for k in range(stack.shape[0])]


class SvdsOnDemand(Sequence[SliceSvd]):
    """The SVDs of slices that are read whenever they are asked for; the values alone are kept.

    Parameters
    ----------
    slices : sequence of callable
        Each returns one slice, a stack of its own.

    Attributes
    ----------
    shape : (int, int, int)
        Number of slices and the shape of one: (K, m, n).
    spectra : list of ndarray
        Falling singular values of every slice.
    """

    def __init__(self, slices: Sequence[Callable[[], LowRankStack]]) -> None:
        self._slices = slices
        self.spectra: list[np.ndarray] = []
        for make in slices:
            stack = make()
            self.spectra += slice_spectra(stack)
        self.shape = (len(slices), *stack.shape[1:])

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, k: int) -> SliceSvd:  # type: ignore[override]
        return slice_svds(self._slices[k]())[0]


def _batches(stack: LowRankStack) -> Iterator[list[int]]:
    """Slices of one rank, so many together that what is done to them stays in the cache."""
    column = stack.shape[1] + stack.shape[2]
    for rank in sorted(set(stack.ranks)):
        members = [k for k, r in enumerate(stack.ranks) if r == rank]
        most = max(1, ENTRIES // (rank * column))
        yield from (members[first : first + most] for first in range(0, len(members), most))


def _svds(stack: LowRankStack, members: Sequence[int]) -> list[SliceSvd]:
    """`slice_svds` of slices of one rank."""
    xp = namespace(stack.empty())
    lefts = xp.stack([as_accumulator(stack.factors(k)[0]) for k in members])
    rights = xp.stack([as_accumulator(stack.factors(k)[1].T) for k in members])
    left, left_triangle = xp.linalg.qr(lefts)
    right, right_triangle = xp.linalg.qr(rights)
    small = to_numpy(left_triangle @ xp.matrix_transpose(right_triangle))
    turn_left, values, turn_right = np.linalg.svd(small, full_matrices=False)
    place = {"dtype": left.dtype, "device": device(left)}
    left = left @ xp.asarray(turn_left, **place)
    right = right @ xp.asarray(np.swapaxes(turn_right, 1, 2), **place)
    return [SliceSvd(left[i, :, :], values[i], right[i, :, :]) for i in range(len(members))]


ENTRIES = 2**18
"""Entries of factors that are decomposed at once: 2 MiB of float64."""


def truncate_slices(svds: Sequence[SliceSvd], ranks: Sequence[int]) -> LowRankStack:
    """Return the best stack whose slices have the given ranks (Eckart–Young), in the vectors' type.

    The singular values are shared evenly, B = U √Σ and A = √Σ Vᵀ, so that neither factor uses up
    the range or the digits of a half-precision type.
    """
    lefts, rights = [], []
    for svd, rank in zip(svds, ranks, strict=True):
        xp = namespace(svd.left)
        place = {"dtype": svd.left.dtype, "device": device(svd.left)}
        root = xp.asarray(np.sqrt(svd.values[:rank]), **place)
        lefts.append(svd.left[:, :rank] * root)
        rights.append((svd.right[:, :rank] * root).T)
    return LowRankStack(lefts, rights)
