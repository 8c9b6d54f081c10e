"""Tucker2 and its error: U · G_k · Vᵀ for any factors and cores, orthonormal or not."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import ShapeError, Tucker2
from lotrtensor.core.fit.residual import error_norms2
from tests import oracles
from tests.strategies import NONZERO, factors, fits, make, orthogonal, seeds


@st.composite
def parts(draw: st.DrawFn):
    """U (m × p), G (K × p × q), V (n × q); p > m, q > n and dependent columns included."""
    rng = np.random.default_rng(draw(seeds))
    sides = st.integers(1, 6)
    slices, m, n, p, q = (draw(sides) for _ in range(5))
    left, right = rng.standard_normal((m, p)), rng.standard_normal((n, q))
    if draw(st.booleans()):
        left[:, -1] = left[:, 0]
        right[:, -1] = 0.0
    return left, rng.standard_normal((slices, p, q)), right


@given(parts=parts())
def test_slices_follow_the_definition(parts):
    """slice(k), to_dense and to_low_rank are all U G_k Vᵀ."""
    found, expected = Tucker2(*parts), oracles.reconstruct(*parts)
    scale = 1e-13 * (1 + np.abs(expected).max())
    assert found.to_dense() == pytest.approx(expected, rel=1e-12, abs=scale)
    assert found.to_low_rank().to_dense() == pytest.approx(expected, rel=1e-12, abs=scale)
    for k, matrix in enumerate(expected):
        assert found.slice(k) == pytest.approx(matrix, rel=1e-12, abs=scale)


@given(parts=parts())
def test_sizes_are_those_of_the_arrays(parts):
    """shape is (K, m, n), rank (p, q), parameters the number of stored entries."""
    left, core, right = parts
    found = Tucker2(*parts)
    assert found.shape == (core.shape[0], left.shape[0], right.shape[0])
    assert found.rank == (left.shape[1], right.shape[1])
    assert found.parameters == left.size + core.size + right.size


def test_it_cannot_be_changed():
    """A decomposition is frozen."""
    found = Tucker2(np.ones((3, 2)), np.ones((2, 2, 1)), np.ones((4, 1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.left = np.zeros((3, 2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_stays_in_its_library(xp, dtype):
    """Slices, casts and thin factors are arrays of the library that came in."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((5, 2)), rng.standard_normal((3, 2, 3)), rng.standard_normal((4, 3))
    found = Tucker2(*(xp.array(x, dtype) for x in plain))
    expected = oracles.reconstruct(*plain)
    for dense in (found.to_dense(), found.to_low_rank().to_dense()):
        assert xp.owns(dense)
        assert dense.dtype == xp.dtype(dtype)
        assert xp.numpy(dense) == pytest.approx(expected, abs=1e-5)
    cast = found.astype(xp.dtype("float32"))
    assert all(x.dtype == xp.dtype("float32") for x in (cast.left, cast.core, cast.right))
    assert xp.numpy(cast.core) == pytest.approx(plain[1], abs=1e-6)
    assert found.accumulated().core.dtype == xp.dtype("float64")
    for now, before in zip((found.left, found.core, found.right), plain, strict=True):
        assert np.array_equal(xp.numpy(now), xp.numpy(xp.array(before, dtype)))


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 2), (3, 2, 2), (5, 3)),
        ((4, 2), (3, 1, 2), (5, 2)),
        ((4, 2), (2, 2), (5, 2)),
        ((4,), (3, 4, 2), (5, 2)),
        ((4, 2), (3, 2, 2), (5, 2, 1)),
        ((4, 2), (0, 2, 2), (5, 2)),
        ((0, 2), (3, 2, 2), (5, 2)),
        ((4, 0), (3, 0, 2), (5, 2)),
    ],
)
def test_parts_that_do_not_fit_are_refused(shapes):
    """The message holds the three shapes found."""
    with pytest.raises(ShapeError) as caught:
        Tucker2(*(np.ones(shape) for shape in shapes))
    assert all(str(shape) in str(caught.value) for shape in shapes)


@given(case=factors(), data=st.data())
def test_error_is_the_dense_error(case, data):
    """error_norms2 is ‖ΔW_k − U G_k Vᵀ‖² for factors and cores that are no fit at all."""
    rng = np.random.default_rng(data.draw(seeds))
    slices, m, n = case.shape
    p, q = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    parts = (
        rng.standard_normal((m, p)),
        rng.standard_normal((slices, p, q)),
        rng.standard_normal((n, q)),
    )
    found = error_norms2(case.stack(), Tucker2(*parts))
    expected = np.sum((case.dense() - oracles.reconstruct(*parts)) ** 2, axis=(1, 2))
    scale = np.sum(case.dense() ** 2, axis=(1, 2)) + expected
    assert found.shape == expected.shape
    assert np.all(np.abs(found - expected) <= 1e-11 * scale)


