"""Inner products, norms, similarities and angles against dense NumPy and SciPy."""

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from lotrtensor import (
    DenseStack,
    LowRankStack,
    ShapeError,
    Tucker2,
    cosine_similarity,
    inner,
    norm,
    principal_angles,
    subspace_overlap,
    tucker2,
)
from tests.strategies import EVERYWHERE, NONZERO, STACKS, factors, lazy, make, orthogonal, seeds

everywhere = pytest.mark.parametrize(("xp", "kind"), EVERYWHERE, indirect=["xp"])

CASE = make("generic", 5, 9, 7, [2, 3, 1, 2])
OTHER = make("generic", 6, 9, 7, [1, 2, 3, 2])


def like(case, seed):
    """Other factors of the same K, m and n."""
    slices, m, n = case.shape
    return make("generic", seed, m, n, [1 + k % 3 for k in range(slices)])


def forms(case):
    """The same slices as thin factors, an array, read on demand, and decomposed."""
    return [
        case.stack(),
        DenseStack(case.dense()),
        lazy(case.dense()),
        tucker2(case.stack(), case.max_rank).tucker2,
    ]


# ---------------------------------------------------------------- inner products and norms


@given(case=factors(), seed=seeds)
@settings(max_examples=settings().max_examples // 2)
def test_inner_products_and_norms_are_the_dense_ones(case, seed):
    """Of any two forms of stacks and decompositions."""
    other = like(case, seed)
    a, b = case.dense(), other.dense()
    expected, scale = float(np.sum(a * b)), np.linalg.norm(a) * np.linalg.norm(b)
    for first in forms(case):
        assert norm(first) == pytest.approx(np.linalg.norm(a), rel=1e-12, abs=1e-14)
        for second in forms(other):
            assert inner(first, second) == pytest.approx(expected, abs=1e-12 * scale)
            assert inner(second, first) == pytest.approx(expected, abs=1e-12 * scale)
            similarity = expected / scale if scale else 0.0
            assert cosine_similarity(first, second) == pytest.approx(similarity, abs=1e-12)


@everywhere
def test_every_kind_of_stack(xp, kind):
    """A number comes back, from float32 arrays of every library."""
    a, b = (STACKS[kind](case, lambda x: xp.array(x, "float32")) for case in (CASE, OTHER))
    x, y = CASE.dense(), OTHER.dense()
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    for found, expected, eps in (
        (inner(a, b), np.sum(x * y), 1e-5 * scale),
        (norm(a), np.linalg.norm(x), 1e-5 * np.linalg.norm(x)),
        (cosine_similarity(a, b), np.sum(x * y) / scale, 1e-5),
    ):
        assert type(found) is float
        assert found == pytest.approx(expected, abs=eps)


@given(case=factors(NONZERO), alpha=st.floats(-4, 4), seed=seeds)
def test_the_inner_product_is_bilinear(case, alpha, seed):
    """⟨α a + b, c⟩ = α ⟨a, c⟩ + ⟨b, c⟩; ⟨a, a⟩ = ‖a‖²; Cauchy and Schwarz."""
    a, b, c = case.stack(), like(case, seed).stack(), like(case, seed + 1).stack()
    scale = (norm(a) + norm(b)) * norm(c)
    found = inner(a * alpha + b, c)
    assert found == pytest.approx(alpha * inner(a, c) + inner(b, c), abs=1e-11 * scale)
    assert inner(a, a) == pytest.approx(norm(a) ** 2, rel=1e-12)
    assert abs(inner(a, c)) <= norm(a) * norm(c) * (1 + 1e-12)
    assert norm(a + b) <= (norm(a) + norm(b)) * (1 + 1e-12)


@given(case=factors(NONZERO), seed=seeds)
def test_gauge(case, seed):
    """(B_k S, S⁻¹ A_k) is the same stack, and as similar to itself as can be."""
    other = case.gauged(np.random.default_rng(seed))
    assert cosine_similarity(case.stack(), other.stack()) == pytest.approx(1, abs=1e-9)
    assert cosine_similarity(case.stack(), case.scaled(-3.0).stack()) == pytest.approx(
        -1, abs=1e-12
    )
    third = like(case, seed).stack()
    scale = norm(case.stack()) * norm(third)
    one, two = inner(case.stack(), third), inner(other.stack(), third)
    assert two == pytest.approx(one, abs=1e-9 * scale)


def test_zero_has_no_direction():
    """Similarity 0 with anything, itself included; no NaN."""
    zero = make("all_zero", 0, 9, 7, [2, 3, 1, 2]).stack()
    assert norm(zero) == 0.0
    assert cosine_similarity(zero, CASE.stack()) == 0.0
    assert cosine_similarity(zero, zero) == 0.0


def test_orthogonal_stacks():
    """Rows or columns in orthogonal spaces: 0, to rounding."""
    rng = np.random.default_rng(0)
    u = orthogonal(rng, 9, 4)
    a = LowRankStack([u[:, :2]] * 3, [rng.standard_normal((2, 7)) for _ in range(3)])
    b = LowRankStack([u[:, 2:]] * 3, [rng.standard_normal((2, 7)) for _ in range(3)])
    assert abs(cosine_similarity(a, b)) < 1e-15


def test_single_precision_sums_in_double():
    """Terms that cancel in float32 do not, in the inner product."""
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((40, 500, 4)), rng.standard_normal((40, 4, 400))
    b, a = b.astype(np.float32), a.astype(np.float32)
    exact = np.sum((b.astype(float) @ a.astype(float)) ** 2)
    assert inner(LowRankStack(b, a), LowRankStack(b, a)) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("function", [inner, cosine_similarity])
@pytest.mark.parametrize("shape", [(3, 9, 7), (4, 8, 7), (4, 9, 6)])
def test_unlike_shapes_are_refused(function, shape):
    """Both are named; no broadcasting."""
    other = Tucker2(np.ones((shape[1], 1)), np.ones((shape[0], 1, 1)), np.ones((shape[2], 1)))
    for first, second in ((CASE.stack(), other), (other, DenseStack(CASE.dense()))):
        with pytest.raises(ShapeError) as caught:
            function(first, second)
        assert str(shape) in str(caught.value)
        assert str(CASE.shape) in str(caught.value)


# ---------------------------------------------------------------- principal angles


@given(
    m=st.integers(1, 9),
    p=st.integers(1, 9),
    q=st.integers(1, 9),
    seed=seeds,
)
def test_angles_are_those_of_scipy(m, p, q, seed):
    """For bases of any widths, orthonormal or not, in rising order."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((m, min(p, m))), rng.standard_normal((m, min(q, m)))
    found = principal_angles(a, b)
    assert found.shape == (min(p, q, m),)
    assert np.all(np.diff(found) >= -1e-12)
    assert np.all((found >= 0) & (found <= math.pi / 2 + 1e-15))
    # Where spaces share a direction SciPy has an angle of 1e-8 instead of 0.
    assert found == pytest.approx(scipy.linalg.subspace_angles(a, b)[::-1], abs=1e-7)
    assert principal_angles(b, a) == pytest.approx(found, abs=1e-9)
    expected = np.mean(np.cos(found) ** 2)
    assert subspace_overlap(a, b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("angle", [1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 0.5, math.pi / 4, 1.2])
def test_angles_of_any_size(xp, angle):
    """Small ones from their sines: 1e-9 is not rounded to 0, nor to 1e-8."""
    rng = np.random.default_rng(3)
    frame = orthogonal(rng, 12, 6)
    a = frame[:, :3]
    angles = np.array([angle / 2, angle, min(2 * angle, 1.5)])
    b = a * np.cos(angles) + frame[:, 3:] * np.sin(angles)
    mix = rng.standard_normal((3, 3)) + 3 * np.eye(3)
    found = principal_angles(xp.array(a), xp.array(b @ mix))
    assert xp.owns(found)
    assert xp.numpy(found) == pytest.approx(angles, rel=1e-5, abs=2e-15)


def test_angles_near_a_right_angle():
    """Large ones from their cosines."""
    frame = orthogonal(np.random.default_rng(0), 8, 4)
    for gap in (1e-3, 1e-7, 1e-10):
        b = frame[:, 2:] * np.cos(gap) + frame[:, :2] * np.sin(gap)
        found = principal_angles(frame[:, :2], b)
        assert math.pi / 2 - found == pytest.approx([gap, gap], rel=1e-4)


@given(case=factors(NONZERO), seed=seeds)
def test_angles_depend_on_the_spaces_alone(case, seed):
    """Any other basis of the same space has the same angles; with itself they are 0."""
    rng = np.random.default_rng(seed)
    m = case.shape[1] + 2
    a = rng.standard_normal((m, 2))
    b = rng.standard_normal((m, 1))
    mix = orthogonal(rng, 2) * 10.0 ** rng.uniform(-3, 3, 2) @ orthogonal(rng, 2)
    assert principal_angles(a @ mix, -7 * b) == pytest.approx(principal_angles(a, b), abs=1e-9)
    assert principal_angles(a, a @ mix) == pytest.approx([0, 0], abs=1e-9)
    assert subspace_overlap(a, a @ mix) == pytest.approx(1, abs=1e-12)


def test_overlap_of_known_spaces(xp):
    """1 for one space, 0 for orthogonal ones, the share where some directions are common."""
    eye = np.eye(6)
    cases = [
        (eye[:, :3], eye[:, :3], 1.0),
        (eye[:, :3], eye[:, 3:], 0.0),
        (eye[:, :4], eye[:, 2:6], 0.5),
        (eye, eye[:, :1], 1.0),
    ]
    for a, b, expected in cases:
        found = subspace_overlap(xp.array(a), xp.array(b))
        assert type(found) is float
        assert found == pytest.approx(expected, abs=1e-14)


def test_factors_of_gauged_adapters_span_the_same_spaces():
    """Fits of (B_k S, S⁻¹ A_k) have angles of rounding."""
    case = make("planted", 1, 12, 10, [3, 3, 3])
    one = tucker2(case.stack(), 2).tucker2
    two = tucker2(case.gauged(np.random.default_rng(0)).stack(), 2).tucker2
    for a, b in ((one.left, two.left), (one.right, two.right)):
        assert np.max(principal_angles(a, b)) < 1e-9


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((3, 1)), np.ones((4, 1))),
        (np.ones(3), np.ones((3, 1))),
        (np.ones((2, 3, 1)), np.ones((3, 1))),
    ],
)
def test_bases_of_unlike_spaces_are_refused(a, b):
    """Both shapes are named."""
    for function in (principal_angles, subspace_overlap):
        with pytest.raises(ShapeError) as caught:
            function(a, b)
        assert str(a.shape) in str(caught.value)
        assert str(b.shape) in str(caught.value)


@pytest.mark.parametrize("size", [1e-200, 1e-100, 1.0, 1e100, 1e200])
def test_similarity_does_not_see_size(size):
    """Squares of very large and very small entries stay in range."""
    stack = make("generic", 2, 6, 5, [2, 3]).stack()
    assert cosine_similarity(stack * size, stack) == pytest.approx(1.0, rel=1e-12)
