"""tucker2: the error it reports, the bound beside it, and what neither may depend on."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given

from lotrtensor import LotrError, tucker2
from tests import oracles
from tests.fit_fixtures import frame_error, plain, rebuilt
from tests.strategies import (
    NONZERO,
    UNTIED,
    Factors,
    fits,
    make,
    noisy,
    orthogonal,
    seeds,
)

# An honest warning is no failure of an invariant; one test below asks for it by name.
pytestmark = pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")

"""Untied kinds without exact low-rank structure: errors that are rounding have no digits."""


# ---------------------------------------------------------------- what is reported is true


@given(case=fits())
def test_error_is_the_dense_error(case):
    """relative_error and slice_errors are those of the dense reconstruction."""
    case, rank = case
    fit, dense = tucker2(case.stack(), rank), case.dense()
    found = rebuilt(fit.tucker2)
    assert fit.tucker2.shape == case.shape
    assert fit.tucker2.rank == rank
    assert fit.relative_error == pytest.approx(
        oracles.relative_error(dense, found), rel=1e-9, abs=1e-13
    )
    expected = oracles.slice_errors(dense, found)
    assert fit.slice_errors.shape == expected.shape
    assert fit.slice_errors == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(case=fits())
def test_bound_is_the_dense_bound(case):
    """lower_bound is the discarded energy of the dense unfoldings, and no more than the error."""
    case, rank = case
    fit = tucker2(case.stack(), rank)
    expected = oracles.lower_bound(case.dense(), rank)
    assert fit.lower_bound == pytest.approx(expected, rel=1e-9, abs=1e-13)
    assert 0 <= fit.lower_bound <= fit.relative_error <= 1 + 1e-12


@given(case=fits())
def test_factors_are_orthonormal_and_the_core_is_optimal(case):
    """UᵀU = I, VᵀV = I and G_k = Uᵀ ΔW_k V: no other core does better."""
    case, rank = case
    found, dense = tucker2(case.stack(), rank).tucker2, case.dense()
    assert frame_error(found.left) < 1e-13
    assert frame_error(found.right) < 1e-13
    best = oracles.DenseSlices(dense).core(found.left, found.right)
    assert found.core == pytest.approx(best, abs=1e-13 * (1 + np.linalg.norm(dense)))


@given(case=fits(NONZERO))
def test_columns_come_by_captured_energy(case):
    """The cores' two Gram matrices are diagonal and descending."""
    case, rank = case
    core = tucker2(case.stack(), rank).tucker2.core
    scale = 1e-13 * float(np.sum(core**2))
    for gram in (np.einsum("kpq,krq->pr", core, core), np.einsum("kpq,kpr->qr", core, core)):
        energies = np.diag(gram)
        assert np.max(np.abs(gram - np.diag(energies))) <= scale
        assert np.all(np.diff(energies) <= scale)


@pytest.mark.parametrize("rank", [(3, 2), (2, 4), (5, 5)])
def test_columns_come_by_captured_energy_in_any_library(xp, rank):
    """The same where the sweeps stopped short of the last digit, which leaves U and V unordered."""
    for seed in range(3):
        found = tucker2(xp.stack(make("generic", seed, 7, 6, [2, 3, 3, 1])), rank).tucker2
        _, core, _ = plain(xp, found)
        for gram in (np.einsum("kpq,krq->pr", core, core), np.einsum("kpq,kpr->qr", core, core)):
            energies = np.diag(gram)
            assert np.max(np.abs(gram - np.diag(energies))) <= 1e-13 * energies.sum()
            assert np.all(np.diff(energies) < 0)


@given(case=fits(NONZERO))
def test_leading_columns_capture_the_cumulative_energy(case):
    """Kept to (p', q'), the error² is the reported error² plus the core energy that is dropped."""
    case, rank = case
    fit, dense = tucker2(case.stack(), rank), case.dense()
    found, norm2 = fit.tucker2, float(np.sum(dense**2))
    p, q = (rank[0] + 1) // 2, (rank[1] + 1) // 2
    kept = oracles.reconstruct(found.left[:, :p], found.core[:, :p, :q], found.right[:, :q])
    dropped = float(np.sum(found.core**2) - np.sum(found.core[:, :p, :q] ** 2))
    expected = fit.relative_error**2 + dropped / norm2
    assert oracles.relative_error(dense, kept) ** 2 == pytest.approx(expected, abs=1e-12)


