"""Leading singular triplets of whole matrices, by a full SVD and by block Lanczos."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor.core.dense_svd import block_lanczos, dense_svd
from lotrtensor.core.fit import tuning
from tests.strategies import orthogonal, seeds


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=seeds,
    rank=st.one_of(st.none(), st.integers(1, 12)),
)
def test_the_svd_of_a_whole_matrix(shape, seed, rank):
    """The leading values of the dense one, orthonormal vectors, and what is beyond them."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal(shape) * 0.3 ** np.arange(shape[1])
    values = np.linalg.svd(matrix, compute_uv=False)
    found = dense_svd(matrix, rank, 0.2)
    left, kept, right = found.svd
    assert found.converged
    assert kept == pytest.approx(values[: len(kept)], rel=1e-10, abs=1e-14)
    for basis in (left, right):
        assert np.max(np.abs(basis.T @ basis - np.eye(len(kept)))) < 1e-12
    lost2 = float(np.sum((matrix - left * kept @ right.T) ** 2))
    assert found.lost2 == pytest.approx(lost2, rel=1e-6, abs=1e-12 * values[0] ** 2)
    if rank is None:
        assert lost2 <= 0.01 * np.sum(values**2) * (1 + 1e-9)
    else:
        assert len(kept) == min(rank, *shape)


@pytest.mark.parametrize(("rank", "tolerance"), [(6, 0.0), (None, 0.1)])
def test_the_svd_of_a_whole_matrix_by_block_iteration(monkeypatch, rank, tolerance):
    """Where a full one would take too long: the same leading values."""
    monkeypatch.setattr("lotrtensor.core.fit.tuning.FULL_SVD_SIDE", 0)
    rng = np.random.default_rng(0)
    u, v = orthogonal(rng, 120), orthogonal(rng, 90)
    values = 0.7 ** np.arange(90)
    matrix = (u[:, :90] * values) @ v.T
    found = dense_svd(matrix, rank, tolerance)
    assert found.converged
    kept = found.svd.values[:6]
    assert kept == pytest.approx(values[:6], rel=1e-4)
    rebuilt = found.svd.left * found.svd.values @ found.svd.right.T
    lost2 = float(np.sum((matrix - rebuilt) ** 2))
    assert found.lost2 == pytest.approx(lost2, rel=1e-3)
    assert lost2 <= (tolerance or 1.0) ** 2 * np.sum(values**2)


@pytest.fixture
def never_full(monkeypatch):
    monkeypatch.setattr(tuning, "FULL_SVD_SIDE", 0)
    monkeypatch.setattr(tuning, "FULL_SVD_SHARE", 0)


def spectrum(rng, shape, values, dtype):
    """A matrix of known singular values."""
    left, right = (orthogonal(rng, side)[:, : len(values)] for side in shape)
    return ((left * values) @ right.T).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (90, 90), (150, 70), (64, 33)])
@pytest.mark.parametrize("kind", ["falling", "flat", "of rank 2", "zero", "one value many times"])
@pytest.mark.parametrize("rank", [1, 5, 20, None])
def test_as_near_as_the_full_one(never_full, dtype, shape, kind, rank):
    """Whatever the spectrum: what is left is at most a thousandth more than the least."""
    rng, side = np.random.default_rng(3), min(shape)
    values = {
        "falling": 0.8 ** np.arange(side),
        "flat": 1.0 - 0.5 * np.arange(side) / side,
        "of rank 2": np.where(np.arange(side) < 2, 1.0, 0.0),
        "zero": np.zeros(side),
        "one value many times": np.where(np.arange(side) < 7, 1.0, 0.01),
    }[kind]
    matrix, eps = spectrum(rng, shape, values, dtype), float(np.finfo(dtype).eps)
    found = dense_svd(matrix, rank, 0.3)
    left, kept, right = found.svd
    count = len(kept)
    for basis in (left, right):
        assert basis.dtype == dtype
        assert np.max(np.abs(basis.T @ basis - np.eye(count))) < 100 * eps
    whole2 = float(np.sum(values**2))
    rest2 = float(np.sum((matrix.astype(float) - left.astype(float) * kept @ right.T) ** 2))
    assert found.lost2 == pytest.approx(rest2, rel=1e-3, abs=100 * eps * whole2)
    if rank is None:
        assert rest2 <= 0.15**2 * whole2 + 100 * eps * whole2
    else:
        assert count == min(rank, side)
        assert rest2 <= 1.001 * float(np.sum(values[count:] ** 2)) + 100 * eps * whole2


