"""Matrix-free block iteration: as good as the exact method, never silent where it is not."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import DenseStack, LotrError, LotrWarning, LowRankStack, tucker2
from lotrtensor.core.fit.iteration import block_iteration
from tests import oracles
from tests.strategies import STACKS, UNTIED, factors, fits, lazy, make, noisy, orthogonal, seeds

unconverged = pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")


def with_spectrum(seed, sizes, slices=3, m=120, n=110):
    """Dense slices whose directions on both sides have these sizes."""
    rng = np.random.default_rng(seed)
    width = len(sizes)
    core = rng.standard_normal((slices, width, width))
    core *= np.minimum(sizes[:, None], sizes)
    return orthogonal(rng, m, width) @ core @ orthogonal(rng, n, width).T


SPECTRA = {
    "geometric 0.5": 0.5 ** np.arange(60),
    "geometric 0.8": 0.8 ** np.arange(100),
    "geometric 0.9": 0.9 ** np.arange(100),
    "one over i": 1.0 / np.arange(1, 101),
    "one over i squared": np.arange(1, 101) ** -2.0,
    "one over i cubed": np.arange(1, 101) ** -3.0,
    "gap and noise": np.where(np.arange(100) < 8, 1.0, 1e-3),
    "gap and dust": np.where(np.arange(100) < 8, 1.0, 1e-6),
    "late gap": np.where(np.arange(100) < 12, 0.5 ** np.arange(100), 1e-5),
}


# ---------------------------------------------------------------- as good as exact


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("rank", [(8, 8), (20, 14)])
def test_within_one_percent_of_exact(name, rank):
    """On spectra that decay, fast or slowly, whatever the size of the error."""
    stack = DenseStack(with_spectrum(0, SPECTRA[name]))
    exact = tucker2(stack, rank, method="exact")
    fit = tucker2(stack, rank, method="matrix-free", max_passes=100)
    assert fit.method == "matrix-free"
    assert fit.converged
    assert fit.relative_error <= 1.01 * exact.relative_error
    # Neither is a global optimum, but no fit is far below the other.
    assert fit.relative_error >= 0.99 * exact.relative_error


@pytest.mark.parametrize(("slices", "m", "n", "r", "rank"), [(6, 64, 64, 8, 10), (4, 70, 50, 5, 6)])
def test_without_structure_too(slices, m, n, r, rank):
    """Blocks with columns to spare solve a problem of their own: the refinement undoes that."""
    rng = np.random.default_rng(0)
    stack = LowRankStack(rng.normal(size=(slices, m, r)), rng.normal(size=(slices, r, n)))
    exact = tucker2(stack, rank, method="exact")
    fit = tucker2(stack, rank, method="matrix-free", max_passes=200)
    assert fit.converged
    assert fit.relative_error == pytest.approx(exact.relative_error, rel=2e-3)
    assert fit.lower_bound == pytest.approx(exact.lower_bound, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [(4, 4), (3, 5)])
@pytest.mark.parametrize("kind", ["low-rank", "dense", "lazy", "lazy sum", "dense multiple"])
def test_every_kind_of_stack_is_within_one_percent(kind, rank, seed):
    """A planted structure beside noise."""
    case = noisy(seed, 30, 25, 6, (4, 4), 0.02)
    exact = tucker2(case.stack(), rank, method="exact")
    fit = tucker2(STACKS[kind](case, np.array), rank, method="matrix-free", max_passes=60)
    assert fit.relative_error == pytest.approx(exact.relative_error, rel=1e-2)


@given(case=fits(UNTIED))
@unconverged
def test_a_block_as_wide_as_the_stack_is_exact(case):
    """Small stacks fit into the oversampled block: the same error as the exact method."""
    case, rank = case
    stack, scale = case.stack(), np.linalg.norm(case.dense())
    exact = tucker2(stack, rank, method="exact")
    fit = tucker2(stack, rank, method="matrix-free")
    assert fit.relative_error == pytest.approx(exact.relative_error, rel=1e-5, abs=1e-7)
    assert scale == 0 or fit.lower_bound == pytest.approx(exact.lower_bound, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_in_any_library(xp, dtype):
    """The same error; factors of that library and type, orthonormal."""
    case = noisy(3, 14, 13, 3, (3, 4), 0.05)
    fit = tucker2(xp.stack(case, dtype), (3, 4), method="matrix-free")
    expected = tucker2(case.stack(), (3, 4)).relative_error
    assert fit.relative_error == pytest.approx(expected, rel=1e-2)
    for x in (fit.tucker2.left, fit.tucker2.core, fit.tucker2.right):
        assert xp.owns(x)
        assert x.dtype == xp.dtype(dtype)
    for x in (fit.tucker2.left, fit.tucker2.right):
        basis = xp.numpy(x)
        assert np.max(np.abs(basis.T @ basis - np.eye(basis.shape[1]))) < 1e-5
    rebuilt = xp.numpy(fit.tucker2.to_dense())
    truth = oracles.relative_error(case.dense(), rebuilt)
    assert fit.relative_error == pytest.approx(truth, rel=1e-4)


def test_on_a_second_device():
    """Blocks are drawn where the slices are."""
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    case = noisy(3, 20, 24, 5, (3, 4), 0.05)
    stack = LowRankStack(
        [strict.asarray(b, device=device) for b in case.B],
        [strict.asarray(a, device=device) for a in case.A],
    )
    found = tucker2(stack, (3, 4), method="matrix-free", max_passes=200).tucker2
    assert [x.device for x in (found.left, found.core, found.right)] == [device] * 3


# ---------------------------------------------------------------- the bound


@given(case=fits(max_side=24, max_slices=3, max_width=8), seed=st.integers(0, 99))
@unconverged
def test_the_bound_is_never_above_the_true_tail(case, seed):
    """Ritz values are no larger than singular values, after one pass as after many."""
    case, rank = case
    for passes in (1, 2, 5):
        fit = tucker2(case.stack(), rank, method="matrix-free", max_passes=passes, seed=seed)
        assert fit.lower_bound <= oracles.lower_bound(case.dense(), rank) * (1 + 1e-9) + 1e-13
        assert fit.lower_bound <= fit.relative_error
        truth = oracles.relative_error(case.dense(), fit.tucker2.to_dense())
        assert fit.relative_error == pytest.approx(truth, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("passes", [1, 3, 30])
@unconverged
def test_the_bound_where_the_block_is_narrow(name, passes):
    """The same where most directions are outside the block."""
    tensor = with_spectrum(1, SPECTRA[name], m=110, n=104)
    bound = oracles.lower_bound(tensor, (6, 9))
    fit = tucker2(DenseStack(tensor), (6, 9), method="matrix-free", max_passes=passes)
    assert fit.lower_bound <= bound * (1 + 1e-9)
    assert bound <= fit.relative_error * (1 + 1e-9)


# ---------------------------------------------------------------- never silent


def test_the_last_pass_warns():
    """max_passes reached before the energy stalls: a warning, and converged is False."""
    stack = DenseStack(with_spectrum(0, SPECTRA["one over i"]))
    for passes in (1, 2, 3):
        with pytest.warns(LotrWarning, match=f"did not converge in {passes} passes"):
            fit = tucker2(stack, 5, method="matrix-free", max_passes=passes)
        assert not fit.converged
        assert fit.passes == passes


def test_lazy_slices_warn_too():
    """Five passes are not enough for a flat spectrum, and it says so."""
    tensor = np.random.default_rng(0).standard_normal((3, 60, 60))
    with pytest.warns(LotrWarning, match="did not converge"):
        fit = tucker2(lazy(tensor), 3)
    assert not fit.converged
    assert fit.passes == 5


def test_a_fit_that_converged_does_not_warn():
    """Enough passes: no warning."""
    stack = DenseStack(with_spectrum(0, SPECTRA["one over i"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = tucker2(stack, 5, method="matrix-free", max_passes=200)
    assert fit.converged
    assert fit.passes < 200


@pytest.mark.parametrize("passes", [0, -1, 1.5])
def test_nonsense_passes_are_refused(passes):
    """No pass, no decomposition; and none runs for ever."""
    with pytest.raises(LotrError, match="passes"):
        tucker2(
            make("generic", 0, 9, 9, [3, 3]).stack(), 2, method="matrix-free", max_passes=passes
        )


def test_unknown_methods_are_refused():
    """By name, with those that there are."""
    with pytest.raises(LotrError, match="matrix-free"):
        tucker2(make("generic", 0, 4, 4, [1]).stack(), 1, method="als")


# ---------------------------------------------------------------- seeds


@unconverged
def test_the_same_seed_gives_the_same_bits(xp):
    """Another one starts elsewhere and ends near."""
    stack = xp.stack(make("decaying", 4, 14, 13, [5, 5, 5]))
    one, two, other = (
        tucker2(stack, 2, method="matrix-free", max_passes=2, seed=seed) for seed in (5, 5, 6)
    )
    for a, b in (
        (one.tucker2.left, two.tucker2.left),
        (one.tucker2.core, two.tucker2.core),
        (one.tucker2.right, two.tucker2.right),
    ):
        assert np.array_equal(xp.numpy(a), xp.numpy(b))
    assert one.relative_error == two.relative_error
    assert one.history == two.history
    assert one.history != other.history
    assert one.relative_error == pytest.approx(other.relative_error, rel=0.05)


def test_global_random_state_is_left_alone():
    """Nothing is drawn from NumPy's global generator, and it is not seeded."""
    stack = make("generic", 0, 12, 12, [4, 4]).stack()
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    tucker2(stack, 2, method="matrix-free", seed=1)
    assert np.random.rand() == expected


