"""HOOI: the alternating refinement never loses energy and stops where it should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor.core.fit.hooi import hooi
from lotrtensor.core.fit.hosvd import hosvd
from tests import oracles
from tests.strategies import NONZERO, UNTIED, fits, make, noisy

either = st.booleans()


def run(stack, rank, *, squared=False, **options):
    """HOOI from the stack's own HOSVD."""
    norm2 = float(stack.xp.sum(stack.norms2()))
    start = hosvd(stack).right[:, : rank[1]]
    return hooi(stack, start, rank, norm2=norm2, squared=squared, **options)


def dense_error2(case, found):
    """‖T − U Uᵀ T V Vᵀ‖² / ‖T‖²."""
    dense = case.dense()
    return oracles.relative_error(dense, oracles.projected(dense, found.left, found.right)) ** 2


@given(case=fits(NONZERO), squared=either)
def test_history_never_rises(case, squared):
    """The squared error of a sweep is at most that of the sweep before, and within [0, 1]."""
    case, rank = case
    found = run(case.stack(), rank, squared=squared, rtol=0.0, max_sweeps=12)
    history = np.array(found.history)
    assert len(history) == found.sweeps >= 1
    assert np.all(history >= 0)
    assert np.all(history <= 1 + 1e-14)
    assert np.all(np.diff(history) <= 4e-15)


@given(case=fits(NONZERO), squared=either)
def test_factors_are_orthonormal(case, squared):
    """UᵀU = I and VᵀV = I, of p and q columns, also where fewer would do."""
    case, rank = case
    found = run(case.stack(), rank, squared=squared)
    assert found.left.shape == (case.shape[1], rank[0])
    assert found.right.shape == (case.shape[2], rank[1])
    assert found.left.T @ found.left == pytest.approx(np.eye(rank[0]), abs=1e-13)
    assert found.right.T @ found.right == pytest.approx(np.eye(rank[1]), abs=1e-13)


@given(case=fits(NONZERO), squared=either)
def test_history_ends_at_the_dense_error(case, squared):
    """The last entry is ‖ΔW − U Uᵀ ΔW V Vᵀ‖² / ‖ΔW‖² of the factors returned."""
    case, rank = case
    found = run(case.stack(), rank, squared=squared)
    assert found.history[-1] == pytest.approx(dense_error2(case, found), abs=1e-13)


@given(case=fits(NONZERO), squared=either)
def test_it_never_loses_to_its_start(case, squared):
    """The error is at most that of the truncated HOSVD that it started from."""
    case, rank = case
    stack = case.stack()
    start, dense = hosvd(stack), case.dense()
    before = oracles.projected(dense, start.left[:, : rank[0]], start.right[:, : rank[1]])
    found = run(stack, rank, squared=squared)
    assert dense_error2(case, found) <= oracles.relative_error(dense, before) ** 2 + 1e-14


@given(case=fits(("generic", "decaying", "deficient", "zero_slice")))
def test_squared_route_agrees(case):
    """Eigenvectors of the Gram matrix and singular vectors lead to the same error."""
    case, rank = case
    one, other = (run(case.stack(), rank, squared=squared) for squared in (False, True))
    assert one.history[-1] == pytest.approx(other.history[-1], rel=1e-5, abs=1e-13)


@given(case=fits(UNTIED))
def test_dense_slices_give_the_same(case):
    """The algorithm asks for products only: a dense stack takes the same path."""
    case, rank = case
    thin, dense = run(case.stack(), rank), run(oracles.DenseSlices(case.dense()), rank)
    assert thin.history[-1] == pytest.approx(dense.history[-1], rel=1e-5, abs=1e-13)


@given(case=fits(NONZERO, max_slices=1))
def test_one_slice_is_the_truncated_svd(case):
    """K = 1: the error is that of the best matrix of rank min(p, q), by Eckart–Young."""
    case, rank = case
    found = run(case.stack(), rank)
    values = np.linalg.svd(case.dense()[0], compute_uv=False)
    best = np.sum(values[min(rank) :] ** 2) / np.sum(values**2)
    assert dense_error2(case, found) == pytest.approx(best, rel=1e-9, abs=1e-14)


@given(case=fits(UNTIED))
def test_a_fixed_point_stays(case):
    """Started from a converged V, it gains nothing that a converged run had left."""
    case, rank = case
    stack = case.stack()
    norm2 = float(np.sum(stack.norms2()))
    first = run(stack, rank, rtol=1e-12, max_sweeps=2000)
    assert first.converged
    again = hooi(stack, first.right, rank, norm2=norm2, squared=False, max_sweeps=5)
    assert again.history[-1] == pytest.approx(first.history[-1], rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("rank", [(1, 3), (3, 3), (4, 3)])
@pytest.mark.parametrize("seed", [2, 12, 20, 36, 53])
def test_what_is_left_is_what_the_stopping_rule_says(seed, rank):
    """No more than rtol, on the slowest of 240 runs: a small gain may be one of very many."""
    stack = make("generic", seed, 8, 7, [3, 2, 3, 1]).stack()
    found = run(stack, rank, rtol=1e-6)
    assert found.converged
    norm2 = float(np.sum(stack.norms2()))
    end = hooi(stack, found.right, rank, norm2=norm2, squared=False, rtol=0.0, max_sweeps=4000)
    assert found.history[-1] <= end.history[-1] * (1 + 1.1e-6)


def test_a_run_that_is_cut_short_says_so():
    """max_sweeps reached: converged is False, the sweeps are counted; and True with room."""
    case = make("generic", 24, 9, 8, [3, 3, 3, 3])
    for sweeps in (1, 2, 3):
        cut = run(case.stack(), (4, 3), max_sweeps=sweeps)
        assert not cut.converged
        assert cut.sweeps == len(cut.history) == sweeps
    whole = run(case.stack(), (4, 3), max_sweeps=500)
    assert whole.converged
    assert 3 < whole.sweeps < 500


@given(case=fits(NONZERO), squared=either)
def test_same_input_same_bits(case, squared):
    """Two runs agree to the last bit."""
    case, rank = case
    one, other = (run(case.stack(), rank, squared=squared) for _ in range(2))
    assert one.history == other.history
    assert np.array_equal(one.left, other.left)
    assert np.array_equal(one.right, other.right)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("rank", [(3, 3), (5, 2), (2, 6), (6, 1)])
def test_any_library(xp, squared, rank):
    """Every library gives orthonormal factors of its own and NumPy's error."""
    case = noisy(5, 8, 7, 3, (3, 3), 0.3)
    found = run(xp.stack(case), rank, squared=squared)
    assert xp.owns(found.left)
    assert xp.owns(found.right)
    left, right = xp.numpy(found.left), xp.numpy(found.right)
    assert left.T @ left == pytest.approx(np.eye(rank[0]), abs=1e-12)
    assert right.T @ right == pytest.approx(np.eye(rank[1]), abs=1e-12)
    expected = run(case.stack(), rank, squared=squared)
    assert found.history[-1] == pytest.approx(expected.history[-1], rel=1e-5)
    dense = case.dense()
    error = oracles.relative_error(dense, oracles.projected(dense, left, right))
    assert found.history[-1] == pytest.approx(error**2, abs=1e-13)