def of_few_entries(kind, rng, shape):
    """Matrices whose entries, and so all rounding, lie in few places or say little of a start."""
    m, n = shape
    matrix = np.zeros(shape)
    if kind == "few rows":
        matrix[:20] = rng.standard_normal((20, n))
    elif kind == "rows in the middle":
        matrix[80:130] = rng.standard_normal((50, n))
    elif kind == "few columns":
        matrix[:, 7:27] = rng.standard_normal((m, 20))
    elif kind == "a tile":
        matrix[30:50, 40:65] = rng.standard_normal((20, 25))
    elif kind == "one entry":
        matrix[5, 6] = 3.0
    elif kind == "constant":
        matrix[:] = 0.5
    elif kind == "few of a diagonal":
        matrix[np.arange(10), np.arange(10)] = np.arange(1, 11)
    elif kind == "permutation":
        matrix[np.arange(min(shape)), rng.permutation(n)[: min(shape)]] = 1.0
    elif kind == "orthogonal":
        matrix = orthogonal(rng, max(shape))[:m, :n]
    return matrix


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(150, 200), (192, 150)])
@pytest.mark.parametrize("goal", [(8, 0.0), (32, 0.0), (None, 0.1)])
@pytest.mark.parametrize(
    "kind",
    ["few rows", "rows in the middle", "few columns", "a tile", "one entry", "constant",
     "few of a diagonal", "permutation", "orthogonal"],
)  # fmt: skip
def test_an_exhausted_space_counts_nothing_twice(never_full, dtype, shape, goal, kind):
    """Orthogonal though the rest of a block is rounding, which lies where the basis does."""
    (rank, tolerance), rng = goal, np.random.default_rng(0)
    matrix = of_few_entries(kind, rng, shape).astype(dtype)
    values = np.linalg.svd(matrix.astype(float), compute_uv=False)
    eps, whole2 = float(np.finfo(dtype).eps), float(np.sum(values**2))
    left, kept, right = (found := dense_svd(matrix, rank, tolerance)).svd
    for basis in (left, right):
        assert np.max(np.abs(basis.T @ basis - np.eye(len(kept)))) < 100 * eps
    rest2 = float(np.sum((matrix - left.astype(float) * kept @ right.T) ** 2))
    assert found.converged and found.lost2 == pytest.approx(rest2, abs=1e-5 * whole2)
    if rank is None:
        assert rest2 <= (tolerance / 2) ** 2 * whole2 * (1 + 1e-5)
    else:
        assert rest2 <= float(np.sum(values[rank:] ** 2)) + 1e-4 * whole2


@pytest.mark.parametrize("copies", [33, 50, 70, 120])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_values_beyond_the_columns_of_a_block_are_found(never_full, copies, dtype):
    """Of which one start reaches no more than it has columns."""
    rng = np.random.default_rng(0)
    values = np.append(np.ones(copies), 0.02 * 0.97 ** np.arange(300 - copies))
    matrix = spectrum(rng, (300, 400), values, dtype)
    found = dense_svd(matrix, 60)
    lost2 = float(np.sum(values**2) - np.sum(found.svd.values**2))
    assert found.converged and lost2 <= 1.001 * float(np.sum(values[60:] ** 2)) + 1e-4


def test_few_passes_where_gaps_are_small(never_full):
    """Signals just above noise: subspace iteration took thirty passes and did not settle."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((300, 500)) / 20
    matrix = noise + spectrum(rng, noise.shape, np.linspace(4.0, 2.2, 16), np.float64)
    found = block_lanczos(matrix, 16)
    assert found.converged and found.left.shape[1] <= 12 * 16
    values = np.linalg.svd(matrix, compute_uv=False)
    energy = np.sum(np.linalg.svd(found.image, compute_uv=False)[:16] ** 2)
    rest2, least2 = np.sum(values**2) - energy, np.sum(values[16:] ** 2)
    assert rest2 <= 1.0005 * least2


def test_passes_that_end_too_early_are_told(never_full, monkeypatch):
    monkeypatch.setattr(tuning, "FACTOR_PASSES", 1)
    matrix = np.random.default_rng(0).standard_normal((200, 300))
    assert not dense_svd(matrix, 8).converged


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_widened(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.float16 if name == "float16" else ml_dtypes.bfloat16
    matrix = np.random.default_rng(0).standard_normal((300, 400)).astype(dtype)
    found = dense_svd(matrix, 6)
    assert found.svd.left.dtype == np.float32
    assert found.svd.values == pytest.approx(dense_svd(matrix.astype("f4"), 6).svd.values)


def test_another_library_and_the_same_numbers():
    torch = pytest.importorskip("torch")
    matrix = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    ours, theirs = (dense_svd(x, 6) for x in (matrix, torch.from_numpy(matrix)))
    assert isinstance(theirs.svd.left, torch.Tensor)
    assert theirs.svd.values == pytest.approx(ours.svd.values, rel=1e-5)
