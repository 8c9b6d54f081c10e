"""Rate–distortion rows, spectra and the alternatives: true, complete and honest."""

import itertools

import numpy as np
import pytest
from hypothesis import given

from lotrtensor import LotrError, RatePoint, rate_distortion, tucker2
from lotrtensor.core.rates import spectra, truncated_lora_curve
from tests import oracles
from tests.strategies import EVERYWHERE, NONZERO, STACKS, UNTIED, factors, make, noisy

everywhere = pytest.mark.parametrize(("xp", "kind"), EVERYWHERE, indirect=["xp"])
unconverged = pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")


@given(case=factors())
def test_rows_rise_in_size_and_fall_in_error(case):
    """Strictly; the bound is below the error, and the full ranks are exact."""
    rows = rate_distortion(case.stack())
    assert rows
    assert all(isinstance(row, RatePoint) for row in rows)
    parameters = [row.parameters for row in rows]
    errors = [row.relative_error for row in rows]
    assert all(a < b for a, b in itertools.pairwise(parameters))
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert all(0 <= row.lower_bound <= row.relative_error <= 1 + 1e-12 for row in rows)
    slices, m, n = case.shape
    assert rows[0].parameters == m + n + slices
    for row in rows:
        assert row.parameters == m * row.p + n * row.q + slices * row.p * row.q
    assert rows[-1].relative_error < 1e-12


@given(case=factors(UNTIED))
def test_rows_hold_the_dense_errors(case):
    """The error of the dense HOSVD and the dense bound, at every row."""
    for row in rate_distortion(case.stack()):
        rank = (row.p, row.q)
        expected = oracles.hosvd_error(case.dense(), rank)
        assert row.relative_error == pytest.approx(expected, rel=1e-5, abs=1e-11)
        bound = oracles.lower_bound(case.dense(), rank)
        assert row.lower_bound == pytest.approx(bound, rel=1e-6, abs=1e-12)


@given(case=factors(UNTIED))
def test_a_fit_lies_between_bound_and_error(case):
    """As the rows promise."""
    for row in rate_distortion(case.stack())[::3]:
        fit = tucker2(case.stack(), (row.p, row.q))
        assert row.lower_bound * (1 - 1e-9) - 1e-12 <= fit.relative_error
        assert fit.relative_error <= row.relative_error * (1 + 1e-9) + 1e-12


@given(case=factors(NONZERO))
def test_no_pair_of_ranks_beats_a_row(case):
    """By brute force over all pairs of the dense tensor."""
    slices, m, n = case.shape
    rows = rate_distortion(case.stack())
    for p in range(1, case.max_rank[0] + 1):
        for q in range(1, case.max_rank[1] + 1):
            size, error = m * p + n * q + slices * p * q, oracles.hosvd_error(case.dense(), (p, q))
            best = min(row.relative_error for row in rows if row.parameters <= size)
            # Ties between singular values leave more than one HOSVD.
            if case.origin.split(",")[0] in UNTIED:
                assert best <= error * (1 + 1e-6) + 1e-10


@given(case=factors(NONZERO))
def test_cores_kept_as_products_are_priced_so(case):
    """min(p q, r (p + q)) a slice."""
    slices, m, n = case.shape
    assert len(case.ranks) == slices
    for row in rate_distortion(case.stack(), slice_ranks=case.ranks):
        cores = sum(min(row.p * row.q, r * (row.p + row.q)) for r in case.ranks)
        assert row.parameters == m * row.p + n * row.q + cores


