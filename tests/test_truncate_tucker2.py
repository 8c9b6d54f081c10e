"""Rounding a Tucker-2 to lower ranks: the theory, gauge and tolerance of truncate_tucker2."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import (
    LotrError,
    RankError,
    Tucker2,
    tucker2,
)
from lotrtensor.core.fit.truncate import truncate_tucker2
from tests import oracles
from tests.adapters_fixtures import (
    DTYPES,
)
from tests.strategies import UNTIED, fits, noisy, orthogonal, seeds


def random_tucker2(seed, slices=3, m=8, n=7, p=4, q=3):
    """A decomposition whose factors are not orthonormal."""
    rng = np.random.default_rng(seed)
    return Tucker2(
        rng.standard_normal((m, p)),
        rng.standard_normal((slices, p, q)),
        rng.standard_normal((n, q)),
    )


tucker2s = st.builds(
    random_tucker2,
    seeds,
    slices=st.integers(1, 4),
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    p=st.integers(1, 4),
    q=st.integers(1, 4),
)


def dense_distance(a, b):
    """‖a − b‖ / ‖a‖ of two decompositions, from their dense slices."""
    return oracles.relative_error(np.asarray(a.to_dense()), np.asarray(b.to_dense()))


def kept_rank(found):
    """The ranks that rounding can keep: no more than the sides and than the cores can hold."""
    (slices, m, n), (p, q) = found.shape, found.rank
    p, q = min(m, p), min(n, q)
    return min(p, slices * q), min(q, slices * p)


@given(found=tucker2s, refine=st.booleans())
def test_rounding_at_its_own_rank_changes_nothing(found, refine):
    """The same slices, with orthonormal factors; twice is as good as once."""
    rank = kept_rank(found)
    once = truncate_tucker2(found, rank, refine=refine)
    twice = truncate_tucker2(once, rank, refine=refine)
    assert dense_distance(found, once) < 1e-13
    assert dense_distance(once, twice) < 1e-13
    for basis in (once.left, once.right):
        assert np.max(np.abs(basis.T @ basis - np.eye(basis.shape[1]))) < 1e-13


@given(found=tucker2s)
def test_the_rank_asked_for_is_the_rank_that_comes(found):
    """Or a refusal, where the cores cannot hold that many directions."""
    try:
        rounded = truncate_tucker2(found, found.rank)
    except RankError:
        assert found.rank != kept_rank(found)
        return
    assert rounded.rank == found.rank


@given(found=tucker2s, share=st.floats(0, 1))
def test_rounding_is_idempotent_at_any_rank(found, share):
    """What has the ranks already is its own best approximation."""
    p, q = kept_rank(found)
    rank = max(1, round(share * p)), max(1, round(share * q))
    once = truncate_tucker2(found, rank)
    assert once.rank == rank
    assert dense_distance(once, truncate_tucker2(once, rank)) < 1e-12


@given(found=tucker2s, share=st.floats(0, 1))
def test_rounding_is_within_its_theory(found, share):
    """Plain: √2 of the bound. Refined: no worse than plain, no better than the bound."""
    p, q = kept_rank(found)
    rank = max(1, round(share * p)), max(1, round(share * q))
    dense = found.to_dense()
    bound = oracles.lower_bound(dense, rank)
    plain = dense_distance(found, truncate_tucker2(found, rank, refine=False))
    refined = dense_distance(found, truncate_tucker2(found, rank))
    assert plain == pytest.approx(oracles.hosvd_error(dense, rank), rel=1e-5, abs=1e-12)
    assert bound - 1e-12 <= refined <= plain * (1 + 1e-6) + 1e-12
    assert plain <= np.sqrt(2) * bound + 1e-12


@given(a=tucker2s, seed=seeds)
def test_the_rounded_sum_is_the_sum(a, seed):
    """a + b rounded at the sum's own ranks, and back: (a + b − b) is a."""
    slices, m, n = a.shape
    b = random_tucker2(seed, slices, m, n, 2, 3)
    dense = a.to_dense() + b.to_dense()
    scale = np.linalg.norm(a.to_dense()) + np.linalg.norm(b.to_dense())
    total = a + b
    assert total.rank == (a.rank[0] + 2, a.rank[1] + 3)
    assert np.linalg.norm(total.to_dense() - dense) <= 1e-13 * scale
    rounded = truncate_tucker2(total, kept_rank(total))
    assert np.linalg.norm(rounded.to_dense() - dense) <= 1e-12 * scale
    recovered = truncate_tucker2(total - b, kept_rank(a))
    assert np.linalg.norm(recovered.to_dense() - a.to_dense()) <= 1e-11 * scale


