"""LowRankStack: every product agrees with the dense slices it stands for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import DataError, LowRankStack, ShapeError
from tests import oracles
from tests.strategies import Factors, factors, fits, make, orthogonal, seeds


def gram(factor):
    """F Fᵀ."""
    return factor @ factor.T


def close(found, expected, scale, eps=1e-12):
    """Assert that two arrays agree to ``eps`` of ``scale``, shapes included."""
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected)) <= eps * scale


def frames(rng: np.random.Generator, case: Factors, rank: tuple[int, int]):
    """Random orthonormal U (m × p) and V (n × q)."""
    _, m, n = case.shape
    return orthogonal(rng, m, rank[0]), orthogonal(rng, n, rank[1])


@given(case=factors())
def test_shape_and_ranks_are_those_of_the_factors(case):
    """shape is (K, m, n), ranks the r_k, max_rank (min(m, ρ), min(n, ρ))."""
    stack = case.stack()
    assert stack.shape == case.shape
    assert stack.ranks == case.ranks
    assert stack.max_rank == case.max_rank


@given(case=factors())
def test_the_slices_are_the_products(case):
    """to_dense and factors(k) give B_k A_k, whatever r_k."""
    stack, dense = case.stack(), case.dense()
    close(stack.to_dense(), dense, 1 + np.abs(dense).max())
    for k, rank in enumerate(case.ranks):
        b, a = stack.factors(k)
        assert b.shape[1] == a.shape[0] == rank
        close(b @ a, dense[k], 1 + np.abs(dense).max())


@given(case=factors())
def test_norms2_are_the_dense_norms(case):
    """Each slice's squared norm is right relative to that slice, however small beside others."""
    found, expected = case.stack().norms2(), np.sum(case.dense() ** 2, axis=(1, 2))
    assert found.shape == expected.shape
    assert np.all(np.abs(found - expected) <= 1e-12 * expected)


@given(case=fits(), seed=seeds)
def test_factors_have_the_grams_of_the_unfoldings(case, seed):
    """left_factor and right_factor: F Fᵀ = Σ_k ΔW_k V Vᵀ ΔW_kᵀ, its mirror, with and without V."""
    case, rank = case
    stack, dense = case.stack(), case.dense()
    left, right = frames(np.random.default_rng(seed), case, rank)
    naive = oracles.DenseSlices(dense)
    scale = float(np.sum(dense**2))
    close(gram(stack.left_factor()), gram(naive.left_factor()), scale)
    close(gram(stack.right_factor()), gram(naive.right_factor()), scale)
    close(gram(stack.left_factor(right)), gram(naive.left_factor(right)), scale)
    close(gram(stack.right_factor(left)), gram(naive.right_factor(left)), scale)


@given(case=fits(), seed=seeds)
def test_factors_are_narrow(case, seed):
    """No factor is wider than Σ_k min(r_k, columns): the unfoldings are never built."""
    case, rank = case
    stack = case.stack()
    _, m, n = case.shape
    left, right = frames(np.random.default_rng(seed), case, rank)
    for factor, side, width in (
        (stack.left_factor(), m, n),
        (stack.right_factor(), n, m),
        (stack.left_factor(right), m, rank[1]),
        (stack.right_factor(left), n, rank[0]),
    ):
        assert factor.shape[0] == side
        assert factor.shape[1] <= sum(min(r, width) for r in case.ranks)


@given(case=fits(), seed=seeds)
def test_core_and_residual_are_the_dense_ones(case, seed):
    """Cores are Uᵀ ΔW_k V; residuals ‖ΔW_k − U Uᵀ ΔW_k V Vᵀ‖² of each slice."""
    case, rank = case
    stack, dense = case.stack(), case.dense()
    left, right = frames(np.random.default_rng(seed), case, rank)
    naive = oracles.DenseSlices(dense)
    close(stack.core(left, right), naive.core(left, right), 1 + np.abs(dense).max())
    norms2 = naive.norms2()
    found, expected = stack.residual_norms2(left, right), naive.residual_norms2(left, right)
    assert found.shape == expected.shape
    assert np.all(np.abs(found - expected) <= 1e-12 * norms2)


