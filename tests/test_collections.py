"""What adapters of a collection have to do with one another, against dense updates."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lotrtensor as lt
from adapters_fixtures import lotr
from lotrtensor.core import similarity
from pack_fixtures import dense, family, strangers


def regauged(adapter, seed=0):
    """The same updates from other factors, of a higher rank."""
    rng, modules = np.random.default_rng(seed), []
    for m in adapter.modules:
        turn = rng.normal(size=(m.rank, m.rank)) + 3 * np.eye(m.rank)
        b = np.hstack([m.B @ turn, np.zeros((m.B.shape[0], 2))])
        a = np.vstack([np.linalg.solve(turn, m.A), rng.normal(size=(2, m.A.shape[1]))])
        modules.append(lt.LoraModule(m.name, b, a))
    return lt.LoraAdapter(tuple(modules), {}, adapter.dtype)


def dense_cosines(adapters):
    flat = []
    names = sorted({m.name for a in adapters.values() for m in a.modules})
    shapes = {m.name: m.shape for a in adapters.values() for m in a.modules}
    for adapter in adapters.values():
        found = dense(adapter.modules)
        parts = [found.get(name, np.zeros(shapes[name])).ravel() for name in names]
        flat.append(np.concatenate(parts))
    rows = np.stack(flat)
    norms = np.linalg.norm(rows, axis=1)
    return rows @ rows.T / np.outer(norms, norms), norms


@pytest.mark.parametrize("columns", [1, 7, 1024])
def test_cosines_and_norms_are_those_of_dense_updates(monkeypatch, columns):
    monkeypatch.setattr(similarity, "COLUMNS", columns)
    adapters = family(3) | {f"other-{i}": a for i, a in enumerate(strangers(2).values())}
    lacking = adapters["user-1"]
    adapters["lacking"] = lt.LoraAdapter(lacking.modules[:2], {}, lacking.dtype)
    found = lt.analyze_collection(adapters)
    cosine, norms = dense_cosines(adapters)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-12)
    np.testing.assert_allclose([row.norm for row in found.rows], norms, rtol=1e-12)
    for i, row in enumerate(found.rows):
        others = np.where(np.arange(len(norms)) == i, -2, cosine[i])
        assert row.nearest == found.names[int(np.argmax(others))]
        assert row.cosine == pytest.approx(float(others.max()), abs=1e-12)


def test_clusters_outliers_and_duplicates():
    first, second = family(3, seed=1, common=0.1), family(2, seed=2, common=0.1)
    adapters = {f"a{i}": a for i, a in enumerate(first.values())}
    adapters |= {f"b{i}": a for i, a in enumerate(second.values())}
    adapters["alone"] = strangers(1, seed=5)["user-0"]
    adapters["again"] = regauged(adapters["b1"])
    found = lt.analyze_collection(adapters)
    clusters = {row.name: row.cluster for row in found.rows}
    assert clusters == {"a0": 1, "a1": 1, "a2": 1, "b0": 2, "b1": 2, "alone": 3, "again": 2}
    assert [row.name for row in found.rows if row.outlier] == ["alone"]
    (pair,) = found.duplicates
    assert (pair.first, pair.second) == ("b1", "again") and pair.distance < 1e-6
    assert {row.cluster for row in lt.analyze_collection(adapters, threshold=0.999).rows} == set(
        range(1, 7)
    )


@given(st.integers(1, 5), st.integers(0, 50), st.sampled_from([1e-8, 1.0, 1e8]))
def test_size_does_not_matter_and_order_neither(count, seed, size):
    adapters = family(count, seed=seed, kinds={"q": (7, 5)}, rank=2)
    scaled = {
        name: lt.LoraAdapter(
            tuple(lt.LoraModule(m.name, m.B.astype(float) * size, m.A) for m in a.modules),
            {}, a.dtype,
        )
        for name, a in reversed(adapters.items())
    }  # fmt: skip
    one, other = lt.analyze_collection(adapters), lt.analyze_collection(scaled)
    np.testing.assert_allclose(one.cosine, other.cosine[::-1, ::-1], atol=1e-9)


def test_an_adapter_of_zeros_is_like_none():
    zero = lt.LoraAdapter(
        (lt.LoraModule("layers.0.query", np.zeros((160, 1)), np.ones((1, 120))),),
        {}, np.dtype("float32"),
    )  # fmt: skip
    found = lt.analyze_collection(family(2) | {"zero": zero})
    assert found.rows[2].norm == 0 and found.rows[2].outlier
    assert not found.cosine[2, :2].any() and np.isfinite(found.cosine).all()


def test_a_pack_on_the_command_line(tmp_path):
    adapters = family(3) | {"stranger": strangers(1, seed=9)["user-0"]}
    lt.pack(adapters, tmp_path / "pack", tolerance=0.1)
    done = lotr("analyze", tmp_path / "pack")
    assert done.code == 0 and "4 adapters in 2 clusters, 1 of them of one adapter" in done.out
    document = json.loads(lotr("analyze", tmp_path / "pack", "--json").out)
    assert [row["name"] for row in document["adapters"]] == list(adapters)
    cosine, _ = dense_cosines(adapters)
    np.testing.assert_allclose(document["cosine"], cosine, atol=0.03)


def test_a_pack_is_analysed_by_itself(tmp_path):
    lt.pack(family(2), tmp_path / "pack", tolerance=0.3)
    for more in ((tmp_path / "pack",), ("-o", tmp_path / "page.html")):
        done = lotr("analyze", tmp_path / "pack", *more)
        assert done.code == 1 and "by itself" in done.err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "arguments", [{"adapters": {}}, {"adapters": []}, {"adapters": family(1), "same": 1.0}]
)
def test_what_is_no_collection(arguments):
    with pytest.raises(lt.OptionError, match="expected"):
        lt.analyze_collection(**arguments)


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_as_many_clusters_as_are_asked_for(size):
    vectors = np.random.default_rng(size).normal(size=(size, 30))
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    for count in range(1, size + 3):
        labels = similarity.average_linkage(vectors @ vectors.T, count=count)
        assert sorted(set(labels.tolist())) == list(range(min(count, size)))
