"""No other factors of these ranks that are tried here keep more."""

import math

import numpy as np
import pytest
from hypothesis import given

from lotrtensor import tucker2
from lotrtensor.core.fit.hosvd import hosvd
from tests import oracles
from tests.fit_fixtures import SMALL
from tests.strategies import (
    NONZERO,
    UNTIED,
    Factors,
    fits,
    make,
    noisy,
)

# ---------------------------------------------------------------- optimality


@given(case=fits(SMALL))
def test_error_never_rises_with_rank(case):
    """One more left or right column never makes the fit or the bound worse."""
    case, (p, q) = case
    stack = case.stack()
    here = tucker2(stack, (p, q))
    for more in ((min(p + 1, case.max_rank[0]), q), (p, min(q + 1, case.max_rank[1]))):
        there = tucker2(stack, more)
        assert there.relative_error <= here.relative_error * (1 + 1e-9) + 1e-13
        assert there.lower_bound <= here.lower_bound * (1 + 1e-12) + 1e-14


@pytest.mark.parametrize("kind", NONZERO)
@pytest.mark.parametrize("seed", range(3))
def test_error_falls_along_the_whole_grid(kind, seed):
    """The table of errors over all (p, q) falls along both axes, down to rounding."""
    case = make(kind, seed, 6, 5, [2, 1, 3])
    stack = case.stack()
    rows, columns = case.max_rank
    table = np.array(
        [
            [tucker2(stack, (p, q)).relative_error for q in range(1, columns + 1)]
            for p in range(1, rows + 1)
        ]
    )
    for axis in (0, 1):
        assert np.all(np.diff(table, axis=axis) <= 1e-9 * table.max() + 1e-13)
    assert table[-1, -1] < 1e-13


@given(case=fits(NONZERO))
def test_no_worse_than_hosvd(case):
    """The error is at most that of the truncated HOSVD that the fit started from."""
    case, rank = case
    _, small, _ = case.stack().reduce()
    start, dense = hosvd(small), small.to_dense()
    left, right = start.left[:, : rank[0]], start.right[:, : rank[1]]
    before = oracles.relative_error(dense, oracles.projected(dense, left, right))
    fit = tucker2(case.stack(), rank)
    assert fit.relative_error <= before * (1 + 1e-9) + 1e-13
    assert fit.relative_error <= math.sqrt(2) * fit.lower_bound * (1 + 1e-9) + 1e-13


@given(case=fits(SMALL))
def test_no_worse_than_dense_hosvd(case):
    """The error is at most that of the truncated HOSVD from dense unfoldings."""
    case, rank = case
    before = oracles.hosvd_error(case.dense(), rank)
    assert tucker2(case.stack(), rank).relative_error <= before * (1 + 1e-9) + 1e-13


@given(case=fits(NONZERO, max_slices=1))
def test_one_slice_is_the_truncated_svd(case):
    """K = 1: error and bound are those of the best matrix of rank min(p, q)."""
    case, rank = case
    fit = tucker2(case.stack(), rank)
    values = np.linalg.svd(case.dense()[0], compute_uv=False)
    best = float(np.linalg.norm(values[min(rank) :]) / np.linalg.norm(values))
    assert fit.relative_error == pytest.approx(best, rel=1e-7, abs=1e-13)
    assert fit.lower_bound == pytest.approx(best, rel=1e-7, abs=1e-13)


def assert_no_worse_than_tensorly(case, rank):
    """Our error and bound against TensorLy's error at its default and at a tight tolerance."""
    fit, dense = tucker2(case.stack(), rank), case.dense()
    for tol in (1e-4, 1e-10):
        other = oracles.tensorly_error(dense, rank, tol)
        assert fit.relative_error <= other * (1 + 1e-6) + 1e-12
        assert fit.lower_bound <= other * (1 + 1e-12) + 1e-13


@given(case=fits(UNTIED))
def test_no_worse_than_tensorly(case):
    """TensorLy's partial Tucker on the dense tensor does not find a smaller error."""
    assert_no_worse_than_tensorly(*case)


@pytest.mark.parametrize("seed", [*range(20), 159, 293, 484])
def test_no_worse_than_tensorly_on_larger_random_slices(seed):
    """Random slices without structure converge slowly; stopping early would lose here."""
    rng = np.random.default_rng(seed)
    m, n = (int(x) for x in rng.integers(10, 17, 2))
    slices, r = int(rng.integers(3, 7)), int(rng.integers(2, 5))
    case = make("generic", seed, m, n, [r] * slices)
    p, q = (int(rng.integers(2, min(7, most + 1))) for most in case.max_rank)
    assert_no_worse_than_tensorly(case, (p, q))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("rank", [(3, 3), (2, 3), (5, 4)])
def test_no_worse_than_tensorly_on_structured_slices(seed, noise, rank):
    """A planted structure under noise, at its own ranks, below and above them."""
    assert_no_worse_than_tensorly(noisy(seed, 9, 8, 4, (3, 3), noise), rank)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [1e-5, 1e-6, 1e-7])
def test_no_worse_than_tensorly_where_the_error_is_small(seed, noise):
    """Beyond an exact structure, the remaining ranks fit what is a millionth of the whole."""
    assert_no_worse_than_tensorly(noisy(seed, 11, 12, 5, (2, 2), noise), (4, 4))


def test_no_worse_than_tensorly_where_slices_nearly_tie():
    """Slices of one entry each, their sizes apart by 1e-4: many fits are nearly the best."""
    worse = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        case = make("diagonal", seed, 6, 6, [2] * 6)
        sizes = 1 + 1e-4 * rng.standard_normal(6)
        case = Factors(
            tuple(
                s * b + 1e-3 * rng.standard_normal(b.shape)
                for s, b in zip(sizes, case.B, strict=True)
            ),
            tuple(a + 1e-3 * rng.standard_normal(a.shape) for a in case.A),
        )
        rank = (int(rng.integers(1, 6)), int(rng.integers(1, 6)))
        ours = tucker2(case.stack(), rank).relative_error
        excess = ours / oracles.tensorly_error(case.dense(), rank, 1e-10) - 1
        if excess > 1e-6:
            worse.append((seed, rank, excess))
    assert worse == []
