"""Collections in bits, against dense arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from lotrtensor.core.bits.basis import QuantisedBasis, code_slice
from lotrtensor.core.bits.collection import CollectionInBits
from lotrtensor.core.bits.spaces import strata
from lotrtensor.core.bits.stream import entropy_bits
from lotrtensor.core.bits.terms import quantise_slice, slope
from lotrtensor.core.slice_svd import slice_svds
from tests.strategies import Factors, factors, orthogonal, seeds

FLOAT16 = np.dtype("float16")


def dense(basis, coded, step, weight=1.0):
    """The slice as stored, entry by entry from its definition."""
    left, right = (x / np.linalg.norm(x, axis=0) for x in (basis.left * 1.0, basis.right * 1.0))
    mean = basis.step / np.sqrt(basis.slices) * basis.mean
    core = weight * mean + step * coded.codes
    b, a = coded.private.factors()
    return np.einsum("ip,pq,jq->ij", left, core, right) + np.einsum("ir,rj->ij", b, a)


def made(found: Factors, share: float = 0.02):
    """A collection, and a step that is a share of its largest singular value."""
    collection = CollectionInBits(found.stack())
    largest = max(float(values[0]) for values in collection.spectra)
    return collection, share * largest or 1.0


def family(seed, *, slices, mean, common, own, sides=(60, 40), ranks=(3, 3, 2)):
    """Planted mean, shared and private parts of the given norms."""
    rng = np.random.default_rng(seed)
    m, n = sides
    c, p, r = ranks

    def matrix(rank, norm):
        return norm * orthogonal(rng, m, rank) / rank**0.5, orthogonal(rng, n, rank).T

    middle, left, right = matrix(c, mean), orthogonal(rng, m, p), orthogonal(rng, n, p)
    lefts, rights = [], []
    for _ in range(slices):
        core, private = common * rng.standard_normal((p, p)) / p, matrix(r, own)
        lefts.append(np.hstack([middle[0], left @ core, private[0]]))
        rights.append(np.vstack([middle[1], right.T, private[1]]))
    return Factors(tuple(lefts), tuple(rights), "family")


@given(factors(max_side=9, max_slices=5))
def test_what_a_slice_loses_is_what_a_dense_one_says(found):
    collection, step = made(found)
    norm = np.linalg.norm(found.dense()) or 1.0
    for share in collection.shares(step)[1:]:
        basis = collection.quantise(share.ranks, step)
        if basis is None:
            continue
        for k, (b, a) in enumerate(zip(found.B, found.A, strict=True)):
            coded = code_slice(basis, b, a, step, value_dtype=FLOAT16)
            lost2 = np.linalg.norm(found.dense()[k] - dense(basis, coded, step)) ** 2
            assert coded.lost2 == pytest.approx(lost2, rel=1e-6, abs=1e-10 * norm**2)


@given(factors(max_side=9, max_slices=5))
def test_the_best_is_never_dearer_than_nothing_shared(found):
    collection, step = made(found)
    shares, best = collection.shares(step), collection.best(step)
    assert shares[0] == collection.alone(step)
    assert shares[0].ranks == (0, 0)
    assert best.price(step) <= shares[0].price(step)
    spectra = [np.linalg.svd(x, compute_uv=False) for x in found.dense()]
    assert collection.norm2 == pytest.approx(sum(np.sum(s**2) for s in spectra), abs=1e-12)


@given(factors(("generic", "decaying", "planted"), max_side=9, max_slices=4), seeds)
def test_only_products_have_meaning(found, seed):
    """The same slices in another gauge: the same prices, and the same slices as stored."""
    rng = np.random.default_rng(seed)
    first, step = made(found)
    second, _ = made(found.gauged(rng))
    others = {share.ranks: share for share in second.shares(step)}
    for mine in first.shares(step):
        other = others.get(mine.ranks, mine)  # a column may be at the edge of being coded
        assert mine.bits == pytest.approx(other.bits, rel=1e-4, abs=1e-3)
        assert mine.lost2 == pytest.approx(other.lost2, rel=1e-4, abs=1e-9 * first.norm2)
    price = second.best(step).price(step)
    assert first.best(step).price(step) == pytest.approx(price, rel=1e-3, abs=1e-9 * first.norm2)


def test_a_slice_in_another_gauge_is_stored_alike():
    found = family(3, slices=6, mean=1.0, common=0.5, own=0.2)
    collection, step = made(found, 0.01)
    basis = collection.quantise(collection.best(step).ranks, step)
    gauged = found.gauged(np.random.default_rng(0))
    for b, a, b2, a2 in zip(found.B, found.A, gauged.B, gauged.A, strict=True):
        mine, other = (code_slice(basis, x, y, step) for x, y in ((b, a), (b2, a2)))
        assert (mine.codes == other.codes).mean() > 0.99
        assert mine.lost2 == pytest.approx(other.lost2, rel=1e-2)


def total(collection, found, ranks, step):
    """Bits by their entropy, and squared error, of what is made at these ranks."""
    basis = collection.quantise(ranks, step)
    if basis is None:
        terms = [quantise_slice(svd, step).rounded(FLOAT16) for svd in slice_svds(found.stack())]
        bits = sum(map(term_bits, terms))
        stored = [t.factors() for t in terms]
        lost2 = sum(
            np.linalg.norm(x - b @ a) ** 2 for x, (b, a) in zip(found.dense(), stored, strict=True)
        )
        return bits, lost2
    coded = [
        code_slice(basis, b, a, step, value_dtype=FLOAT16)
        for b, a in zip(found.B, found.A, strict=True)
    ]
    bits = entropy_bits([*basis.left.T, *basis.right.T]) + 8 * sum(basis.rank)
    cores = np.stack([c.codes for c in coded])
    for kind in np.unique(basis.kinds):
        bits += entropy_bits([basis.mean[basis.kinds == kind]])
        bits += entropy_bits([cores[:, basis.kinds == kind].ravel()])
    return bits + sum(term_bits(c.private) for c in coded), sum(c.lost2 for c in coded)


def term_bits(terms):
    return entropy_bits([*terms.left.T, *terms.right.T]) + 32 * terms.rank


PARTS = {
    "mean": {"mean": 1.0, "common": 0.02, "own": 0.02},
    "shared": {"mean": 0.05, "common": 1.0, "own": 0.02},
    "mean and private": {"mean": 1.0, "common": 0.02, "own": 0.3},
    "all three": {"mean": 1.0, "common": 0.5, "own": 0.3},
}


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("share", [0.03, 0.008])
def test_sharing_pays_where_something_is_shared(parts, share):
    """Made, not predicted; and the predictions are near."""
    found = family(1, slices=12, sides=(160, 120), **PARTS[parts])
    collection, step = made(found, share)
    best = collection.best(step)
    assert min(best.ranks) > 0
    bits, lost2 = total(collection, found, best.ranks, step)
    alone_bits, alone_lost2 = total(collection, found, (0, 0), step)
    assert lost2 + slope(step) * bits < 0.9 * (alone_lost2 + slope(step) * alone_bits)
    assert best.bits == pytest.approx(bits, rel=0.2)
    # Private terms make some of the rounding of the shared part good, which is not predicted.
    assert 0.9 * lost2 < best.lost2 < 2.0 * lost2


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_strangers_share_nothing(share):
    rng = np.random.default_rng(0)
    found = Factors(
        tuple(rng.standard_normal((90, 3)) for _ in range(8)),
        tuple(rng.standard_normal((3, 70)) for _ in range(8)),
    )
    collection, step = made(found, share)
    assert collection.best(step).ranks == (0, 0)


def test_the_mean_is_the_slice_without_codes():
    found = family(2, slices=9, mean=1.0, common=0.0, own=0.01)
    collection, step = made(found, 0.001)
    ranks = next(s.ranks for s in collection.shares(step) if min(s.ranks) >= 3)
    basis = collection.quantise(ranks, step)
    left, right = basis.factors
    mean = left @ basis.mean_core @ right.T
    expected = found.dense().mean(axis=0)
    assert np.linalg.norm(mean - expected) < 0.02 * np.linalg.norm(expected)


def test_any_library_of_arrays(xp):
    found = family(4, slices=4, mean=1.0, common=0.5, own=0.2, sides=(20, 16))
    mine, step = made(found)
    other = CollectionInBits(xp.stack(found))
    for a, b in zip(mine.shares(step), other.shares(step), strict=True):
        assert a.ranks == b.ranks and a.bits == pytest.approx(b.bits, rel=1e-6)
    basis, second = (c.quantise((3, 3), step) for c in (mine, other))
    np.testing.assert_array_equal(basis.mean.shape, second.mean.shape)
    assert isinstance(second, QuantisedBasis) and isinstance(second.left, np.ndarray)


def test_many_wide_slices_take_the_matrix_free_way(monkeypatch):
    found = family(5, slices=6, mean=1.0, common=0.5, own=0.01, sides=(90, 80))
    exact, step = made(found)
    expected = exact.best(step).price(step)
    monkeypatch.setattr("lotrtensor.core.bits.spaces.MOST_CORES", 6 * 24**2)
    free, _ = made(found)
    assert free.best(step).price(step) == pytest.approx(expected, rel=0.05)
    assert max(free._spaces.reduced.largest) <= 24 < max(exact._spaces.reduced.largest)


@pytest.mark.parametrize(
    "parts",
    [*PARTS.values(), {"mean": 0.0, "common": 1.0, "own": 0.0, "ranks": (1, 30, 1)}],
    ids=str,
)
def test_narrow_spaces_find_what_all_columns_do(parts, monkeypatch):
    found = family(6, slices=60, sides=(160, 120), **parts)
    exact, step = made(found, 0.02)
    expected = exact.best(step)
    assert exact._spaces.exact
    monkeypatch.setattr("lotrtensor.core.bits.spaces.CHEAP_FLOPS", 0)
    monkeypatch.setattr("lotrtensor.core.bits.collection.NARROW", 6)
    narrow, _ = made(found, 0.02)
    best = narrow.best(step)
    assert best.price(step) == pytest.approx(expected.price(step), rel=0.02)
    if max(expected.ranks) < 12:
        assert max(narrow._spaces.reduced.largest) < 60


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_sample_stands_for_all(parts):
    found = family(7, slices=80, sides=(60, 40), **PARTS[parts])
    whole, step = made(found, 0.02)
    some = Factors(found.B[::2], found.A[::2], "sample")
    sample = CollectionInBits(some.stack(), slices=80)
    assert sample.norm2 == pytest.approx(whole.norm2, rel=0.1)
    best, expected = sample.best(step), whole.best(step)
    assert best.bits == pytest.approx(expected.bits, rel=0.1)
    assert best.lost2 == pytest.approx(expected.lost2, rel=0.1)
    pairs = list(zip(found.B, found.A, strict=True))
    mean = sum(b @ a for b, a in pairs) / 80
    distances2 = [np.linalg.norm(b @ a - mean) ** 2 for b, a in pairs]
    np.testing.assert_allclose(sample.distances2(lambda: pairs), distances2, rtol=1e-6)
    ranks = best.ranks
    lost2 = []
    for collection in (whole, sample):
        basis = collection.quantise(ranks, step)
        assert basis.slices == 80
        lost2.append(sum(code_slice(basis, b, a, step).lost2 for b, a in pairs))
    assert lost2[1] < 1.1 * lost2[0]


@pytest.mark.parametrize("sides", [(40, 200), (200, 40), (12, 300)])
@pytest.mark.parametrize("share", [0.05, 0.02])
def test_a_side_narrower_than_the_spaces(sides, share, monkeypatch):
    """Slices that lie in nearly all of a narrow side: there is nothing wider to look at."""
    found = family(8, slices=40, sides=sides, mean=0.0, common=1.0, own=0.05, ranks=(1, 11, 1))
    exact, step = made(found, share)
    monkeypatch.setattr("lotrtensor.core.bits.spaces.MOST_CORES", 40 * 60**2)
    monkeypatch.setattr("lotrtensor.core.bits.spaces.CHEAP_FLOPS", 0)
    monkeypatch.setattr("lotrtensor.core.bits.collection.NARROW", 4)
    narrow, _ = made(found, share)
    assert narrow.best(step).price(step) == pytest.approx(exact.best(step).price(step), rel=0.03)
    assert max(narrow._spaces.reduced.largest) <= 60


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_distances_from_the_mean_in_any_gauge(scale):
    found = family(9, slices=6, mean=1.0, common=0.0, own=0.01)
    lefts = [(scale * b).astype("float32") for b in found.B]
    rights = [(a / scale).astype("float32") for a in found.A]
    collection = CollectionInBits(Factors(tuple(lefts), tuple(rights), "gauge").stack())
    distances2 = collection.distances2(lambda: list(zip(lefts, rights, strict=True)))
    whole = found.dense()
    expected = np.sum((whole - whole.mean(axis=0)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(distances2, expected, rtol=1e-3)


def test_a_part_of_every_part_of_the_whole():
    places = strata(1000, 128)
    assert len(set(places)) == 128 and places == sorted(places)
    assert 0.3 < np.mean(np.array(places) % 2) < 0.7
    assert all(-1 < place - i * 1000 / 128 < 1000 / 128 for i, place in enumerate(places))
    assert strata(128, 128) == list(range(128))
    assert len(set(strata(130, 128))) == 128