@given(case=fits(NONZERO))
def test_account_of_the_iteration(case):
    """One history entry a sweep, never rising, the last the error that is reported."""
    case, rank = case
    fit = tucker2(case.stack(), rank)
    assert fit.method == "exact"
    assert len(fit.history) == fit.iterations
    if not fit.iterations:  # at full ranks there is nothing to sweep for
        assert rank == case.max_rank
        assert fit.relative_error < 1e-13
        return
    squares = np.array(fit.history) ** 2
    assert np.all(np.diff(squares) <= 4e-15)
    assert squares[-1] == pytest.approx(fit.relative_error**2, abs=1e-13)


def test_a_fit_cannot_be_changed():
    """The result is frozen."""
    fit = tucker2(make("generic", 0, 4, 4, [1, 1]).stack(), 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.relative_error = 0.0


# ---------------------------------------------------------------- only the products count


@given(case=fits(UNTIED), seed=seeds)
def test_gauge(case, seed):
    """(B_k S, S⁻¹ A_k) has the same error and bound."""
    case, rank = case
    one = tucker2(case.stack(), rank)
    other = tucker2(case.gauged(np.random.default_rng(seed)).stack(), rank)
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-6, abs=1e-11)
    assert other.lower_bound == pytest.approx(one.lower_bound, rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rank", [(3, 3), (4, 2), (2, 5)])
def test_gauge_leaves_the_reconstruction(seed, rank):
    """(B_k S, S⁻¹ A_k) has the same U G_k Vᵀ, also where S spans sixteen decades."""
    case = noisy(seed, 9, 8, 4, (3, 3), 0.05)
    rng = np.random.default_rng(seed)
    expected = rebuilt(tucker2(case.stack(), rank).tucker2)
    sizes = [10.0 ** rng.uniform(-8, 8, r) for r in case.ranks]
    stretched = Factors(
        tuple(b * s for b, s in zip(case.B, sizes, strict=True)),
        tuple(a / s[:, None] for a, s in zip(case.A, sizes, strict=True)),
    )
    for other in (case.gauged(rng), stretched):
        found = rebuilt(tucker2(other.stack(), rank).tucker2)
        assert oracles.relative_error(expected, found) < 1e-6


@given(case=fits(UNTIED), seed=seeds)
def test_order_of_slices(case, seed):
    """Slices in another order: the same error and bound, slice errors in that order."""
    case, rank = case
    order = list(np.random.default_rng(seed).permutation(case.shape[0]))
    one, other = tucker2(case.stack(), rank), tucker2(case.permuted(order).stack(), rank)
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-6, abs=1e-12)
    assert other.lower_bound == pytest.approx(one.lower_bound, rel=1e-9, abs=1e-13)
    # A sweep more or less moves a slice by the root of what it moves the whole.
    shares = np.linalg.norm(case.dense(), axis=(1, 2)) / np.linalg.norm(case.dense())
    expected = (one.slice_errors * shares)[order]
    assert other.slice_errors * shares[order] == pytest.approx(expected, abs=2e-3)


@given(case=fits(UNTIED), seed=seeds)
def test_orthogonal_change_of_basis(case, seed):
    """P ΔW_k Qᵀ for orthogonal P and Q has the same error, bound and slice errors."""
    case, rank = case
    rng = np.random.default_rng(seed)
    turned = case.turned(orthogonal(rng, case.shape[1]), orthogonal(rng, case.shape[2]))
    one, other = tucker2(case.stack(), rank), tucker2(turned.stack(), rank)
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-6, abs=1e-12)
    assert other.lower_bound == pytest.approx(one.lower_bound, rel=1e-9, abs=1e-13)


