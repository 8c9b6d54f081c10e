"""tucker2: the error it reports, the bound beside it, and what neither may depend on."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given

from lotrtensor import LotrError, LotrWarning, LowRankStack, Tucker2, tucker2
from lotrtensor.core.fit.hooi import hooi
from lotrtensor.core.fit.hosvd import hosvd
from tests import oracles
from tests.strategies import (
    KINDS,
    NONZERO,
    UNTIED,
    Factors,
    factors,
    fits,
    make,
    noisy,
    orthogonal,
    seeds,
)

# An honest warning is no failure of an invariant; one test below asks for it by name.
pytestmark = pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")

SMALL = ("generic", "decaying", "zero_slice", "deficient")
"""Untied kinds without exact low-rank structure: errors that are rounding have no digits."""


def plain(xp, found):
    """U, G and V as NumPy float64."""
    return tuple(xp.numpy(x) for x in (found.left, found.core, found.right))


def rebuilt(found):
    """The dense slices of a NumPy decomposition."""
    return oracles.reconstruct(found.left, found.core, found.right)


def frame_error(columns):
    """How far a basis is from orthonormal."""
    return float(np.max(np.abs(columns.T @ columns - np.eye(columns.shape[1]))))


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


# ---------------------------------------------------------------- types, inputs, repeats


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_type_and_library_are_kept(xp, dtype):
    """Factors and cores come back as arrays of the library and type that came in."""
    found = tucker2(xp.stack(make("generic", 1, 6, 5, [2, 2]), dtype), (3, 2)).tucker2
    for x in (found.left, found.core, found.right):
        assert xp.owns(x)
        assert x.dtype == xp.dtype(dtype)


@pytest.mark.parametrize(
    ("library", "dtype", "eps"),
    [
        ("numpy", "float16", 1e-3),
        ("ml_dtypes", "bfloat16", 8e-3),
        ("torch", "float16", 1e-3),
        ("torch", "bfloat16", 8e-3),
    ],
)
@pytest.mark.parametrize("kind", ["generic", "all_zero"])
def test_half_precision_comes_back(library, dtype, eps, kind):
    """float16 and bfloat16 come back as such; the error of the rounded factors is reported."""
    module = pytest.importorskip(library)
    half = getattr(module, dtype)
    case = make(kind, 5, 6, 5, [2, 3])

    def array(x):
        return module.tensor(x, dtype=half) if library == "torch" else x.astype(half)

    def plain_array(x):
        return x.double().numpy() if library == "torch" else x.astype(np.float64)

    factors_ = [[array(x) for x in xs] for xs in (case.B, case.A)]
    dense = Factors(*(tuple(plain_array(x) for x in xs) for xs in factors_)).dense()
    for rank in ((2, 3), (5, 5)):
        fit = tucker2(LowRankStack(*factors_), rank)
        found = fit.tucker2
        parts = (found.left, found.core, found.right)
        assert [x.dtype for x in parts] == [half] * 3
        assert [type(x) for x in parts] == [type(factors_[0][0])] * 3
        error = oracles.relative_error(dense, oracles.reconstruct(*map(plain_array, parts)))
        assert fit.relative_error == pytest.approx(error, abs=1e-6)
        bound = oracles.lower_bound(dense, rank)
        assert fit.lower_bound == pytest.approx(bound, abs=1e-6)
        assert fit.relative_error <= math.sqrt(2) * bound + eps


def test_extended_precision_is_not_cut_to_single():
    """A type wider than float64 keeps float64's accuracy at least."""
    case = make("generic", 5, 6, 5, [2, 3])
    wide = [[x.astype(np.longdouble) for x in xs] for xs in (case.B, case.A)]
    try:
        fit = tucker2(LowRankStack(*wide), (5, 5))
    except LotrError:
        return
    assert fit.relative_error < 1e-13


def test_mixed_precision_in_one_stack(xp):
    """B in float32 beside A in float64, or slices of two types: the wider type comes back."""
    case = make("generic", 5, 6, 5, [2, 2])
    lefts = [xp.array(b, "float32") for b in case.B]
    rights = [xp.array(a, "float64") for a in case.A]
    mixed = [xp.array(case.B[0], "float32"), xp.array(case.B[1], "float64")]
    for b in (lefts, mixed):
        fit = tucker2(LowRankStack(b, rights), (4, 4))
        assert fit.relative_error < 1e-13
        assert fit.tucker2.core.dtype == xp.dtype("float64")


