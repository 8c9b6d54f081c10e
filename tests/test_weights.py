"""Slice weights: a few slices hold most of the energy, and need not decide alone."""

import numpy as np
import pytest
from hypothesis import given

from lotrtensor import LowRankStack, OptionError, tucker2
from tests import oracles
from tests.strategies import EVERYWHERE, NONZERO, STACKS, fits, make, noisy, seeds

everywhere = pytest.mark.parametrize(("xp", "kind"), EVERYWHERE, indirect=["xp"])

CASE = noisy(4, 10, 9, 4, (3, 3), 0.1)
WEIGHTS = [1.0, 0.1, 5.0, 2.0]


def weighted_error(dense, found, weights):
    """√(Σ w_k² ‖T_k − T'_k‖² / Σ w_k² ‖T_k‖²) of dense tensors."""
    w = np.asarray(weights)[:, None, None]
    return oracles.relative_error(w * dense, w * found)


# An honest warning is no failure of an invariant: ties of the spectrum are left very slowly.
pytestmark = pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")


def unequal(seed, ratio=100.0):
    """Two families of slices in subspaces of their own, one far larger than the other."""
    large, small = noisy(seed, 12, 11, 2, (2, 2), 0.02), noisy(seed + 99, 12, 11, 2, (2, 2), 0.02)
    return type(large)(tuple(ratio * b for b in large.B) + small.B, large.A + small.A)


@given(case=fits(NONZERO), seed=seeds)
def test_both_errors_are_the_dense_ones(case, seed):
    """weighted_error weighs the squares of the slices by w²; relative_error does not."""
    case, rank = case
    weights = 10.0 ** np.random.default_rng(seed).uniform(-3, 3, len(case.B))
    fit, dense = tucker2(case.stack(), rank, weights=weights), case.dense()
    found = fit.tucker2.to_dense()
    expected = weighted_error(dense, found, weights)
    assert fit.weighted_error == pytest.approx(expected, rel=1e-6, abs=1e-11)
    expected = oracles.relative_error(dense, found)
    assert fit.relative_error == pytest.approx(expected, rel=1e-6, abs=1e-11)
    errors = oracles.slice_errors(dense, found)
    assert fit.slice_errors == pytest.approx(errors, rel=1e-6, abs=1e-9)


@given(case=fits(NONZERO), seed=seeds)
def test_the_bound_is_that_of_the_weighted_slices(case, seed):
    """Discarded energies of the dense unfoldings of w_k ΔW_k."""
    case, rank = case
    weights = 10.0 ** np.random.default_rng(seed).uniform(-2, 2, len(case.B))
    fit = tucker2(case.stack(), rank, weights=weights)
    bound = oracles.lower_bound(weights[:, None, None] * case.dense(), rank)
    assert fit.lower_bound == pytest.approx(bound, rel=1e-9, abs=1e-12)
    assert fit.lower_bound <= fit.weighted_error


@given(case=fits(NONZERO), seed=seeds)
def test_the_fit_is_that_of_the_weighted_slices(case, seed):
    """The error of fitting w_k ΔW_k as they are; its cores divided by w_k."""
    case, rank = case
    weights = 10.0 ** np.random.default_rng(seed).uniform(-1, 1, len(case.B))
    fit = tucker2(case.stack(), rank, weights=weights)
    plain = tucker2(case.stack().scaled(list(weights)), rank)
    assert fit.weighted_error == pytest.approx(plain.relative_error, rel=1e-9, abs=1e-12)
    rescaled = plain.tucker2.to_dense() / weights[:, None, None]
    scale = float(np.linalg.norm(case.dense()))
    assert np.max(np.abs(fit.tucker2.to_dense() - rescaled)) <= 1e-9 * scale