@given(case=fits())
def test_transposition_leaves_the_bound(case):
    """ΔW_kᵀ at ranks (q, p) has the bound of ΔW_k at (p, q)."""
    case, (p, q) = case
    one, other = tucker2(case.stack(), (p, q)), tucker2(case.transposed().stack(), (q, p))
    assert other.lower_bound == pytest.approx(one.lower_bound, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [(3, 3), (4, 2), (2, 3), (1, 4)])
def test_transposition_of_structured_slices(seed, rank):
    """ΔW_kᵀ at ranks (q, p) has the error of ΔW_k at (p, q), the transpose its reconstruction."""
    case = noisy(seed, 9, 8, 4, (3, 3), 0.05)
    one = tucker2(case.stack(), rank)
    other = tucker2(case.transposed().stack(), rank[::-1])
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-5)


@pytest.mark.parametrize("seed", range(25))
def test_transposition_of_random_slices(seed):
    """Neither side is favoured where the slices hold no structure and optima are many."""
    rng = np.random.default_rng(seed)
    m, n = (int(x) for x in rng.integers(6, 15, 2))
    case = make("generic", seed, m, n, [int(r) for r in rng.integers(1, 5, rng.integers(2, 8))])
    p, q = (int(rng.integers(1, min(8, most + 1))) for most in case.max_rank)
    one, other = tucker2(case.stack(), (p, q)), tucker2(case.transposed().stack(), (q, p))
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-5, abs=1e-12)


@given(case=fits(UNTIED))
def test_scale(case):
    """c ΔW_k has the same relative errors; U and V stay and the cores are multiplied by c."""
    case, rank = case
    one, other = tucker2(case.stack(), rank), tucker2(case.scaled(-8.0, 0.5).stack(), rank)
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-9, abs=1e-13)
    assert other.lower_bound == pytest.approx(one.lower_bound, rel=1e-9, abs=1e-13)
    scale = float(np.linalg.norm(case.dense()))
    assert rebuilt(other.tucker2) == pytest.approx(-4 * rebuilt(one.tucker2), abs=1e-6 * scale)


@pytest.mark.parametrize(
    ("dtype", "scale", "eps"),
    [
        ("float64", 1e30, 1e-9),
        ("float64", 1e-30, 1e-9),
        ("float32", 1e15, 1e-5),
        ("float32", 1e-15, 1e-5),
    ],
)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_scales_near_the_ends_of_the_type(xp, dtype, scale, eps, side):
    """Errors and bound at 1e±30 (float64) and 1e±15 (float32) are those at 1; cores scale."""
    case, rank = noisy(4, 7, 6, 3, (3, 2), 0.2), (2, 3)
    outer = (scale if side != "right" else 1.0, scale if side != "left" else 1.0)
    one = tucker2(xp.stack(case, dtype), rank)
    other = tucker2(xp.stack(case.scaled(*outer), dtype), rank)
    assert other.relative_error == pytest.approx(one.relative_error, rel=eps)
    assert other.lower_bound == pytest.approx(one.lower_bound, rel=eps)
    assert other.slice_errors == pytest.approx(one.slice_errors, rel=1e3 * eps)
    left, core, right = plain(xp, other.tucker2)
    assert max(frame_error(left), frame_error(right)) < 10 * eps
    found = oracles.reconstruct(left, core / outer[0] / outer[1], right)
    expected = oracles.reconstruct(*plain(xp, one.tucker2))
    assert oracles.relative_error(expected, found) < 1e3 * eps


@pytest.mark.parametrize("scale", [1e-200, 1e-170, 1e160, 1e200])
def test_scales_whose_squares_do_not_fit(scale):
    """Where squared norms under- or overflow the errors are still right, or it is refused."""
    case, rank = noisy(4, 7, 6, 3, (3, 2), 0.2), (2, 3)
    expected = tucker2(case.stack(), rank)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            found = tucker2(case.scaled(scale).stack(), rank)
    except LotrError:
        return
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-9)
    assert found.lower_bound == pytest.approx(expected.lower_bound, rel=1e-9)
