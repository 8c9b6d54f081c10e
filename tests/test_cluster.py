"""Clusters: never worse than the starts, and the planted partition where there is one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotrtensor import LotrError, LowRankStack, RankError, cluster, tucker2
from tests import oracles
from tests.strategies import (
    KINDS,
    NONZERO,
    STACKS,
    UNTIED,
    Factors,
    factors,
    make,
    orthogonal,
    seeds,
)

pytestmark = pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")


def planted(seed, labels, noise=0.01, m=14, n=12, rank=2):
    """Slices in one subspace pair a cluster, beside noise."""
    rng = np.random.default_rng(seed)
    bases = [(orthogonal(rng, m, rank), orthogonal(rng, n, rank)) for _ in set(labels)]
    lefts, rights = [], []
    for label in labels:
        u, v = bases[label]
        lefts.append(
            np.hstack([u @ rng.standard_normal((rank, rank)), noise * rng.standard_normal((m, 1))])
        )
        rights.append(np.vstack([v.T, rng.standard_normal((1, n))]))
    return Factors(tuple(lefts), tuple(rights), f"planted {labels}")


def rebuilt(found, slices):
    """The dense slices, each from the basis of its own cluster."""
    dense = [None] * slices
    for c, fit in enumerate(found.fits):
        members = np.nonzero(found.labels == c)[0]
        for k, x in zip(members, fit.tucker2.to_dense(), strict=True):
            dense[k] = x
    return np.stack(dense)


def error_of(case, labels, rank):
    """Relative error of fitting each part of a partition on its own."""
    lost2 = 0.0
    for c in set(labels):
        members = [k for k, label in enumerate(labels) if label == c]
        part = Factors(tuple(case.B[k] for k in members), tuple(case.A[k] for k in members))
        p, q = (min(r, most) for r, most in zip((rank, rank), part.max_rank, strict=True))
        fit = tucker2(part.stack(), (p, q))
        lost2 += float(np.sum((part.dense() - fit.tucker2.to_dense()) ** 2))
    return np.sqrt(lost2 / np.sum(case.dense() ** 2))


@given(case=factors(NONZERO), clusters=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_error_is_the_dense_error(case, clusters, seed):
    """Labels, fits and error belong together; parameters are those of all clusters."""
    slices = len(case.B)
    found = cluster(case.stack(), min(clusters, slices), 1, seed=seed, restarts=1)
    assert found.labels.shape == (slices,)
    assert 1 <= len(found.fits) <= min(clusters, slices)
    # Numbered by first appearance, none empty.
    assert list(dict.fromkeys(found.labels.tolist())) == list(range(len(found.fits)))
    truth = oracles.relative_error(case.dense(), rebuilt(found, slices))
    assert found.relative_error == pytest.approx(truth, rel=1e-8, abs=1e-12)
    assert found.parameters == sum(
        x.left.size + x.core.size + x.right.size for x in (f.tucker2 for f in found.fits)
    )


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "all_zero"])
@pytest.mark.parametrize("clusters", [2, 3])
def test_never_worse_than_the_contiguous_start(kind, clusters):
    """With restarts or without; more restarts are never worse than fewer."""
    case = make(kind, 4, 8, 7, [2] * 6)
    start = error_of(case, (np.arange(6) * clusters // 6).tolist(), 2)
    errors = [
        cluster(case.stack(), clusters, 2, restarts=restarts, seed=1).relative_error
        for restarts in (0, 1, 4)
    ]
    assert errors[0] <= start * (1 + 1e-9) + 1e-12
    assert errors[1] <= errors[0]
    assert errors[2] <= errors[1]


@pytest.mark.parametrize("seed", range(4))
def test_rounds_never_raise_the_error(seed):
    """max_rounds=0 is the starts themselves; every round more is no worse."""
    case = make("generic", seed, 10, 9, [2] * 8)
    errors = [
        cluster(case.stack(), 3, 2, restarts=3, seed=seed, max_rounds=rounds).relative_error
        for rounds in (0, 1, 2, 20)
    ]
    assert np.all(np.diff(errors) <= 0)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_partition_is_found(seed):
    """Two families of layers that alternate: no contiguous run separates them."""
    labels = [0, 1, 0, 1, 1, 0, 0, 1, 0, 1]
    case = planted(seed, labels)
    found = cluster(case.stack(), 2, 2)
    assert found.labels.tolist() == labels
    together = tucker2(case.stack(), 2).relative_error
    assert found.relative_error < 0.1
    assert found.relative_error < 0.2 * together
    alternating = error_of(case, labels, 2)
    assert found.relative_error == pytest.approx(alternating, rel=1e-6)


def test_a_contiguous_partition_needs_no_restarts():
    """Early and late layers."""
    labels = [0] * 4 + [1] * 4
    found = cluster(planted(0, labels).stack(), 2, 2, restarts=0)
    assert found.labels.tolist() == labels


def test_three_planted_clusters():
    """Of unlike sizes."""
    labels = [0, 1, 2, 0, 0, 1, 0, 0, 2, 0, 0, 1]
    found = cluster(planted(3, labels, noise=0.01).stack(), 3, 2, restarts=12)
    assert found.labels.tolist() == labels


@given(case=factors(UNTIED))
@settings(max_examples=settings().max_examples // 2)
def test_one_cluster_is_a_plain_fit(case):
    """The same factors, to the bit, and the same error."""
    found = cluster(case.stack(), 1, 1)
    fit = tucker2(case.stack(), 1)
    assert not found.labels.any()
    assert found.relative_error == pytest.approx(fit.relative_error, rel=1e-12)
    for a, b in (
        (found.fits[0].tucker2.left, fit.tucker2.left),
        (found.fits[0].tucker2.core, fit.tucker2.core),
        (found.fits[0].tucker2.right, fit.tucker2.right),
    ):
        assert np.array_equal(a, b)


def test_as_many_clusters_as_slices():
    """Every slice to itself is exact at its own rank, and never better with fewer."""
    case = make("generic", 2, 8, 7, [2] * 5)
    assert cluster(case.stack(), 5, 2, restarts=0).relative_error < 1e-14
    errors = [cluster(case.stack(), c, 2, restarts=6).relative_error for c in range(1, 6)]
    assert errors[-1] < errors[0]


def test_seeds_reproduce():
    """The same seed, the same partition and error."""
    stack = make("generic", 7, 9, 8, [2] * 9).stack()
    one, two = (cluster(stack, 3, 2, seed=5) for _ in range(2))
    assert np.array_equal(one.labels, two.labels)
    assert one.relative_error == two.relative_error


@given(seed=seeds)
@settings(max_examples=settings().max_examples // 5)
def test_order_of_slices(seed):
    """A planted partition is found in any order of the slices."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([0, 0, 0, 1, 1, 1]).tolist()
    case = planted(seed % 1000, labels, noise=0.001)
    found = cluster(case.stack(), 2, 2, restarts=6)
    expected = [label ^ labels[0] for label in labels]
    assert found.labels.tolist() == expected