@given(case=fits(NONZERO), seed=seeds)
def test_error_does_not_depend_on_the_basis(case, seed):
    """(U S, S⁻¹ G_k T⁻ᵀ, V T) is the same decomposition and has the same error."""
    case, (p, q) = case
    rng = np.random.default_rng(seed)
    left, right = orthogonal(rng, case.shape[1], p), orthogonal(rng, case.shape[2], q)
    stack = case.stack()
    core = stack.core(left, right)
    turn, sizes = orthogonal(rng, p), 10.0 ** rng.uniform(-1, 1, p)
    other = Tucker2(left @ turn * sizes, (turn.T @ core) / sizes[:, None], right)
    turn, sizes = orthogonal(rng, q), 10.0 ** rng.uniform(-1, 1, q)
    other = Tucker2(other.left, (other.core @ turn) / sizes, right @ turn * sizes)
    found, expected = error_norms2(stack, other), error_norms2(stack, Tucker2(left, core, right))
    assert np.all(np.abs(found - expected) <= 1e-12 * stack.norms2())


@given(case=fits(NONZERO), seed=seeds)
def test_a_stack_that_is_a_tucker2_has_no_error(case, seed):
    """The error of a decomposition against its own slices is at rounding, not at its root."""
    case, (p, q) = case
    rng = np.random.default_rng(seed)
    slices, m, n = case.shape
    own = Tucker2(
        rng.standard_normal((m, p)),
        rng.standard_normal((slices, p, q)),
        rng.standard_normal((n, q)),
    )
    stack = own.to_low_rank()
    scale = np.linalg.norm(own.left) ** 2 * np.linalg.norm(own.right) ** 2
    scale = scale * np.sum(own.core**2, axis=(1, 2))
    assert np.all(np.sqrt(error_norms2(stack, own)) <= 1e-14 * np.sqrt(scale))


@pytest.mark.parametrize("tiny", [1e-6, 1e-9, 1e-12])
def test_a_tiny_error_of_the_core_is_seen(xp, tiny):
    """A core that is off by 1e-12 of the slice gives that error, not one lost in cancellation."""
    rng = np.random.default_rng(5)
    left, right = orthogonal(rng, 8, 2), orthogonal(rng, 6, 2)
    case = make("generic", 7, 2, 2, [2, 2]).turned(left, right)
    core = case.stack().core(left, right)
    off = core.copy()
    off[1, 0, 1] += tiny
    stack = xp.stack(case)
    found = error_norms2(stack, Tucker2(xp.array(left), xp.array(off), xp.array(right)))
    errors = np.sqrt(xp.numpy(found))
    assert errors[0] < 1e-14
    assert errors[1] == pytest.approx(tiny, rel=1e-2)


@pytest.mark.parametrize("kept", ["float32", "float64"])
@pytest.mark.parametrize("came", ["float32", "float64"])
def test_error_of_what_is_stored(xp, came, kept):
    """A stack of one type against factors stored in another: the error of the stored numbers."""
    case = make("generic", 9, 6, 5, [2, 2, 2])
    rng = np.random.default_rng(6)
    left, right = orthogonal(rng, 6, 3), orthogonal(rng, 5, 2)
    parts = left, case.stack().core(left, right), right
    stored = Tucker2(*(xp.array(x, kept) for x in parts))
    found = xp.numpy(error_norms2(xp.stack(case, came), stored))
    numbers = (xp.numpy(x) for x in (stored.left, stored.core, stored.right))
    expected = np.sum((case.dense() - oracles.reconstruct(*numbers)) ** 2, axis=(1, 2))
    assert found == pytest.approx(expected, rel=1e-6)


def test_error_of_storing_in_single_is_not_hidden_by_more_of_it(xp):
    """All that float32 storage costs a full-rank decomposition is its own rounding error."""
    case = make("generic", 10, 6, 5, [3, 3, 3])
    rng = np.random.default_rng(7)
    left, right = orthogonal(rng, 6), orthogonal(rng, 5)
    parts = left, case.stack().core(left, right), right
    stored = Tucker2(*(xp.array(x, "float32") for x in parts))
    found = np.sqrt(xp.numpy(error_norms2(xp.stack(case), stored)))
    kept = (xp.numpy(x) for x in (stored.left, stored.core, stored.right))
    lost = case.dense() - oracles.reconstruct(*kept)
    assert found == pytest.approx(np.sqrt(np.sum(lost**2, axis=(1, 2))), rel=1e-2)


def test_error_against_a_stack_of_another_shape_is_refused():
    """The message holds both shapes."""
    stack = make("generic", 0, 4, 5, [2, 2]).stack()
    other = Tucker2(np.ones((4, 1)), np.ones((2, 1, 1)), np.ones((6, 1)))
    with pytest.raises(ShapeError, match=r"\(2, 4, 5\).*\(2, 4, 6\)"):
        error_norms2(stack, other)
