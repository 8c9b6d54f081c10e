"""HOSVD: the singular bases of the two unfoldings and the bound that they give."""

import math

import numpy as np
import pytest
from hypothesis import given

from lotrtensor.core.fit.hosvd import hosvd
from lotrtensor.core.linalg import leading_left
from tests import oracles
from tests.strategies import (
    NONZERO,
    Factors,
    factors,
    fits,
    make,
    noisy,
    orthogonal,
    seeds,
)


@given(case=factors())
def test_values_are_those_of_the_unfoldings(case):
    """Mode singular values agree with dense SVDs, none missing, in descending order."""
    found = hosvd(case.stack())
    expected = oracles.mode_values(case.dense())
    for values, dense, size in zip(
        (found.left_values, found.right_values), expected, case.max_rank, strict=True
    ):
        assert values.shape == (size,)
        assert np.all(np.diff(values) <= 0)
        padded = np.zeros(max(size, dense.size))
        padded[: dense.size] = dense
        assert np.all(np.abs(values - padded[:size]) <= 1e-13 * (dense[0] + 1e-300))
        assert np.all(padded[size:] <= 1e-13 * dense[0])


@given(case=factors())
def test_vectors_are_orthonormal_singular_vectors(case):
    """UᵀU = I, and the rows of Uᵀ [ΔW_1 … ΔW_K] are orthogonal with norms σ_i; V likewise."""
    found = hosvd(case.stack())
    for vectors, values, matrix in zip(
        (found.left, found.right),
        (found.left_values, found.right_values),
        oracles.unfoldings(case.dense()),
        strict=True,
    ):
        assert vectors.shape == (matrix.shape[0], values.shape[0])
        assert vectors.T @ vectors == pytest.approx(np.eye(values.size), abs=1e-13)
        rotated = vectors.T @ matrix
        scale = 1e-13 * (1e-300 + float(values[0]) ** 2)
        assert rotated @ rotated.T == pytest.approx(np.diag(values**2), abs=scale)


@given(case=fits())
def test_bound_is_the_discarded_energy(case):
    """lower_bound2 is the larger discarded energy of the dense unfoldings."""
    case, rank = case
    dense = case.dense()
    norm = float(np.linalg.norm(dense))
    found = math.sqrt(float(hosvd(case.stack()).lower_bound2(rank)))
    assert found == pytest.approx(
        oracles.lower_bound(dense, rank) * norm, rel=1e-9, abs=1e-13 * norm
    )


@given(case=fits())
def test_truncated_hosvd_is_within_root_two_of_the_bound(case):
    """bound ≤ error ≤ √2 · bound for the first p and q columns, ties or not."""
    case, rank = case
    found, dense = hosvd(case.stack()), case.dense()
    left, right = found.left[:, : rank[0]], found.right[:, : rank[1]]
    error = float(np.linalg.norm(dense - oracles.projected(dense, left, right)))
    bound = math.sqrt(float(found.lower_bound2(rank)))
    slack = 1e-13 * float(np.linalg.norm(dense))
    assert bound <= error * (1 + 1e-12) + slack
    assert error <= math.sqrt(2) * bound * (1 + 1e-12) + slack


@given(case=fits())
def test_bound_never_rises_with_rank(case):
    """A larger p or q cannot have a larger bound."""
    case, (p, q) = case
    found = hosvd(case.stack())
    here = float(found.lower_bound2((p, q)))
    for more in ((p + 1, q), (p, q + 1), case.max_rank):
        assert float(found.lower_bound2(more)) <= here


@given(case=factors(), seed=seeds)
def test_values_depend_on_the_products_alone(case, seed):
    """Gauge, order of slices and orthogonal changes of basis leave the values as they are."""
    rng = np.random.default_rng(seed)
    slices, m, n = case.shape
    expected = hosvd(case.stack())
    scale = sum(np.linalg.norm(b) * np.linalg.norm(a) for b, a in zip(case.B, case.A, strict=True))
    for other in (
        case.gauged(rng),
        case.permuted(list(rng.permutation(slices))),
        case.turned(orthogonal(rng, m), orthogonal(rng, n)),
    ):
        found = hosvd(other.stack())
        assert found.left_values == pytest.approx(expected.left_values, abs=1e-11 * scale)
        assert found.right_values == pytest.approx(expected.right_values, abs=1e-11 * scale)


@given(case=factors())
def test_transposition_swaps_the_sides(case):
    """The left values of ΔW_kᵀ are the right values of ΔW_k."""
    one, other = hosvd(case.stack()), hosvd(case.transposed().stack())
    scale = 1e-13 * (float(one.left_values[0]) + 1e-300)
    assert other.left_values == pytest.approx(one.right_values, abs=scale)
    assert other.right_values == pytest.approx(one.left_values, abs=scale)