def test_without_weights_both_errors_are_one():
    """And weights of one change nothing, nor does a common factor."""
    fit = tucker2(CASE.stack(), (3, 2))
    assert fit.weighted_error == fit.relative_error
    for weights in ([1.0] * 4, [7.5] * 4, (1, 1, 1, 1), np.ones(4, np.float32)):
        other = tucker2(CASE.stack(), (3, 2), weights=weights)
        assert other.relative_error == pytest.approx(fit.relative_error, rel=1e-9)
        assert other.weighted_error == pytest.approx(fit.relative_error, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_equal_weights_spare_the_small_slices(seed):
    """The worst slice is better, the whole is worse: what was asked for."""
    case = unequal(seed)
    plain, equal = (tucker2(case.stack(), (2, 2), weights=w) for w in (None, "equal"))
    assert plain.slice_errors.max() > 0.8
    assert equal.slice_errors.max() < plain.slice_errors.max()
    assert np.linalg.norm(equal.slice_errors) < np.linalg.norm(plain.slice_errors)
    assert equal.relative_error > plain.relative_error
    assert equal.weighted_error < np.sqrt(np.mean(plain.slice_errors**2))


@given(case=fits(NONZERO))
def test_equal_brings_every_slice_to_norm_one(case):
    """weighted_error² is the mean squared slice error of the slices that are not zero."""
    case, rank = case
    fit, dense = tucker2(case.stack(), rank, weights="equal"), case.dense()
    norms = np.linalg.norm(dense, axis=(1, 2))
    errors = oracles.slice_errors(dense, fit.tucker2.to_dense())[norms > 0]
    assert fit.weighted_error == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("kind", ["generic", "zero_slice", "uneven"])
def test_equal_does_not_see_how_large_a_slice_is(kind):
    """Slices scaled one by one have the same factors and slice errors."""
    case = make(kind, 3, 8, 7, [2, 2, 2])
    sizes = [1e-5, 1.0, 1e4]
    other = type(case)(tuple(s * b for s, b in zip(sizes, case.B, strict=True)), case.A)
    one, two = (tucker2(c.stack(), (2, 3), weights="equal") for c in (case, other))
    assert two.weighted_error == pytest.approx(one.weighted_error, rel=1e-6)
    assert two.slice_errors == pytest.approx(one.slice_errors, rel=1e-4, abs=1e-9)


@everywhere
@pytest.mark.parametrize("weights", [WEIGHTS, "equal"], ids=["numbers", "equal"])
@pytest.mark.parametrize("method", ["auto", "matrix-free"])
def test_every_kind_of_stack(xp, kind, weights, method):
    """The same weighted error in every library and form; type and library are kept."""
    expected = tucker2(CASE.stack(), (3, 3), weights=weights)
    stack = STACKS[kind](CASE, lambda x: xp.array(x, "float32"))
    fit = tucker2(stack, (3, 3), weights=weights, method=method)
    assert fit.weighted_error == pytest.approx(expected.weighted_error, rel=1e-3)
    assert fit.relative_error == pytest.approx(expected.relative_error, rel=2e-2)
    for x in (fit.tucker2.left, fit.tucker2.core, fit.tucker2.right):
        assert xp.owns(x)
        assert x.dtype == xp.dtype("float32")


def test_on_a_second_device():
    """Weights go to where the slices are."""
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    stack = LowRankStack(
        [strict.asarray(b, device=device) for b in CASE.B],
        [strict.asarray(a, device=device) for a in CASE.A],
    )
    for weights in (WEIGHTS, "equal"):
        found = tucker2(stack, (3, 3), weights=weights).tucker2
        assert [x.device for x in (found.left, found.core, found.right)] == [device] * 3


@pytest.mark.parametrize("kind", ["dense", "dense sum", "dense multiple"])
@pytest.mark.parametrize("weights", [WEIGHTS, "equal"], ids=["numbers", "equal"])
def test_weights_do_not_make_slices_in_memory_lazy(kind, weights):
    """The method is the one that the stack has without weights: exact, where that is cheap."""
    rng = np.random.default_rng(0)
    case = type(CASE)(
        tuple(rng.standard_normal((4, 40, 30))), tuple(rng.standard_normal((4, 30, 35)))
    )
    stack = STACKS[kind](case, np.array)
    fit = tucker2(stack, (5, 4), weights=weights)
    assert fit.method == "exact"
    expected = tucker2(case.stack(), (5, 4), weights=weights)
    assert fit.weighted_error == pytest.approx(expected.weighted_error, rel=1e-6)


@pytest.mark.parametrize(
    "goal",
    [{"tolerance": 0.2}, {"energy": 0.95}, {"parameters": 150}, {"tolerance": 0.001}],
    ids=str,
)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 50.0, 50.0], "equal"], ids=["numbers", "equal"])
def test_goals_refer_to_the_weighted_error(goal, weights):
    """Which is held against the dense slices."""
    case = unequal(1)
    fit, dense = tucker2(case.stack(), weights=weights, **goal), case.dense()
    found = fit.tucker2.to_dense()
    numbers = 1 / np.linalg.norm(dense, axis=(1, 2)) if weights == "equal" else weights
    truth = weighted_error(dense, found, numbers)
    assert fit.weighted_error == pytest.approx(truth, rel=1e-9)
    if "parameters" in goal:
        assert fit.tucker2.parameters <= 150
    else:
        assert truth <= goal.get("tolerance", np.sqrt(1 - goal.get("energy", 0))) * (1 + 1e-12)


def test_weights_of_many_decades():
    """A weight of 1e-12 leaves the slice out of the fit, and its error is still the true one."""
    case = unequal(0, ratio=1.0)
    fit = tucker2(case.stack(), (2, 2), weights=[1, 1, 1e-12, 1e-12])
    alone = tucker2(case.stack().take([0, 1]), (2, 2))
    assert fit.weighted_error == pytest.approx(alone.relative_error, rel=1e-6)
    dense = case.dense()
    expected = oracles.slice_errors(dense, fit.tucker2.to_dense())
    assert fit.slice_errors == pytest.approx(expected, rel=1e-6)
    assert fit.slice_errors[2:].min() > 0.5


@pytest.mark.parametrize("kind", ["low-rank", "dense", "lazy"])
@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 2.0],
        [1.0] * 5,
        [],
        3.0,
        [[1.0, 1.0, 1.0, 1.0]],
        [1.0, 0.0, 1.0, 1.0],
        [1.0, -1.0, 1.0, 1.0],
        [1.0, np.nan, 1.0, 1.0],
        [1.0, np.inf, 1.0, 1.0],
        "unit",
        "",
        ["a", "b", "c", "d"],
        [1j, 1, 1, 1],
        [None, 1.0, 1.0, 1.0],
    ],
    ids=str,
)
def test_invalid_weights_are_refused(kind, weights):
    """By name, before anything is read or computed."""
    with pytest.raises(OptionError, match="weights"):
        tucker2(STACKS[kind](CASE, np.array), 2, weights=weights)


def test_weights_are_not_mutated_and_any_sequence_will_do():
    """Lists, tuples and arrays of NumPy or PyTorch."""
    torch = pytest.importorskip("torch")
    expected = tucker2(CASE.stack(), 2, weights=WEIGHTS).weighted_error
    array = np.array(WEIGHTS)
    for weights in (tuple(WEIGHTS), array, torch.tensor(WEIGHTS, dtype=torch.float64)):
        assert tucker2(CASE.stack(), 2, weights=weights).weighted_error == expected
    assert array.tolist() == WEIGHTS