def test_parameters_of_a_model_are_accepted():
    """Tensors that require gradients, as trained factors do, need no detaching by the caller."""
    torch = pytest.importorskip("torch")
    case = make("generic", 5, 6, 5, [2, 2])
    expected = tucker2(case.stack(), (3, 3)).relative_error
    for wrap in (torch.nn.Parameter, lambda x: x.requires_grad_()):
        b, a = ([wrap(torch.tensor(x)) for x in xs] for xs in (case.B, case.A))
        fit = tucker2(LowRankStack(b, a), (3, 3))
        assert fit.relative_error == pytest.approx(expected, rel=1e-6)
        assert all(x.grad is None for x in (*b, *a))


@pytest.mark.parametrize("kind", ["generic", "all_zero"])
def test_the_device_is_kept(kind):
    """Arrays of a second device come back on that device, a stack of zeros too."""
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    case = make(kind, 6, 5, 4, [2, 3])
    stack = LowRankStack(
        [strict.asarray(b, device=device) for b in case.B],
        [strict.asarray(a, device=device) for a in case.A],
    )
    found = tucker2(stack, (2, 3)).tucker2
    assert [x.device for x in (found.left, found.core, found.right)] == [device] * 3


def test_inputs_are_not_mutated(xp):
    """The factors that came in are the same after a fit, bit by bit."""
    for kind in ("generic", "all_zero", "diagonal"):
        case = make(kind, 6, 5, 4, [2, 3, 1])
        b, a = [xp.array(x) for x in case.B], [xp.array(x) for x in case.A]
        for rank in (1, (2, 3), (5, 4)):
            tucker2(LowRankStack(b, a), rank)
        for now, before in zip((*b, *a), (*case.B, *case.A), strict=True):
            assert np.array_equal(xp.numpy(now), before)


def test_results_do_not_share_memory_with_the_stack():
    """Writing into a result changes neither the stack nor a later fit."""
    case = make("generic", 6, 5, 4, [2, 3])
    stack = case.stack()
    first = tucker2(stack, (5, 4))
    for x in (first.tucker2.left, first.tucker2.core, first.tucker2.right):
        x[:] = 0.0
    assert stack.to_dense() == pytest.approx(case.dense(), abs=1e-14)
    assert tucker2(stack, (5, 4)).relative_error < 1e-13


@pytest.mark.parametrize("kind", ["generic", "planted", "diagonal", "all_zero"])
def test_same_input_same_bits(xp, kind):
    """Two fits of the same factors agree to the last bit."""
    case = make(kind, 6, 7, 6, [2, 3, 1])
    one, other = (tucker2(xp.stack(case), (3, 2)) for _ in range(2))
    for a, b in zip(plain(xp, one.tucker2), plain(xp, other.tucker2), strict=True):
        assert np.array_equal(a, b)
    assert one.history == other.history
    assert (one.relative_error, one.lower_bound) == (other.relative_error, other.lower_bound)
    assert np.array_equal(one.slice_errors, other.slice_errors)


def test_one_number_stands_for_both_ranks():
    """rank=3 is rank=(3, 3); lists and NumPy integers are ranks too."""
    stack = make("generic", 6, 7, 6, [2, 3, 1]).stack()
    expected = tucker2(stack, (3, 3))
    for rank in (3, [3, 3], np.int64(3), (np.int32(3), 3)):
        fit = tucker2(stack, rank)
        assert fit.tucker2.rank == (3, 3)
        assert fit.relative_error == expected.relative_error


# ---------------------------------------------------------------- the warning


def test_a_fit_that_did_not_converge_warns(monkeypatch):
    """Cut short, the fit warns, says so in its result, and reports an error that is still true."""
    case = make("generic", 24, 9, 8, [3, 3, 3, 3])
    monkeypatch.setitem(hooi.__kwdefaults__, "max_sweeps", 2)
    with pytest.warns(LotrWarning, match="2 sweeps"):
        fit = tucker2(case.stack(), (4, 3))
    assert not fit.converged
    assert fit.iterations == 2
    error = oracles.relative_error(case.dense(), rebuilt(fit.tucker2))
    assert fit.relative_error == pytest.approx(error, rel=1e-9)


@pytest.mark.filterwarnings("error::lotrtensor.errors.LotrWarning")
def test_a_fit_that_converged_does_not_warn():
    """An ordinary fit is silent and says that it converged."""
    for seed in range(5):
        assert tucker2(noisy(seed, 9, 8, 4, (3, 3), 0.05).stack(), (3, 3)).converged


def test_a_tucker2_of_lower_rank_is_its_own_best_fit():
    """Fitting a decomposition at its own ranks gives it back."""
    rng = np.random.default_rng(0)
    own = Tucker2(
        rng.standard_normal((8, 3)), rng.standard_normal((4, 3, 2)), rng.standard_normal((7, 2))
    )
    fit = tucker2(own.to_low_rank(), (3, 2))
    assert fit.relative_error < 2e-14
    assert fit.tucker2.to_dense() == pytest.approx(own.to_dense(), abs=1e-12)
