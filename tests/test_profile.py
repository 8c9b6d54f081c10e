"""One decomposition prices every size: profiles, overlaps and walks against naive ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given

from lotrtensor import subspace_overlap
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import reduce_between, reduce_stack
from lotrtensor.core.ranks.allocation import allocate_parameters, allocation_walk
from lotrtensor.core.slice_svd import slice_svds
from lotrtensor.core.subspaces import chance, leading_subspaces, overlaps
from tests import oracles
from tests.strategies import NONZERO, UNTIED, factors, make, noisy


def profile(stack, rank=None, **options):
    """A stack, reduced."""
    return ReducedStack(stack, reduce_stack(stack, rank, **options))


def profile_between(stack, left, right):
    """The same between given spaces."""
    return ReducedStack(stack, reduce_between(stack, left, right))


def errors(found, pair):
    """Relative error of the truncated HOSVD, and the bound."""
    error, bound = found.truncated(pair)
    return error.relative, bound.relative


@given(case=factors(UNTIED))
def test_every_pair_of_ranks_has_the_dense_error(case):
    """Not only the efficient ones, and slice by slice."""
    found = profile(case.stack())
    a, b = found.truncated2.shape
    pairs = [(p, q) for p in range(1, a + 1) for q in range(1, b + 1)]
    by_slice = found.slices_truncated2(pairs)
    assert by_slice.shape == (len(pairs), case.shape[0])
    for pair, row in zip(pairs, by_slice, strict=True):
        error, bound = errors(found, pair)
        assert error == pytest.approx(oracles.hosvd_error(case.dense(), pair), rel=1e-5, abs=1e-10)
        assert bound == pytest.approx(oracles.lower_bound(case.dense(), pair), rel=1e-6, abs=1e-11)
        assert np.sum(row) == pytest.approx(found.truncated(pair)[0].lost2, rel=1e-9, abs=1e-18)


@given(case=factors(NONZERO))
def test_slice_errors_are_those_of_the_projected_slices(case):
    """‖ΔW_k − UUᵀ ΔW_k VVᵀ‖² with the leading directions of the profile."""
    found = profile(case.stack())
    pair = found.nearest((2, 2))
    left, right = (x[:, :r] for x, r in zip(found.directions(2), pair, strict=True))
    (row,) = found.slices_truncated2([pair])
    for error2, dense in zip(row, case.dense(), strict=True):
        lost = dense - left @ (left.T @ dense @ right) @ right.T
        assert error2 == pytest.approx(np.sum(lost**2), rel=1e-6, abs=1e-12 * found.norm2)


def test_a_part_is_reduced_from_the_small_problem_of_all():
    """Errors, prices and factors are those of its own slices, decomposed anew."""
    stack = make("generic", 0, 30, 20, [2, 3, 1, 2]).stack()
    members = [2, 0]
    part, anew = profile(stack).part(members, (99, 99)), profile(stack.take(members))
    assert part.parameters((2, 3)) == 2 * 30 + 3 * 20 + 2 * 6
    assert errors(part, (2, 3)) == pytest.approx(errors(anew, (2, 3)), rel=1e-9)
    assert np.array_equal(part.curve.parameters, anew.curve.parameters)
    found = part.tucker2((2, 2), np.float64).to_dense()
    dense = stack.to_dense()[members]
    assert part.error2((2, 2)) == pytest.approx(np.sum((dense - found) ** 2), rel=1e-9)
    assert found == pytest.approx(anew.tucker2((2, 2), np.float64).to_dense(), abs=1e-6)


def test_the_matrix_free_profile_agrees_where_it_looks():
    """And counts what it does not see as error, in every slice."""
    stack = noisy(1, 40, 35, 4, (3, 3), 0.05).stack()
    exact, seen = profile(stack), profile(stack, (6, 6), kind="matrix-free")
    assert exact.exact
    assert not seen.exact
    for pair in ((1, 1), (2, 3), (3, 3)):
        assert errors(seen, pair)[0] == pytest.approx(errors(exact, pair)[0], rel=1e-3)
        assert errors(seen, pair)[1] <= errors(exact, pair)[1] * (1 + 1e-9)
        total = seen.slices_truncated2([pair]).sum()
        assert total == pytest.approx(seen.truncated(pair)[0].lost2, rel=1e-6)


def test_between_given_spaces_the_rest_is_error():
    """The error is one that factors reach, and the lower bound is valid."""
    stack = make("decaying", 0, 20, 18, [3] * 4).stack()
    exact = profile(stack)
    found = profile_between(stack, *exact.directions(5))
    assert not found.exact
    assert found.norm2 == pytest.approx(exact.norm2)
    for pair in ((1, 1), (3, 4), (5, 5)):
        assert errors(found, pair)[0] >= errors(exact, pair)[1] * (1 - 1e-9)
        assert errors(found, pair)[1] <= errors(exact, pair)[1] * (1 + 1e-9)
    # The HOSVD's own spaces lose exactly what its truncation there loses.
    assert errors(found, (5, 5))[0] == pytest.approx(errors(exact, (5, 5))[0], rel=1e-9)
    whole = profile_between(stack, *exact.directions(99))
    assert errors(whole, (3, 4)) == pytest.approx(errors(exact, (3, 4)), rel=1e-9)


def test_slices_of_zeros_have_a_profile():
    """No NaN, no error."""
    found = profile(make("all_zero", 0, 5, 4, [2, 2]).stack())
    assert isinstance(found, ReducedStack)
    assert errors(found, (1, 1)) == (0.0, 0.0)
    assert not found.slices_truncated2([(1, 1)]).any()


@pytest.mark.parametrize("seed", range(4))
def test_the_walk_is_the_budget_of_its_sizes(seed):
    """Every stop is what its own size buys, from the smallest to the largest."""
    curves = [
        profile(make(kind, seed, 7, 6, [2, 3, 1]).stack()).curve for kind in ("decaying", "generic")
    ]
    walk = allocation_walk(curves)
    assert walk[0] == [0, 0]
    assert walk[-1] == [len(curve.parameters) - 1 for curve in curves]
    assert len(walk) > 4
    totals = []
    for chosen in walk:
        size = sum(int(c.parameters[i]) for c, i in zip(curves, chosen, strict=True))
        bought = allocate_parameters(curves, size)
        errors = [
            sum(float(c.error2[i]) for c, i in zip(curves, at, strict=True))
            for at in (chosen, bought)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-9, abs=1e-15)
        totals.append((size, errors[0]))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(totals))


# ---------------------------------------------------------------- overlaps


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def test_overlaps_are_those_of_principal_angles():
    """All pairs at once, unlike dimensions among them."""
    rng = np.random.default_rng(0)
    bases = [orthonormal(rng, 12, d) for d in (1, 3, 5, 12)]
    found = overlaps(bases)
    assert found == pytest.approx(found.T)
    for (i, a), (j, b) in itertools.product(enumerate(bases), repeat=2):
        assert found[i, j] == pytest.approx(subspace_overlap(a, b), rel=1e-9)
    assert np.diag(found) == pytest.approx(1.0)


def test_an_empty_space_overlaps_with_nothing():
    """NaN, where 0 would be a claim."""
    found = overlaps([np.eye(4)[:, :2], np.zeros((4, 0))])
    assert found[0, 0] == 1.0
    assert np.isnan(found[0, 1])
    assert np.isnan(found[1, 1])


def test_chance_is_what_random_spaces_show():
    """On average over many draws."""
    rng = np.random.default_rng(1)
    dims = (2, 3, 5)
    seen = np.mean(
        [
            overlaps([orthonormal(rng, 40, d) for d in dims])[~np.eye(3, dtype=bool)]
            for _ in range(200)
        ]
    )
    expected = chance([np.zeros((40, d)) for d in dims])
    assert expected == pytest.approx((3 + 5 + 5) / 3 / 40)
    assert seen == pytest.approx(expected, rel=0.05)
    assert chance([np.zeros((40, 2))]) == 0.0


@given(case=factors(NONZERO))
def test_leading_directions_hold_their_share_and_do_not_depend_on_the_gauge(case):
    """The fewest that hold 90 %; the same spaces from (B S, S⁻¹ A)."""
    rng = np.random.default_rng(3)
    turned = []
    for k in range(case.shape[0]):
        b, a = case.stack().factors(k)
        mix = rng.standard_normal((b.shape[1],) * 2) + 3 * np.eye(b.shape[1])
        turned.append((b @ mix, np.linalg.solve(mix, a)))
    svds = slice_svds(case.stack())
    again = slice_svds(type(case.stack())([b for b, _ in turned], [a for _, a in turned]))
    for svd, other, dense in zip(svds, again, case.dense(), strict=True):
        space = leading_subspaces(svd)
        total = np.sum(dense**2)
        if total == 0:
            assert space.left.shape[1] == 0
            continue
        held = np.sum((space.left.T @ dense) ** 2)
        assert held >= 0.9 * total * (1 - 1e-9)
        values = np.linalg.svd(dense, compute_uv=False)
        d = space.left.shape[1]
        assert np.sum(values[: d - 1] ** 2) < 0.9 * total
        gap = values[d - 1] - (values[d] if d < len(values) else 0.0)
        near = abs(np.cumsum(values**2) / total - 0.9).min() < 1e-6
        if gap > 1e-3 * values[0] and not near:
            for side in (0, 1):
                found = overlaps([space[side], leading_subspaces(other)[side]])
                assert found[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_a_zero_slice_has_no_direction():
    case = make("zero_slice", 0, 6, 5, [2, 2, 2, 2])
    zero = [not dense.any() for dense in case.dense()]
    found = [leading_subspaces(svd) for svd in slice_svds(case.stack())]
    assert any(zero)
    assert [space.left.shape[1] == space.right.shape[1] == 0 for space in found] == zero