@given(case=factors(NONZERO))
def test_dense_slices_give_the_same(case):
    """The algorithm asks for products only: the dense stack gives the same values."""
    thin, dense = hosvd(case.stack()), hosvd(oracles.DenseSlices(case.dense()))
    for a, b in (
        (thin.left_values, dense.left_values),
        (thin.right_values, dense.right_values),
    ):
        assert a == pytest.approx(b[: a.size], abs=1e-13 * b[0])


@pytest.mark.parametrize("tiny", [1e-6, 1e-10, 1e-13])
def test_a_tiny_singular_value_is_found(xp, tiny):
    """A value of 1e-10 beside one of 1 keeps its digits; a Gram matrix would give 1e-8."""
    rng = np.random.default_rng(11)
    u, v = orthogonal(rng, 12, 3), orthogonal(rng, 10, 3)
    case = Factors((u * [1.0, 0.5, tiny],), (v.T,))
    found = hosvd(xp.stack(case))
    for values in (found.left_values, found.right_values):
        assert xp.numpy(values) == pytest.approx([1.0, 0.5, tiny], rel=1e-2, abs=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_library(xp, dtype):
    """Vectors and values are arrays of the library, in float64, right to the stack's precision."""
    case = noisy(3, 7, 6, 3, (2, 3), 1e-2)
    found = hosvd(xp.stack(case, dtype))
    expected = oracles.mode_values(case.dense())
    eps = 1e-5 if dtype == "float32" else 1e-12
    for values, dense in zip((found.left_values, found.right_values), expected, strict=True):
        assert xp.owns(values)
        assert values.dtype == xp.dtype("float64")
        assert xp.numpy(values) == pytest.approx(dense, abs=eps * dense[0])
    for vectors in (found.left, found.right):
        assert xp.owns(vectors)
        plain = xp.numpy(vectors)
        assert plain.T @ plain == pytest.approx(np.eye(plain.shape[1]), abs=1e-12)


def test_all_tied_values(xp):
    """K slices of one entry each, all equal: every mode value is one and the bound is exact."""
    found = hosvd(xp.stack(make("diagonal", 0, 4, 4, [1, 1, 1, 1])))
    assert xp.numpy(found.left_values) == pytest.approx(np.ones(4), abs=1e-14)
    assert float(found.lower_bound2((1, 3))) == pytest.approx(3.0, rel=1e-13)
    assert float(found.lower_bound2((3, 1))) == pytest.approx(3.0, rel=1e-13)
    assert float(found.lower_bound2((4, 4))) == 0.0


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("rows", "columns", "kept"), [(6, 4, 3), (4, 9, 4), (5, 2, 4), (3, 1, 1)])
def test_leading_vectors_come_first(xp, squared, rows, columns, kept):
    """Both routes give orthonormal vectors by descending value, completed beyond the rank."""
    x = np.random.default_rng(rows).standard_normal((rows, columns))
    vectors, values = leading_left(xp.array(x), kept, squared=squared)
    assert xp.owns(vectors)
    assert xp.owns(values)
    expected = np.zeros(max(rows, columns))
    expected[: min(rows, columns)] = np.linalg.svd(x, compute_uv=False)
    # Values below the rank come from energies of 1e-16: their roots are 1e-8.
    assert xp.numpy(values) == pytest.approx(expected[:kept], abs=1e-7 if squared else 1e-13)
    plain = xp.numpy(vectors)
    assert plain.shape == (rows, kept)
    assert plain.T @ plain == pytest.approx(np.eye(kept), abs=1e-13)
    assert np.linalg.norm(x.T @ plain, axis=0) == pytest.approx(expected[:kept], abs=1e-12)


def test_few_vectors_of_a_large_gram_matrix_are_those_of_the_matrix():
    """SciPy is asked for these alone there."""
    x = np.random.default_rng(0).standard_normal((1002, 12)) * np.arange(12, 0, -1)
    vectors, values = leading_left(x, 4, squared=True)
    left, expected, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(values, expected[:4], rtol=1e-10)
    np.testing.assert_allclose(np.abs(vectors.T @ left[:, :4]), np.eye(4), atol=1e-8)


def test_vectors_beyond_the_rank_are_orthonormal_too(xp):
    """One column beside rows of rounding and columns of zeros: no two completed vectors align."""
    for seed in range(150):
        rng = np.random.default_rng(seed)
        rows, clean = int(rng.integers(3, 9)), int(rng.integers(1, 3))
        x = np.zeros((rows, 3))
        x[:, 0] = rng.standard_normal(rows)
        x[clean + 1 :, 0] *= 1e-16
        kept = int(rng.integers(2, rows + 1))
        for squared in (False, True):
            vectors = xp.numpy(leading_left(xp.array(x), kept, squared=squared)[0])
            assert vectors.T @ vectors == pytest.approx(np.eye(kept), abs=1e-12)
