"""Fits of what can be represented exactly, and of degenerate stacks."""

import math

import numpy as np
import pytest
from hypothesis import given

from lotrtensor import tucker2
from tests import oracles
from tests.fit_fixtures import frame_error, plain
from tests.strategies import (
    KINDS,
    Factors,
    factors,
    make,
    noisy,
    orthogonal,
)

# ---------------------------------------------------------------- exactness


@given(case=factors())
def test_full_rank_is_exact(case):
    """At the largest ranks every slice comes back to rounding, however small beside others."""
    fit = tucker2(case.stack(), case.max_rank)
    assert fit.relative_error < 2e-14
    assert np.all(fit.slice_errors < 1e-13)


@pytest.mark.parametrize(("dtype", "eps"), [("float64", 2e-14), ("float32", 1e-6)])
@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_exact_in_any_library(xp, kind, dtype, eps):
    """The error at full rank is at rounding of the type, as reported and as rebuilt."""
    case = make(kind, 3, 6, 7, [2, 1, 3])
    fit = tucker2(xp.stack(case, dtype), case.max_rank)
    assert fit.relative_error < eps
    found = oracles.reconstruct(*plain(xp, fit.tucker2))
    assert oracles.relative_error(case.dense(), found) < eps


@pytest.mark.parametrize("rank", [(1, 1), (2, 2), (3, 2), (2, 4), (1, 3), (4, 1)])
@pytest.mark.parametrize("seed", range(2))
def test_a_planted_structure_is_recovered(xp, rank, seed):
    """Slices that share subspaces of dimensions p ≠ q are exact at these ranks, not one below."""
    case = noisy(seed, 8, 7, 6, rank, 0.0)
    fit = tucker2(xp.stack(case), rank)
    assert fit.relative_error < 2e-14
    found = oracles.reconstruct(*plain(xp, fit.tucker2))
    assert oracles.relative_error(case.dense(), found) < 2e-14
    for less in ((rank[0] - 1, rank[1]), (rank[0], rank[1] - 1)):
        if min(less) >= 1:
            assert tucker2(xp.stack(case), less).lower_bound > 1e-3


@pytest.mark.parametrize("mixed", [False, True])
def test_a_planted_value_of_1e_10_is_found(xp, mixed):
    """σ = 1e-10 is fitted by the rank that includes it, and is the error of one that does not."""
    rng = np.random.default_rng(12)
    u, v = orthogonal(rng, 14, 3), orthogonal(rng, 12, 3)
    case = Factors((u[:, [0, 2]] * [1.0, 1e-10], 0.5 * u[:, [1]]), (v[:, [0, 2]].T, v[:, [1]].T))
    if mixed:
        case = case.gauged(rng, spread=0.3)
    stack, expected = xp.stack(case), 1e-10 / math.sqrt(1.25)
    whole = tucker2(stack, (3, 3))
    assert whole.relative_error < 1e-14
    found = oracles.reconstruct(*plain(xp, whole.tucker2))
    lost = found[0] - np.outer(u[:, 0], v[:, 0])
    assert u[:, 2] @ lost @ v[:, 2] == pytest.approx(1e-10, rel=1e-4)
    for rank in ((2, 2), (2, 3), (3, 2)):
        fit = tucker2(stack, rank)
        assert fit.relative_error == pytest.approx(expected, rel=1e-4, abs=0)
        assert fit.lower_bound == pytest.approx(expected, rel=1e-4, abs=0)


def test_float32_errors_are_right_to_float32(xp):
    """A float32 stack: error and bound within 1e-6 of the dense ones of its own numbers."""
    for seed, rank in ((0, (3, 3)), (1, (2, 4)), (2, (5, 5))):
        case = noisy(seed, 9, 8, 4, (3, 3), 0.05)
        stack = xp.stack(case, "float32")
        fit, dense = tucker2(stack, rank), case.dense()
        found = oracles.reconstruct(*plain(xp, fit.tucker2))
        assert fit.relative_error == pytest.approx(oracles.relative_error(dense, found), abs=1e-6)
        assert fit.lower_bound == pytest.approx(oracles.lower_bound(dense, rank), abs=1e-6)


# ---------------------------------------------------------------- degenerate stacks


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_stack_of_zeros(xp, dtype):
    """All zero: orthonormal factors, zero cores, no error, of the type that came in."""
    fit = tucker2(xp.stack(make("all_zero", 0, 5, 4, [2, 1]), dtype), (3, 2))
    left, core, right = plain(xp, fit.tucker2)
    assert core.shape == (2, 3, 2)
    assert not core.any()
    assert max(frame_error(left), frame_error(right)) < 1e-6
    assert fit.relative_error == fit.lower_bound == 0.0
    assert np.array_equal(fit.slice_errors, [0.0, 0.0])
    assert fit.converged
    assert fit.tucker2.core.dtype == xp.dtype(dtype)


