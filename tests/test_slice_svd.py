"""Truncated LoRA: singular value decompositions of slices, and ranks chosen among their terms."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import (
    LowRankStack,
    RankError,
)
from lotrtensor.core.ranks.terms import (
    ranks_for_parameters,
    ranks_for_tolerance,
    truncation_error,
    uniform_ranks,
)
from lotrtensor.core.slice_svd import slice_svds, truncate_slices
from tests import oracles
from tests.strategies import NONZERO, factors, make, orthogonal, seeds


@given(case=factors(), rank=st.integers(1, 4))
def test_slices_are_the_best_of_their_rank(case, rank):
    """Eckart and Young: the error of every slice is the tail of its dense singular values."""
    svds = slice_svds(case.stack())
    ranks = uniform_ranks([svd.values for svd in svds], rank)
    found = truncate_slices(svds, ranks)
    for k, dense in enumerate(case.dense()):
        values = np.linalg.svd(dense, compute_uv=False)
        scale = 1e-14 * max(1.0, values[0])
        b, a = found.factors(k)
        assert b.shape[1] == a.shape[0] == ranks[k] <= min(rank, *dense.shape, case.ranks[k])
        assert svds[k].values[: len(values)] == pytest.approx(
            values[: len(svds[k].values)], rel=1e-10, abs=scale
        )
        tail = np.linalg.norm(values[ranks[k] :])
        assert np.linalg.norm(dense - b @ a) == pytest.approx(tail, rel=1e-9, abs=20 * scale)
        # Balanced: neither factor takes the size of the other.
        assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=1e-9, abs=scale)


@given(case=factors(NONZERO), rank=st.integers(1, 3))
def test_the_error_told_is_the_dense_one(case, rank):
    """√(Σ tails² / Σ norms²)."""
    svds = slice_svds(case.stack())
    spectra = [svd.values for svd in svds]
    ranks = uniform_ranks(spectra, rank)
    found = truncate_slices(svds, ranks).to_dense()
    expected = oracles.relative_error(case.dense(), found)
    assert truncation_error(spectra, ranks) == pytest.approx(expected, rel=1e-8, abs=1e-13)


def test_a_slice_keeps_a_value_of_1e_10():
    """QR and a small SVD: no Gram matrix loses it, in any gauge."""
    rng = np.random.default_rng(0)
    u, v = orthogonal(rng, 9, 2), orthogonal(rng, 7, 2)
    for split in (0.0, 0.5, 1.0):
        sizes = np.array([1.0, 1e-10])
        stack = LowRankStack([u * sizes**split], [(v * sizes ** (1 - split)).T])
        assert slice_svds(stack)[0].values == pytest.approx([1.0, 1e-10], rel=1e-5)


def test_slices_in_any_library(xp):
    """Factors of that library, in its widest type."""
    case = make("generic", 3, 6, 5, [2, 3])
    svds = slice_svds(xp.stack(case, "float32"))
    found = truncate_slices(svds, [1, 2])
    assert found.ranks == (1, 2)
    for k, dense in enumerate(case.dense()):
        b, a = found.factors(k)
        assert xp.owns(b)
        assert xp.owns(a)
        tail = np.linalg.norm(np.linalg.svd(dense, compute_uv=False)[k + 1 :])
        error = np.linalg.norm(dense - xp.numpy(b) @ xp.numpy(a))
        assert error == pytest.approx(tail, rel=1e-4)


def test_slices_on_a_second_device():
    """What comes back is where the slices are."""
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    case = make("generic", 3, 6, 5, [2, 3])
    stack = LowRankStack(
        [strict.asarray(b, device=device) for b in case.B],
        [strict.asarray(a, device=device) for a in case.A],
    )
    b, a = truncate_slices(slice_svds(stack), [1, 2]).factors(1)
    assert [b.device, a.device] == [device] * 2


def spectra_of(rng, slices):
    """Falling singular values, some zero, and costs of a term."""
    spectra = [np.sort(rng.random(rng.integers(1, 5)))[::-1].copy() for _ in range(slices)]
    if rng.random() < 0.3:
        spectra[0][-1] = 0.0
    return spectra, [int(c) for c in rng.integers(3, 9, slices)]


def every_rank(spectra, costs):
    """Every choice of ranks with its cost and its squared error."""
    for ranks in itertools.product(*(range(1, len(v) + 1) for v in spectra)):
        cost = sum(c * r for c, r in zip(costs, ranks, strict=True))
        yield (
            ranks,
            cost,
            sum(float(np.sum(v[r:] ** 2)) for v, r in zip(spectra, ranks, strict=True)),
        )


@given(seed=seeds, slices=st.integers(1, 4), alike=st.booleans())
def test_ranks_for_a_budget_are_optimal(seed, slices, alike):
    """Of every size, by trying all choices; no parameters go to singular values of zero."""
    rng = np.random.default_rng(seed)
    spectra, costs = spectra_of(rng, slices)
    if alike:
        costs = [5] * slices
    choices = list(every_rank(spectra, costs))
    for budget in range(sum(costs), sum(c * 5 for c in costs)):
        ranks = ranks_for_parameters(spectra, costs, budget)
        spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
        lost2 = sum(float(np.sum(v[r:] ** 2)) for v, r in zip(spectra, ranks, strict=True))
        best = min(error2 for _, cost, error2 in choices if cost <= budget)
        assert min(ranks) >= 1
        assert spent <= budget
        assert lost2 == pytest.approx(best, rel=1e-12, abs=1e-15)
        assert all(v[r - 1] > 0 for v, r in zip(spectra, ranks, strict=True) if r > 1)


@given(seed=seeds, slices=st.integers(1, 4), alike=st.booleans())
def test_ranks_for_a_tolerance_are_the_fewest(seed, slices, alike):
    """The error holds, and no choice of fewer parameters holds it."""
    rng = np.random.default_rng(seed)
    spectra, costs = spectra_of(rng, slices)
    if alike:
        costs = [5] * slices
    total2 = sum(float(np.sum(v**2)) for v in spectra)
    for tolerance in (0.01, 0.1, 0.3, 0.5, 0.9):
        ranks = ranks_for_tolerance(spectra, costs, tolerance)
        assert truncation_error(spectra, ranks) <= tolerance * (1 + 1e-12)
        spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
        best = min(
            cost
            for _, cost, error2 in every_rank(spectra, costs)
            if error2 <= tolerance**2 * total2
        )
        assert spent == best


@given(seed=seeds, slices=st.integers(1, 4))
def test_one_rank_for_all_is_the_best_one(seed, slices):
    """The highest that a budget pays, the lowest that a tolerance allows."""
    rng = np.random.default_rng(seed)
    spectra, costs = spectra_of(rng, slices)
    every = [uniform_ranks(spectra, rank) for rank in range(1, 6)]
    sizes = [sum(c * r for c, r in zip(costs, ranks, strict=True)) for ranks in every]
    for budget in range(sum(costs), max(sizes) + 2):
        found = ranks_for_parameters(spectra, costs, budget, uniform=True)
        assert found == [r for r, size in zip(every, sizes, strict=True) if size <= budget][-1]
        free = ranks_for_parameters(spectra, costs, budget)
        assert truncation_error(spectra, free) <= truncation_error(spectra, found) + 1e-15
    for tolerance in (0.01, 0.3, 0.9):
        found = ranks_for_tolerance(spectra, costs, tolerance, uniform=True)
        assert found == next(r for r in every if truncation_error(spectra, r) <= tolerance)
    for uniform in (False, True):
        with pytest.raises(RankError, match="parameters is"):
            ranks_for_parameters(spectra, costs, sum(costs) - 1, uniform=uniform)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, np.nan])
def test_tolerances_out_of_range(tolerance):
    """Refused by name."""
    with pytest.raises(RankError, match="tolerance is"):
        ranks_for_tolerance([np.ones(2)], [3], tolerance)


def test_a_budget_below_rank_one_names_what_it_needs():
    """Every slice keeps rank 1, as a LoRA file must."""
    with pytest.raises(RankError, match=r"2 slices needs 11$"):
        ranks_for_parameters([np.ones(2), np.ones(3)], [5, 6], 10)
    with pytest.raises(RankError, match="rank is 0"):
        uniform_ranks([np.ones(2)], 0)