@everywhere
@unconverged
def test_every_kind_of_stack(xp, kind):
    """The same rows from float32 arrays of any library, of any form."""
    case = noisy(2, 10, 9, 3, (3, 3), 0.1)
    expected = {(r.p, r.q): r for r in rate_distortion(case.stack())}
    rows = rate_distortion(STACKS[kind](case, lambda x: xp.array(x, "float32")))
    assert all(a.relative_error > b.relative_error for a, b in itertools.pairwise(rows))
    common = [row for row in rows if (row.p, row.q) in expected]
    assert len(common) > 10
    for row in common:
        truth = expected[row.p, row.q]
        assert row.parameters == truth.parameters
        assert row.relative_error == pytest.approx(truth.relative_error, rel=1e-2, abs=2e-3)
        assert row.lower_bound <= truth.lower_bound * 1.01 + 1e-3
        assert type(row.relative_error) is float


def test_small_errors_are_told_as_such():
    """1e-12 is 1e-12, for thin factors and whole slices."""
    case = noisy(0, 12, 11, 3, (3, 3), 1e-13)
    for kind in ("low-rank", "dense"):
        row = next(r for r in rate_distortion(STACKS[kind](case, np.array)) if (r.p, r.q) == (3, 3))
        truth = oracles.hosvd_error(case.dense(), (3, 3))
        assert row.relative_error == pytest.approx(truth, rel=0.05)
        assert 1e-14 < row.relative_error < 1e-11


@pytest.mark.parametrize("method", ["exact", "matrix-free"])
def test_one_slice_is_its_singular_values(method):
    """K = 1: the efficient pairs are (r, r), the errors its tails."""
    case = make("decaying", 1, 8, 7, [5])
    values = np.linalg.svd(case.dense()[0], compute_uv=False)
    rows = rate_distortion(case.stack(), method=method, tolerance=1e-9)
    assert [(r.p, r.q) for r in rows] == [(r, r) for r in range(1, len(rows) + 1)]
    tails = [np.linalg.norm(values[r.p :]) / np.linalg.norm(values) for r in rows]
    assert [r.relative_error for r in rows] == pytest.approx(tails, rel=1e-6, abs=1e-7)


def test_zeros_have_one_row():
    """Nothing to keep: ranks (1, 1), no error."""
    (row,) = rate_distortion(make("all_zero", 0, 5, 4, [2, 2]).stack())
    assert (row.p, row.q, row.relative_error, row.lower_bound) == (1, 1, 0.0, 0.0)


def test_unknown_methods_are_refused():
    """As tucker2 does."""
    with pytest.raises(LotrError, match="method"):
        rate_distortion(make("generic", 0, 4, 4, [1]).stack(), method="als")


@pytest.mark.parametrize("slice_ranks", [[1], [1, 2, 3, 4], []])
def test_slice_ranks_of_another_number_are_refused(slice_ranks):
    """One a slice."""
    with pytest.raises(LotrError):
        rate_distortion(make("generic", 0, 5, 4, [2, 2, 2]).stack(), slice_ranks=slice_ranks)


@given(case=factors(NONZERO))
def test_spectra_are_the_dense_ones(case):
    """Singular values of both unfoldings and the norms of the slices."""
    found = spectra(case.stack())
    scale = 1e-12 * np.linalg.norm(case.dense())
    for values, expected in zip(
        (found.left, found.right), oracles.mode_values(case.dense()), strict=True
    ):
        width = min(len(values), len(expected))
        assert values[:width] == pytest.approx(expected[:width], rel=1e-9, abs=scale)
        assert np.all(np.diff(values) <= scale)
        assert not np.any(values[width:] > scale)
        assert not np.any(expected[width:] > scale)
    assert found.norms == pytest.approx(np.linalg.norm(case.dense(), axis=(1, 2)), rel=1e-9)


def test_spectra_see_1e_10():
    """A planted σ is not lost to rounding."""
    case = noisy(0, 12, 11, 3, (2, 2), 1e-10)
    values = spectra(case.stack()).left
    expected = oracles.mode_values(case.dense())[0]
    assert values[:6] == pytest.approx(expected[:6], rel=1e-4)
    assert values[2] < 1e-8


# ---------------------------------------------------------------- truncated LoRA beside it