def test_a_stack_of_zeros_and_a_zero_slice():
    """No NaN; every slice has a cluster."""
    found = cluster(make("all_zero", 0, 5, 4, [1, 1, 1]).stack(), 2, 1)
    assert found.relative_error == 0.0
    case = make("zero_slice", 0, 6, 5, [2, 2, 2, 2])
    found = cluster(case.stack(), 2, 2)
    assert np.isfinite(found.relative_error)
    truth = oracles.relative_error(case.dense(), rebuilt(found, 4))
    assert found.relative_error == pytest.approx(truth, rel=1e-9)


def test_in_any_library(xp):
    """Factors of that library and type; labels are NumPy's."""
    labels = [0, 1, 0, 1]
    for dtype in ("float64", "float32"):
        found = cluster(xp.stack(planted(0, labels), dtype), 2, 2, restarts=2)
        assert found.labels.tolist() == labels
        assert isinstance(found.labels, np.ndarray)
        for fit in found.fits:
            for x in (fit.tucker2.left, fit.tucker2.core, fit.tucker2.right):
                assert xp.owns(x)
                assert x.dtype == xp.dtype(dtype)


def test_half_precision_comes_back():
    """As from a plain fit: the type of the stack."""
    case = planted(0, [0, 1, 0, 1])
    stack = LowRankStack(
        [b.astype(np.float16) for b in case.B], [a.astype(np.float16) for a in case.A]
    )
    assert tucker2(stack, 2).tucker2.core.dtype == np.float16
    for clusters in (1, 2):
        found = cluster(stack, clusters, 2)
        assert {fit.tucker2.core.dtype for fit in found.fits} == {np.dtype(np.float16)}


@pytest.mark.parametrize("clusters", [0, -1, 5, 100])
def test_counts_out_of_range_are_refused(clusters):
    """The number of slices is named."""
    with pytest.raises(RankError, match="between 1 and the 4 slices"):
        cluster(make("generic", 0, 5, 5, [1] * 4).stack(), clusters, 1)


@pytest.mark.parametrize("rank", [0, -1, 6, (1, 9), 1.5])
def test_ranks_out_of_range_are_refused(rank):
    """As by tucker2."""
    with pytest.raises(RankError, match="rank is"):
        cluster(make("generic", 0, 5, 5, [2] * 4).stack(), 2, rank)


@pytest.mark.parametrize("kind", ["dense", "lazy"])
def test_other_stacks_work_or_are_refused(kind):
    """No AttributeError from within."""
    case = planted(0, [0, 1, 0, 1])
    try:
        found = cluster(STACKS[kind](case, np.array), 2, 2)
    except LotrError:
        return
    assert found.labels.tolist() == [0, 1, 0, 1]