@given(case=fits(), seed=seeds)
def test_norm_splits_into_core_and_residual(case, seed):
    """‖ΔW_k‖² = ‖Uᵀ ΔW_k V‖² + ‖ΔW_k − U Uᵀ ΔW_k V Vᵀ‖² for orthonormal U and V."""
    case, rank = case
    stack = case.stack()
    left, right = frames(np.random.default_rng(seed), case, rank)
    captured = np.sum(stack.core(left, right) ** 2, axis=(1, 2))
    whole = stack.norms2()
    assert np.all(np.abs(captured + stack.residual_norms2(left, right) - whole) <= 1e-12 * whole)


@pytest.mark.parametrize("tiny", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tiny_residual_does_not_drown(xp, tiny, side):
    """What lies outside U or V by 1e-12 of the slice is reported as that, not as rounding."""
    rng = np.random.default_rng(3)
    u, v = orthogonal(rng, 9, 3), orthogonal(rng, 7, 3)
    b, a = u[:, :2].copy(), v[:, :2].T.copy()
    if side == "left":
        b[:, 1] += tiny * u[:, 2]
    else:
        a[1, :] += tiny * v[:, 2]
    stack = xp.stack(Factors((b,), (a,)))
    found = xp.numpy(stack.residual_norms2(xp.array(u[:, :2]), xp.array(v[:, :2])))
    assert np.sqrt(found[0]) == pytest.approx(tiny, rel=1e-3)


@given(case=factors())
def test_reduce_is_an_equal_problem(case):
    """ΔW_k = Q_B · small_k · Q_Aᵀ with orthonormal bases of min(m, ρ) and min(n, ρ) columns."""
    stack, dense = case.stack(), case.dense()
    basis_left, small, basis_right = stack.reduce()
    p, q = case.max_rank
    assert basis_left.shape == (case.shape[1], p)
    assert basis_right.shape == (case.shape[2], q)
    assert small.shape == (case.shape[0], p, q)
    close(gram(basis_left.T), np.eye(p), 1)
    close(gram(basis_right.T), np.eye(q), 1)
    rebuilt = oracles.reconstruct(basis_left, small.to_dense(), basis_right)
    for found, expected in zip(rebuilt, dense, strict=True):
        close(found, expected, np.linalg.norm(expected), 1e-13 * 10)


@given(case=factors(), seed=seeds)
def test_only_the_products_have_meaning(case, seed):
    """(B_k S, S⁻¹ A_k) gives the same norms, Grams and slices."""
    rng = np.random.default_rng(seed)
    one, other = case.stack(), case.gauged(rng).stack()
    dense = case.dense()
    scale = sum(np.linalg.norm(b) * np.linalg.norm(a) for b, a in zip(case.B, case.A, strict=True))
    close(other.to_dense(), dense, 1e3 * scale)
    close(other.norms2(), one.norms2(), 1e3 * scale**2)
    close(gram(other.left_factor()), gram(one.left_factor()), 1e3 * scale**2)
    close(gram(other.right_factor()), gram(one.right_factor()), 1e3 * scale**2)


@given(case=factors(), other=factors(max_slices=1), data=st.data())
def test_difference_is_slice_wise(case, other, data):
    """a − b has the slices ΔW_k − ΔW'_k at ranks r_k + r'_k; a − a is zero to rounding."""
    slices, m, n = case.shape
    other = make("generic", data.draw(seeds), m, n, list(other.ranks) * slices)
    found = case.stack() - other.stack()
    assert found.ranks == tuple(a + b for a, b in zip(case.ranks, other.ranks, strict=True))
    expected = case.dense() - other.dense()
    close(found.to_dense(), expected, 1 + np.abs(expected).max() + np.abs(case.dense()).max())
    scales = [np.linalg.norm(b) * np.linalg.norm(a) for b, a in zip(case.B, case.A, strict=True)]
    nothing = (case.stack() - case.stack()).norms2()
    assert np.all(np.sqrt(nothing) <= 1e-14 * np.array(scales))


def test_difference_of_unlike_stacks_is_refused():
    """Stacks of unlike K, m or n have no difference."""
    stack = make("generic", 0, 4, 5, [2, 2]).stack()
    for m, n, ranks in ((4, 5, [2]), (3, 5, [2, 2]), (4, 6, [2, 2])):
        with pytest.raises(ShapeError, match=r"\(2, 4, 5\)"):
            stack - make("generic", 0, m, n, ranks).stack()


def test_a_stack_of_equal_ranks_may_be_one_array(xp):
    """B as K × m × r and A as K × r × n mean the same as lists of slices."""
    case = make("generic", 5, 6, 4, [2, 2, 2])
    one = LowRankStack(xp.array(np.stack(case.B)), xp.array(np.stack(case.A)))
    assert one.shape == case.shape
    assert one.ranks == case.ranks
    close(xp.numpy(one.to_dense()), case.dense(), 10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_stay_in_their_library(xp, dtype):
    """All products are arrays of the library that came in, right to its precision."""
    case = make("generic", 1, 6, 5, [1, 3, 2])
    rng = np.random.default_rng(0)
    left, right = frames(rng, case, (3, 2))
    stack, dense = xp.stack(case, dtype), oracles.DenseSlices(case.dense())
    u, v = xp.array(left, dtype), xp.array(right, dtype)
    eps = 1e-5 if dtype == "float32" else 1e-12
    pairs = (
        (stack.norms2(), dense.norms2()),
        (stack.core(u, v), dense.core(left, right)),
        (stack.residual_norms2(u, v), dense.residual_norms2(left, right)),
        (stack.to_dense(), dense.to_dense()),
    )
    for found, expected in pairs:
        assert xp.owns(found)
        close(xp.numpy(found), expected, np.abs(expected).max(), eps)
    grams = (
        (stack.left_factor(), dense.left_factor()),
        (stack.right_factor(), dense.right_factor()),
        (stack.left_factor(v), dense.left_factor(right)),
        (stack.right_factor(u), dense.right_factor(left)),
    )
    for found, expected in grams:
        assert xp.owns(found)
        close(gram(xp.numpy(found)), gram(expected), np.abs(gram(expected)).max(), eps)
    basis_left, small, basis_right = stack.reduce()
    assert xp.owns(basis_left)
    assert xp.owns(basis_right)
    rebuilt = oracles.reconstruct(
        xp.numpy(basis_left), xp.numpy(small.to_dense()), xp.numpy(basis_right)
    )
    close(rebuilt, case.dense(), np.abs(case.dense()).max(), eps)


def test_reduce_accumulates_in_float64(xp):
    """The small problem of a float32 stack is solved in float64 where the library has it."""
    _, small, _ = xp.stack(make("generic", 2, 6, 5, [2, 2]), "float32").reduce()
    assert small.dtype == xp.dtype("float64")


def test_half_precision_sums_in_single(xp):
    """Squared norms beyond float16's 65504 are finite: sums are taken in float32 at the least."""
    if not hasattr(xp.dtypes, "float16"):
        pytest.skip("the library has no float16")
    big = Factors((np.full((8, 1), 16.0),), (np.full((1, 8), 16.0),))
    stack = xp.stack(big, "float16")
    assert float(stack.norms2()[0]) == pytest.approx(64 * 256.0**2, rel=1e-3)


@pytest.mark.parametrize(("dtype", "scale"), [("float64", 1e30), ("float64", 1e-30)])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_norms_at_the_ends_of_float64(xp, dtype, scale, side):
    """Norms and residuals scale along at 1e±30 of either factor."""
    case = make("generic", 8, 5, 6, [2, 3])
    left, right = frames(np.random.default_rng(1), case, (2, 2))
    outer = (scale if side != "right" else 1.0, scale if side != "left" else 1.0)
    stack = xp.stack(case.scaled(*outer), dtype)
    whole = (outer[0] * outer[1]) ** 2
    naive = oracles.DenseSlices(case.dense())
    found = xp.numpy(stack.norms2()) / whole
    assert found == pytest.approx(naive.norms2(), rel=1e-12)
    found = xp.numpy(stack.residual_norms2(xp.array(left), xp.array(right))) / whole
    assert found == pytest.approx(naive.residual_norms2(left, right), rel=1e-12)


@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_norms_at_the_ends_of_float32(xp, scale):
    """Squared norms of a float32 stack at 1e±15, beyond float32 themselves for both factors."""
    case = make("generic", 8, 5, 6, [2, 3])
    left, right = frames(np.random.default_rng(1), case, (2, 2))
    stack = xp.stack(case.scaled(scale, scale), "float32")
    naive = oracles.DenseSlices(case.dense())
    found = xp.numpy(stack.norms2()) / scale**4
    assert found == pytest.approx(naive.norms2(), rel=1e-5)
    found = stack.residual_norms2(xp.array(left, "float32"), xp.array(right, "float32"))
    expected = naive.residual_norms2(left, right)
    assert xp.numpy(found) / scale**4 == pytest.approx(expected, rel=1e-5)


def test_norms_of_a_tall_slice(xp):
    """Norms of a slice too tall to be widened at once: all of its rows count, the last too."""
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((9001, 64)), rng.standard_normal((64, 65))
    b[-1] *= 1e3
    stack = xp.stack(Factors((b,), (a,)), "float32")
    expected = float(np.sum((b @ a) ** 2))
    assert float(stack.norms2()[0]) == pytest.approx(expected, rel=1e-4)
    left, right = np.eye(9001, 1), np.eye(65, 1)
    found = stack.residual_norms2(xp.array(left, "float32"), xp.array(right, "float32"))
    kept = float(b[0] @ a[:, 0]) ** 2
    assert float(found[0]) == pytest.approx(expected - kept, rel=1e-4)


def test_the_stack_keeps_its_own_copy():
    """Changing the caller's arrays afterwards does not change the stack."""
    case = make("generic", 4, 5, 4, [2, 2])
    b, a = [x.copy() for x in case.B], [x.copy() for x in case.A]
    stack = LowRankStack(b, a)
    for x in (*b, *a):
        x[:] = 0.0
    close(stack.to_dense(), case.dense(), 10)


def test_inputs_are_not_mutated(xp):
    """No product writes into the arrays that came in."""
    case = make("generic", 6, 5, 4, [2, 3])
    b, a = [xp.array(x) for x in case.B], [xp.array(x) for x in case.A]
    stack = LowRankStack(b, a)
    left, right = frames(np.random.default_rng(2), case, (2, 2))
    u, v = xp.array(left), xp.array(right)
    stack.norms2(), stack.left_factor(v), stack.right_factor(u), stack.core(u, v)
    stack.residual_norms2(u, v), stack.reduce(), stack.to_dense(), stack - stack
    for now, before in zip((*b, *a, u, v), (*case.B, *case.A, left, right), strict=True):
        assert np.array_equal(xp.numpy(now), before)


def test_products_stay_on_their_device():
    """Arrays of a second device stay there through every product."""
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    case = make("generic", 6, 5, 4, [2, 3])
    left, right = (
        strict.asarray(x, device=device) for x in frames(np.random.default_rng(2), case, (2, 2))
    )
    stack = LowRankStack(
        [strict.asarray(b, device=device) for b in case.B],
        [strict.asarray(a, device=device) for a in case.A],
    )
    basis_left, small, basis_right = stack.reduce()
    products = (
        stack.norms2(),
        stack.left_factor(right),
        stack.right_factor(left),
        stack.core(left, right),
        stack.residual_norms2(left, right),
        stack.to_dense(),
        basis_left,
        small.to_dense(),
        basis_right,
    )
    assert [x.device for x in products] == [device] * len(products)


@pytest.mark.parametrize("entries", [1, 40, 10**6])
def test_batches_change_nothing(entries, monkeypatch):
    """Slices one by one or many at once: the same products, ragged ranks included."""
    case = make("generic", 3, 9, 7, [2, 2, 2, 1, 3, 3, 2])
    monkeypatch.setattr("lotrtensor.core.stacks.batches.ENTRIES", entries)
    stack, dense = case.stack(), case.dense()
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((s, 4)))[0] for s in (9, 7))
    core = u.T @ dense @ v
    assert stack.core(u, v) == pytest.approx(core, abs=1e-12)
    assert stack.norms2() == pytest.approx(np.sum(dense**2, axis=(1, 2)), rel=1e-12)
    lost = np.sum((dense - u @ core @ v.T) ** 2, axis=(1, 2))
    assert stack.residual_norms2(u, v) == pytest.approx(lost, rel=1e-10)
    sweep = stack.sweep(u, v)
    assert sweep.left == pytest.approx(sum(x @ v @ (x @ v).T @ u for x in dense), abs=1e-10)
    assert sweep.right == pytest.approx(sum(x.T @ u @ (x.T @ u).T @ v for x in dense), abs=1e-10)
    for factor, gram in (
        (stack.left_factor(v), sum(x @ v @ v.T @ x.T for x in dense)),
        (stack.right_factor(u), sum(x.T @ u @ u.T @ x for x in dense)),
        (stack.left_factor(), sum(x @ x.T for x in dense)),
    ):
        assert factor @ factor.T == pytest.approx(gram, abs=1e-10)