# ---------------------------------------------------------------- the iteration itself


@given(case=factors(max_side=12, max_width=4), seed=seeds)
def test_blocks_and_core_belong_together(case, seed):
    """Orthonormal blocks, core UᵀΔW_kV between them, captured energy ‖core‖², norms ‖ΔW_k‖²."""
    p, q = case.max_rank
    width = (max(1, p // 2), max(1, q // 2))
    found = block_iteration(case.stack(), width, max_passes=4, seed=seed % 1000)
    dense = case.dense()
    assert found.left.shape == (case.shape[1], width[0])
    assert found.right.shape == (case.shape[2], width[1])
    for block in (found.left, found.right):
        assert np.max(np.abs(block.T @ block - np.eye(block.shape[1]))) < 1e-12
    core = oracles.DenseSlices(dense).core(found.left, found.right)
    scale = 1e-13 * (1 + np.sum(dense**2))
    assert np.max(np.abs(found.core - core)) <= scale
    assert found.captured[-1] == pytest.approx(float(np.sum(core**2)), abs=scale)
    assert found.norms2 == pytest.approx(np.sum(dense**2, axis=(1, 2)), rel=1e-12)
    assert found.norm2 == pytest.approx(float(np.sum(dense**2)), rel=1e-12)
    assert len(found.captured) <= 4


def test_the_history_is_that_of_the_passes_and_the_sweeps():
    """One entry a pass, then one a sweep; the last is the error."""
    stack = DenseStack(with_spectrum(0, SPECTRA["geometric 0.8"]))
    fit = tucker2(stack, 12, method="matrix-free", max_passes=50)
    # A sweep over the slices takes two passes, and their cores one more at the end.
    blocks = fit.passes - 2 * fit.iterations - 1
    assert len(fit.history) == blocks + fit.iterations
    passes = np.array(fit.history[:blocks])
    assert np.all(np.diff(passes) < 1e-5)  # nearly monotone: blocks are truncated on the way
    assert fit.history[-1] == pytest.approx(fit.relative_error, rel=1e-3)


def test_the_exact_method_takes_no_passes():
    """passes is 0 there."""
    fit = tucker2(make("generic", 0, 9, 9, [3, 3]).stack(), 2)
    assert (fit.method, fit.passes) == ("exact", 0)


# ---------------------------------------------------------------- the plain methods


@given(case=fits())
def test_hosvd_and_st_hosvd_are_within_root_two_of_the_bound(case):
    """And the exact method is no worse than either start."""
    case, rank = case
    bound = oracles.lower_bound(case.dense(), rank)
    exact = tucker2(case.stack(), rank, method="exact")
    for method in ("hosvd", "st-hosvd"):
        fit = tucker2(case.stack(), rank, method=method)
        assert (fit.method, fit.iterations) == (method, 0)
        assert fit.tucker2.rank == rank
        assert fit.lower_bound <= fit.relative_error <= np.sqrt(2) * bound * (1 + 1e-9) + 1e-13
        assert exact.relative_error <= fit.relative_error * (1 + 1e-9) + 1e-13


@given(case=fits(UNTIED))
def test_hosvd_is_the_dense_hosvd(case):
    """The error of the truncated bases of the dense unfoldings."""
    case, rank = case
    fit = tucker2(case.stack(), rank, method="hosvd")
    expected = oracles.hosvd_error(case.dense(), rank)
    assert fit.relative_error == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(case=fits(UNTIED))
def test_st_hosvd_is_the_dense_one(case):
    """Left basis first, then the right one of what it left."""
    (case, (p, q)), dense = case, case[0].dense()
    left = np.linalg.svd(np.hstack(list(dense)))[0][:, :p]
    projected = left.T @ dense
    right = np.linalg.svd(np.hstack([x.T for x in projected]))[0][:, :q]
    expected = oracles.relative_error(dense, oracles.projected(dense, left, right))
    fit = tucker2(case.stack(), (p, q), method="st-hosvd")
    assert fit.relative_error == pytest.approx(expected, rel=1e-6, abs=1e-12)
