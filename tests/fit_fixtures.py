"""What the tests of fits look at: results as plain arrays, rebuilt slices, orthonormality."""

import numpy as np

from tests import oracles

SMALL = ("generic", "decaying", "zero_slice", "deficient")


def plain(xp, found):
    """U, G and V as NumPy float64."""
    return tuple(xp.numpy(x) for x in (found.left, found.core, found.right))


def rebuilt(found):
    """The dense slices of a NumPy decomposition."""
    return oracles.reconstruct(found.left, found.core, found.right)


def frame_error(columns):
    """How far a basis is from orthonormal."""
    return float(np.max(np.abs(columns.T @ columns - np.eye(columns.shape[1]))))