def test_a_sum_in_a_common_subspace_rounds_back_to_it():
    """Ranks of 2 p that hold p directions: a tolerance finds them."""
    a = random_tucker2(0)
    b = Tucker2(a.left @ np.diag([1, 2, 3, 4.0]), np.flip(a.core, 0), -a.right)
    found = truncate_tucker2(a + b, tolerance=1e-10)
    assert found.rank == (4, 3)
    assert found.to_dense() == pytest.approx(a.to_dense() + b.to_dense(), abs=1e-10)


@given(a=tucker2s, b_seed=seeds, alpha=st.floats(-3, 3), beta=st.floats(-3, 3))
def test_arithmetic_is_linear(a, b_seed, alpha, beta):
    """α a + β b − a, slice by slice."""
    slices, m, n = a.shape
    b = random_tucker2(b_seed, slices, m, n)
    found = (alpha * a + b * beta - a).to_dense()
    expected = (alpha - 1) * a.to_dense() + beta * b.to_dense()
    scale = 1 + np.linalg.norm(a.to_dense()) + np.linalg.norm(b.to_dense())
    assert np.max(np.abs(found - expected)) <= 1e-13 * 10 * scale


@given(case=fits(UNTIED))
def test_errors_obey_the_triangle_inequality(case):
    """Fit, then round: the error is at most the sum of both, at least their difference."""
    case, (p, q) = case
    fit = tucker2(case.stack(), (p, q))
    norm = np.linalg.norm(case.dense())
    rounded = truncate_tucker2(fit.tucker2, (max(1, p // 2), max(1, q // 2)))
    first = fit.relative_error * norm
    second = np.linalg.norm(fit.tucker2.to_dense() - rounded.to_dense())
    both = np.linalg.norm(case.dense() - rounded.to_dense())
    assert abs(first - second) - 1e-9 * norm <= both <= first + second + 1e-9 * norm
    # The residual of the fit is orthogonal to its subspaces, where the rounding stays.
    assert both**2 == pytest.approx(first**2 + second**2, abs=1e-9 * norm**2)


@given(found=tucker2s, seed=seeds)
def test_order_of_slices(found, seed):
    """Slices in another order round to the same slices in that order."""
    order = np.random.default_rng(seed).permutation(found.shape[0])
    p, q = kept_rank(found)
    rank = (p + 1) // 2, (q + 1) // 2
    one = truncate_tucker2(found, rank, refine=False)
    other = truncate_tucker2(
        Tucker2(found.left, found.core[order], found.right), rank, refine=False
    )
    error = dense_distance(found, one)
    permuted = Tucker2(found.left, found.core[order], found.right)
    assert dense_distance(permuted, other) == pytest.approx(error, rel=1e-9, abs=1e-13)


@given(found=tucker2s, seed=seeds)
def test_gauge(found, seed):
    """(U S, S⁻¹ G T, V T⁻ᵀ) is the same decomposition and rounds alike."""
    rng = np.random.default_rng(seed)
    (p, q), rank = found.rank, kept_rank(found)
    s = orthogonal(rng, p) * 10.0 ** rng.uniform(-2, 2, p)
    t = orthogonal(rng, q) * 10.0 ** rng.uniform(-2, 2, q)
    other = Tucker2(
        found.left @ s,
        np.linalg.inv(s) @ found.core @ t,
        found.right @ np.linalg.inv(t).T,
    )
    smaller = max(1, rank[0] - 1), max(1, rank[1] - 1)
    one, two = (
        dense_distance(x, truncate_tucker2(x, smaller, refine=False)) for x in (found, other)
    )
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9)


@given(found=tucker2s, tolerance=st.sampled_from([0.5, 0.1, 1e-3, 1e-8]))
def test_rounding_within_a_tolerance(found, tolerance):
    """Never exceeded; energies and budgets neither."""
    dense = found.to_dense()
    within = truncate_tucker2(found, tolerance=tolerance)
    assert oracles.relative_error(dense, within.to_dense()) <= tolerance * (1 + 1e-9)
    kept = truncate_tucker2(found, energy=1 - tolerance)
    assert oracles.relative_error(dense, kept.to_dense()) ** 2 <= tolerance * (1 + 1e-9)
    slices, m, n = found.shape
    budget = 2 * (m + n) + 4 * slices
    assert truncate_tucker2(found, parameters=budget).parameters <= budget


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(6))
def test_rounding_within_a_tolerance_in_the_type_that_comes_back(dtype, seed):
    """The error of what is returned, storage type included, or a refusal."""
    tolerance = {"float32": 3e-6, "float16": 5e-3, "bfloat16": 3e-2}[dtype]
    case = noisy(seed, 20, 18, 4, (3, 3), 0.5 * tolerance)
    found = tucker2(case.stack(), (12, 12)).tucker2.astype(DTYPES[dtype])
    dense = found.astype(np.float64).to_dense()
    errors = []
    for share in (1.0, 0.7, 0.5, 0.4):
        try:
            rounded = truncate_tucker2(found, tolerance=share * tolerance)
        except RankError:
            continue
        assert rounded.core.dtype == DTYPES[dtype]
        error = oracles.relative_error(dense, rounded.astype(np.float64).to_dense())
        errors.append(error / (share * tolerance))
    assert errors
    assert max(errors) <= 1


def test_rounding_in_any_library(xp):
    """Factors of that library and type, by any goal."""
    case = noisy(2, 9, 8, 3, (3, 3), 0.05)
    for dtype, eps in (("float64", 1e-9), ("float32", 1e-3)):
        found = tucker2(xp.stack(case, dtype), (5, 5)).tucker2
        dense = xp.numpy(found.to_dense())
        for goal in ({"rank": (3, 2)}, {"tolerance": 0.1}, {"energy": 0.9}, {"parameters": 60}):
            rounded = truncate_tucker2(found, **goal)
            for x in (rounded.left, rounded.core, rounded.right):
                assert xp.owns(x)
                assert x.dtype == xp.dtype(dtype)
        error = oracles.relative_error(dense, xp.numpy(truncate_tucker2(found, (3, 2)).to_dense()))
        expected = tucker2(case.stack(), (5, 5)).tucker2
        expected = dense_distance(expected, truncate_tucker2(expected, (3, 2)))
        assert error == pytest.approx(expected, rel=eps)
        total = truncate_tucker2(found + found * 2.0 - found, found.rank)
        assert oracles.relative_error(2 * dense, xp.numpy(total.to_dense())) < 1e-5
        assert total.core.dtype == xp.dtype(dtype)


def test_rounding_on_a_second_device():
    """Rounded there, and nowhere else."""
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    found = random_tucker2(0)
    found = Tucker2(
        *(strict.asarray(x, device=device) for x in (found.left, found.core, found.right))
    )
    for goal in ({"rank": 2}, {"tolerance": 0.5}, {"parameters": 60}):
        rounded = truncate_tucker2(found + found * 0.5, **goal)
        assert [x.device for x in (rounded.left, rounded.core, rounded.right)] == [device] * 3


def test_a_tucker2_of_zeros_is_rounded():
    """To ranks (1, 1), and stays zero."""
    found = Tucker2(np.ones((4, 2)), np.zeros((3, 2, 2)), np.ones((5, 2)))
    for goal in ({"rank": 1}, {"tolerance": 0.1}, {"parameters": 100}):
        assert not truncate_tucker2(found, **goal).to_dense().any()


def test_rounding_keeps_directions_of_1e_10():
    """A planted σ of 1e-10 beside 1 survives at its rank and is dropped as such below."""
    rng = np.random.default_rng(0)
    u, v = orthogonal(rng, 9, 3), orthogonal(rng, 8, 3)
    found = Tucker2(u * [1, 1, 1e-10], np.stack([np.eye(3)] * 2), v)
    kept, dropped = (truncate_tucker2(found, rank) for rank in (3, 2))
    residual = u.T @ (found.to_dense() - kept.to_dense()) @ v
    assert np.max(np.abs(residual[:, 2, 2])) < 1e-15
    assert dense_distance(found, dropped) == pytest.approx(1e-10 / np.sqrt(2), rel=1e-3)


def test_sums_of_unlike_shapes_are_refused():
    """K, m or n: both are named."""
    with pytest.raises(LotrError, match=r"\(3, 8, 7\).*\(4, 8, 7\)"):
        random_tucker2(0) + random_tucker2(0, slices=4)
