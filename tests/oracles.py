"""Naive answers to hold the library against: dense, NumPy float64, straight from the definitions.

A tensor is K × m × n, slice k first. Nothing here is fast or shares code with the library.
"""

from __future__ import annotations

import warnings

import numpy as np
from tensorly.decomposition import partial_tucker

Rank = tuple[int, int]


def reconstruct(left: np.ndarray, core: np.ndarray, right: np.ndarray) -> np.ndarray:
    """U G_k Vᵀ, slice by slice."""
    return np.stack([left @ matrix @ right.T for matrix in core])


def relative_error(tensor: np.ndarray, approximation: np.ndarray) -> float:
    """‖T − T'‖ / ‖T‖, and 0 for zero against zero."""
    lost = float(np.linalg.norm(tensor - approximation))
    return lost / float(np.linalg.norm(tensor)) if lost else 0.0


def slice_errors(tensor: np.ndarray, approximation: np.ndarray) -> np.ndarray:
    """‖T_k − T'_k‖ / ‖T_k‖ of each slice, and 0 for zero against zero."""
    return np.array([relative_error(a, b) for a, b in zip(tensor, approximation, strict=True)])


def unfoldings(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T_1 … T_K] (m × Kn) and [T_1ᵀ … T_Kᵀ] (n × Km)."""
    return np.hstack(list(tensor)), np.hstack([matrix.T for matrix in tensor])


def mode_values(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of the two unfoldings, descending."""
    left, right = unfoldings(tensor)
    return np.linalg.svd(left, compute_uv=False), np.linalg.svd(right, compute_uv=False)


def lower_bound(tensor: np.ndarray, rank: Rank) -> float:
    """√max of the discarded energies of the two unfoldings, relative to ‖T‖."""
    norm = float(np.linalg.norm(tensor))
    tails = [
        float(np.linalg.norm(values[kept:]))
        for values, kept in zip(mode_values(tensor), rank, strict=True)
    ]
    return max(tails) / norm if norm else 0.0


def projected(tensor: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """U Uᵀ T_k V Vᵀ for orthonormal U and V."""
    return np.stack([left @ left.T @ matrix @ right @ right.T for matrix in tensor])


def hosvd_error(tensor: np.ndarray, rank: Rank) -> float:
    """Relative error of the truncated HOSVD, from dense singular value decompositions."""
    left, right = (
        np.linalg.svd(matrix, full_matrices=True)[0][:, :kept]
        for matrix, kept in zip(unfoldings(tensor), rank, strict=True)
    )
    return relative_error(tensor, projected(tensor, left, right))


def tensorly_error(tensor: np.ndarray, rank: Rank, tol: float = 1e-4) -> float:
    """Relative error of TensorLy's partial Tucker, measured on its dense reconstruction.

    A tolerance of 1e-4 is TensorLy's own default.
    """
    with warnings.catch_warnings():
        # It says so where a rank exceeds a side of its small problem, and goes on.
        warnings.simplefilter("ignore", UserWarning)
        (core, (left, right)), _ = partial_tucker(
            np.transpose(tensor, (1, 0, 2)),
            rank=list(rank),
            modes=[0, 2],
            init="svd",
            tol=tol,
            n_iter_max=200,
            random_state=0,
        )
    return relative_error(tensor, reconstruct(left, np.transpose(core, (1, 0, 2)), right))


class DenseSlices:
    """The stack's protocol on a dense tensor, by its definitions: factors are whole unfoldings."""

    xp = np

    def __init__(self, tensor: np.ndarray) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self.max_rank = tensor.shape[1:]

    def norms2(self) -> np.ndarray:
        """‖T_k‖²."""
        return np.sum(self.tensor**2, axis=(1, 2))

    def left_factor(self, right: np.ndarray | None = None) -> np.ndarray:
        """[T_1 V … T_K V]."""
        return np.hstack([x if right is None else x @ right for x in self.tensor])

    def right_factor(self, left: np.ndarray | None = None) -> np.ndarray:
        """[T_1ᵀ U … T_Kᵀ U]."""
        return np.hstack([x.T if left is None else x.T @ left for x in self.tensor])

    def core(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Uᵀ T_k V."""
        return np.stack([left.T @ x @ right for x in self.tensor])

    def residual_norms2(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """‖T_k − U Uᵀ T_k V Vᵀ‖²."""
        return np.sum((self.tensor - projected(self.tensor, left, right)) ** 2, axis=(1, 2))

    def to_dense(self) -> np.ndarray:
        """The tensor itself."""
        return self.tensor
