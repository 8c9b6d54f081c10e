"""What lotrtensor.core gives out, and what stands for a stack: held against dense answers."""

import numpy as np
import pytest
from hypothesis import given

import lotrtensor as lt
from lotrtensor import core
from tests import oracles
from tests.strategies import EVERYWHERE, NONZERO, STACKS, fits, make

everywhere = pytest.mark.parametrize(("xp", "kind"), EVERYWHERE, indirect=["xp"])


def test_the_list_of_the_core_is_what_there_is():
    assert core.__all__ == sorted(core.__all__)
    for name in core.__all__:
        assert callable(getattr(core, name))
        assert getattr(core, name).__doc__


@given(case=fits(NONZERO))
def test_hosvd_is_that_of_the_dense_unfoldings(case):
    case, _ = case
    found, dense = core.hosvd(case.stack()), case.dense()
    for basis, values, expected in zip(
        (found.left, found.right),
        (found.left_values, found.right_values),
        oracles.mode_values(dense),
        strict=True,
    ):
        count = len(values)
        assert basis.T @ basis == pytest.approx(np.eye(count), abs=1e-12)
        expected = np.pad(expected, (0, count))[:count]  # what is not there is 0
        assert values == pytest.approx(expected, rel=1e-9, abs=1e-12 * expected[0])
    assert (found.left.shape[1], found.right.shape[1]) == case.stack().max_rank


@given(case=fits(NONZERO))
def test_hooi_and_st_hosvd_are_within_their_theory(case):
    case, rank = case
    dense = case.dense()
    bound = oracles.lower_bound(dense, rank)
    found = core.hooi(case.stack(), rank)
    error = oracles.relative_error(dense, oracles.projected(dense, found.left, found.right))
    assert bound * (1 - 1e-9) - 1e-12 <= error <= np.sqrt(2) * bound + 1e-7
    assert found.history[-1] == pytest.approx(error**2, rel=1e-6, abs=1e-12)
    short = core.st_hosvd(case.stack(), rank)
    error = oracles.relative_error(dense, short.to_dense())
    assert bound * (1 - 1e-9) - 1e-12 <= error <= np.sqrt(2) * bound + 1e-7
    assert short.rank == rank


@everywhere
def test_every_kind_of_stack_in_every_library(xp, kind):
    case = make("generic", 3, 6, 5, [2, 2, 1])
    stack = STACKS[kind](case, xp.array)
    found = core.hosvd(stack)
    assert xp.owns(found.left)
    expected, _ = oracles.mode_values(case.dense())
    values = xp.numpy(found.left_values)
    assert values == pytest.approx(expected[: len(values)])
    assert xp.owns(core.st_hosvd(stack, (2, 2)).core)
    assert core.hooi(stack, (2, 2)).converged


def test_slices_of_zeros_have_factors():
    stack = make("all_zero", 0, 5, 4, [2, 2]).stack()
    assert core.hooi(stack, 2).history == ()
    assert not core.st_hosvd(stack, 2).core.any()


def test_arrays_pairs_and_decompositions_stand_for_stacks():
    case = make("generic", 1, 7, 6, [2, 3, 1])
    dense = case.dense()
    pairs = list(zip(case.B, case.A, strict=True))
    full = lt.tucker2(case.stack(), case.max_rank).tucker2
    expected = lt.tucker2(case.stack(), (3, 2)).relative_error
    for given_slices in (dense, pairs, [list(pair) for pair in pairs], tuple(pairs), full):
        assert lt.tucker2(given_slices, (3, 2)).relative_error == pytest.approx(expected, rel=1e-6)
        assert lt.norm(given_slices) == pytest.approx(np.linalg.norm(dense))
        assert lt.inner(given_slices, case.stack()) == pytest.approx(np.sum(dense**2))
        assert lt.cosine_similarity(dense, given_slices) == pytest.approx(1.0)
        assert lt.rate_distortion(given_slices)[0].parameters == 7 + 6 + 3
    for thin in (pairs, full):
        assert lt.cluster(thin, 2, 1).parameters == lt.cluster(case.stack(), 2, 1).parameters


@pytest.mark.parametrize(
    "wrong", [[], [(np.eye(2),)], np.eye(3), [np.eye(2)], "S", (np.eye(2),) * 2]
)
def test_what_is_no_stack_is_refused(wrong):
    with pytest.raises(lt.LotrError, match="expected"):
        lt.tucker2(wrong, 1)


# ---------------------------------------------------------------- operators


@everywhere
def test_every_kind_of_stack_is_a_vector(xp, kind):
    """−S, S / 2, 2 S and S − S, as for dense slices, in every library."""
    case = make("generic", 2, 5, 4, [2, 1])
    dense, stack = case.dense(), STACKS[kind](case, xp.array)
    for found, expected in (
        (-stack, -dense),
        (stack / 2, dense / 2),
        (np.float64(3) * stack, 3 * dense),
        (stack - stack / 4, 0.75 * dense),
    ):
        assert xp.numpy(found.to_dense()) == pytest.approx(expected)


def test_decompositions_are_vectors():
    found = lt.tucker2(make("generic", 2, 5, 4, [2, 1]).stack(), (3, 3)).tucker2
    dense = found.to_dense()
    assert (-found).to_dense() == pytest.approx(-dense)
    assert (found / 2 - 3 * found).to_dense() == pytest.approx(-2.5 * dense)
    assert isinstance(found / 2, lt.Tucker2)


@pytest.mark.parametrize("kind", ["low-rank", "dense", "lazy", "tucker2"])
def test_operators_refuse_what_is_no_number(kind):
    case = make("generic", 2, 5, 4, [2, 1])
    value = lt.tucker2(case.stack(), 2).tucker2 if kind == "tucker2" else None
    value = value if value is not None else STACKS[kind](case, np.array)
    with pytest.raises(lt.DataError, match="divided by 0"):
        value / 0
    for wrong in (np.inf, np.nan, "2", None, [2], np.ones(2), 1j):
        for wrongly in (lambda x: value * x, lambda x: x * value, lambda x: value / x):
            with pytest.raises(lt.DataError, match="finite number"):
                wrongly(wrong)
    for wrong in (3, "S", None):
        with pytest.raises(lt.DataError):
            value + wrong
        with pytest.raises(lt.DataError):
            value - wrong