@given(fit=fits(), seed=seeds)
def test_a_stack_of_constants_is_the_same_without_copies(fit, seed):
    """Whatever is asked for first: products, single slices, parts."""
    (case, rank), copied = fit, fit[0].stack()
    held = LowRankStack.of_constants(case.B, case.A)
    assert all(
        np.shares_memory(*pair)
        for pair in zip(held.factors(0), (case.B[0], case.A[0]), strict=True)
    )
    assert (held.shape, held.ranks, held.max_rank) == (copied.shape, copied.ranks, copied.max_rank)
    assert held.magnitude() == copied.magnitude()
    left, right = frames(np.random.default_rng(seed), case, rank)
    asks = (
        lambda stack: stack.take([0]).to_dense(),
        lambda stack: stack.scaled([2.0] * stack.shape[0]).to_dense(),
        lambda stack: (stack + stack).to_dense(),
        lambda stack: stack.norms2(),
        lambda stack: stack.left_factor(),
        lambda stack: stack.right_factor(left),
        lambda stack: stack.core(left, right),
        lambda stack: stack.residual_norms2(left, right),
        lambda stack: stack.sweep(left, right).left,
        lambda stack: stack.reduce()[1].to_dense(),
        lambda stack: stack.to_dense(),
    )
    for ask in asks:
        fresh = LowRankStack.of_constants(case.B, case.A)
        np.testing.assert_array_equal(ask(fresh), ask(copied))
        np.testing.assert_array_equal(ask(held), ask(copied))


@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_a_stack_of_constants_far_from_one_is_held_in_float64(scale):
    b, a = np.full((4, 1), scale, np.float32), np.full((1, 5), scale, np.float32)
    stack = LowRankStack.of_constants([b], [a])
    assert stack.factors(0)[0].dtype == np.float64
    np.testing.assert_allclose(stack.norms2(), [20 * float(b[0, 0]) ** 2 * float(a[0, 0]) ** 2])


def test_a_stack_of_constants_refuses_what_is_no_number():
    b = np.ones((4, 1))
    b[2] = np.nan
    with pytest.raises(DataError, match="B of slice 1"):
        LowRankStack.of_constants([np.ones((4, 1)), b], [np.ones((1, 5))] * 2)