def groups(seed=0):
    """Two groups of unlike shapes, slices of unlike ranks and norms."""
    one, two = make("decaying", seed, 7, 6, [2, 3, 1]), make("generic", seed + 1, 5, 9, [2, 2])
    return [one, two]


def dense_spectra(cases):
    """Singular values of every slice, as many as it can have, with the cost of a term."""
    found = []
    for case in cases:
        _, m, n = case.shape
        for rank, x in zip(case.ranks, case.dense(), strict=True):
            found.append((np.linalg.svd(x, compute_uv=False)[: min(rank, m, n)], m + n))
    return found


def brute_force(cases):
    """(size, error) of every choice of ranks from 1 up."""
    spectra_ = dense_spectra(cases)
    total2 = sum(float(np.sum(v**2)) for v, _ in spectra_)
    for ranks in itertools.product(*(range(1, len(v) + 1) for v, _ in spectra_)):
        size = sum(c * r for (_, c), r in zip(spectra_, ranks, strict=True))
        lost2 = sum(float(np.sum(v[r:] ** 2)) for (v, _), r in zip(spectra_, ranks, strict=True))
        yield size, np.sqrt(lost2 / total2), ranks


@pytest.mark.parametrize("seed", range(4))
def test_uniform_truncation_against_brute_force(seed):
    """One point a rank: every slice at it, or at its own."""
    cases = groups(seed)
    points = truncated_lora_curve([c.stack() for c in cases], optimal=False)
    choices = {ranks: (size, error) for size, error, ranks in brute_force(cases)}
    most = [len(v) for v, _ in dense_spectra(cases)]
    assert len(points) == max(most)
    for rank, point in enumerate(points, 1):
        size, error = choices[tuple(min(rank, m) for m in most)]
        assert point.parameters == size
        assert point.relative_error == pytest.approx(error, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("seed", range(4))
def test_optimal_truncation_against_brute_force(seed):
    """No choice of ranks of a point's size has a smaller error, from rank 1 to full."""
    cases = groups(seed)
    points = truncated_lora_curve([c.stack() for c in cases], optimal=True)
    choices = list(brute_force(cases))
    assert points[0].parameters == min(size for size, _, _ in choices)
    assert points[-1].parameters == max(size for size, _, _ in choices)
    assert points[-1].relative_error < 1e-13
    assert all(a.parameters < b.parameters for a, b in itertools.pairwise(points))
    assert all(a.relative_error >= b.relative_error for a, b in itertools.pairwise(points))
    for point in points:
        best = min(error for size, error, _ in choices if size <= point.parameters)
        assert point.relative_error == pytest.approx(best, rel=1e-9, abs=1e-13)


def test_optimal_is_never_worse_than_uniform():
    """At the size of every uniform point."""
    stacks = [c.stack() for c in groups(9)]
    optimal = truncated_lora_curve(stacks, optimal=True)
    for point in truncated_lora_curve(stacks, optimal=False):
        within = [p.relative_error for p in optimal if p.parameters <= point.parameters]
        # Between two of its own points the optimal curve is not to be had.
        assert min(within) <= point.relative_error + 0.05


def test_curves_of_zeros():
    """No NaN."""
    stacks = [make("all_zero", 0, 5, 4, [2, 1]).stack()]
    for optimal in (False, True):
        assert {p.relative_error for p in truncated_lora_curve(stacks, optimal=optimal)} == {0.0}


def test_curves_in_any_library(xp):
    """The same numbers from float32."""
    cases = groups(1)
    for optimal in (False, True):
        expected = truncated_lora_curve([c.stack() for c in cases], optimal=optimal)
        found = truncated_lora_curve([xp.stack(c, "float32") for c in cases], optimal=optimal)
        assert [p.parameters for p in found] == [p.parameters for p in expected]
        errors = [p.relative_error for p in expected]
        assert [p.relative_error for p in found] == pytest.approx(errors, abs=1e-5)
