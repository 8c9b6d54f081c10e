"""Types, libraries, devices and repeats of fits, and what is warned of."""

import math

import numpy as np
import pytest

from lotrtensor import LotrError, LotrWarning, LowRankStack, Tucker2, tucker2
from lotrtensor.core.fit.hooi import hooi
from tests import oracles
from tests.fit_fixtures import plain, rebuilt
from tests.strategies import (
    Factors,
    make,
    noisy,
)

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