def test_a_zero_slice_is_kept_exactly(xp):
    """A slice of zeros among others comes back as zeros, with error 0."""
    for side in ("left", "right"):
        case = make("generic", 2, 6, 5, [2, 2, 2])
        parts = case.B if side == "left" else case.A
        parts[1][:] = 0.0
        fit = tucker2(xp.stack(case), (2, 3))
        assert fit.slice_errors[1] == 0.0
        assert not plain(xp, fit.tucker2)[1][1].any()
        assert np.all(fit.slice_errors[[0, 2]] > 1e-3)


@pytest.mark.parametrize("rank", [(1, 3), (3, 1), (1, 2), (2, 4)])
def test_ranks_beyond_what_the_slices_span(rank):
    """One slice and one of zeros: p ≠ q leave directions to complete, and the best is known."""
    for seed in range(50):
        case = make("zero_slice", seed, 7, 6, [2, 2])
        fit = tucker2(case.stack(), rank)
        assert frame_error(fit.tucker2.left) < 1e-12
        assert frame_error(fit.tucker2.right) < 1e-12
        values = np.linalg.svd(case.dense()[0], compute_uv=False)
        best = float(np.linalg.norm(values[min(rank) :]) / np.linalg.norm(values))
        assert fit.relative_error == pytest.approx(best, rel=1e-7, abs=1e-13)


def test_a_slice_that_cancels_has_no_nan(xp):
    """B_k A_k = 0 from factors that are not zero: no slice error is NaN, the whole is right."""
    case = make("generic", 2, 6, 5, [2, 2, 2])
    case.B[1][:, 1], case.A[1][1, :] = case.B[1][:, 0], -case.A[1][0, :]
    fit, dense = tucker2(xp.stack(case), (2, 3)), case.dense()
    assert not np.isnan(fit.slice_errors).any()
    found = oracles.reconstruct(*plain(xp, fit.tucker2))
    assert fit.relative_error == pytest.approx(oracles.relative_error(dense, found), rel=1e-9)


@pytest.mark.parametrize("rank", [(1, 1), (1, 3), (3, 1), (2, 3), (4, 4)])
def test_tied_values_have_a_known_error(xp, rank):
    """Four slices of one entry each: the best keeps min(p, q) of them, and it is found."""
    fit = tucker2(xp.stack(make("diagonal", 0, 4, 4, [1, 2, 1, 1])), rank)
    best = math.sqrt(1 - min(rank) / 4)
    assert fit.lower_bound == pytest.approx(best, abs=1e-7)
    assert best * (1 - 1e-9) - 1e-13 <= fit.relative_error
    assert fit.relative_error <= math.sqrt(2) * best * (1 + 1e-9) + 1e-13


@pytest.mark.parametrize(
    ("m", "n", "ranks", "rank"),
    [
        (1, 7, [2, 3], (1, 3)),
        (7, 1, [2, 3], (4, 1)),
        (1, 1, [1], (1, 1)),
        (1, 1, [4, 2, 3], (1, 1)),
        (2, 3, [5], (2, 3)),
        (3, 2, [7, 1], (1, 2)),
        (6, 5, [1, 4, 2, 3], (5, 2)),
        (6, 5, [3], (1, 3)),
        (6, 5, [3], (3, 1)),
        (9, 1, [5], (5, 1)),
    ],
)
def test_odd_sizes(xp, m, n, ranks, rank):
    """m = 1, n = 1, K = 1, r above the sides, ragged r, p ≠ q: error and bound are the dense."""
    case = make("generic", 17, m, n, ranks)
    fit, dense = tucker2(xp.stack(case), rank), case.dense()
    left, core, right = plain(xp, fit.tucker2)
    assert (left.shape, core.shape, right.shape) == (
        (m, rank[0]),
        (len(ranks), *rank),
        (n, rank[1]),
    )
    assert max(frame_error(left), frame_error(right)) < 1e-12
    error = oracles.relative_error(dense, oracles.reconstruct(left, core, right))
    assert fit.relative_error == pytest.approx(error, rel=1e-9, abs=1e-13)
    assert fit.lower_bound == pytest.approx(oracles.lower_bound(dense, rank), rel=1e-9, abs=1e-13)
