"""convert and compare: what is reported is what was written, against dense NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    DTYPES,
    PREFIX,
    bert_pairs,
    dense,
    dense_lora,
    dense_lotr,
    distance,
    document,
    largest_distance,
    lora_config,
    lora_tensors,
    lotr,
    read_arrays,
    read_config,
    write_adapter,
    write_lora,
)
from lotrtensor import (
    FormatError,
    LoraAdapter,
    LotrAdapter,
    LotrError,
    RankError,
    ShapeError,
    UnsupportedAdapterError,
)
from lotrtensor.adapters.modules import LoraModule


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A LoRA directory of three kinds in twelve layers, rank 3, scale 2."""
    return write_lora(tmp_path_factory.mktemp("convert") / "lora")


def by_group(deltas, config):
    """Deltas of every group of a native config, stacked."""
    return {g["name"]: np.stack([deltas[m] for m in g["modules"]]) for g in config["groups"]}


def tails(tensor, p, q):
    """√max of the discarded energies of the two unfoldings, relative: the dense lower bound."""
    left = np.linalg.svd(np.hstack(list(tensor)), compute_uv=False)
    right = np.linalg.svd(np.vstack(list(tensor)), compute_uv=False)
    lost = max(np.sum(left[p:] ** 2), np.sum(right[q:] ** 2))
    return float(np.sqrt(lost) / np.linalg.norm(tensor))


@pytest.mark.parametrize("group_by", ["type", "shape", "qv=query|value"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_reported_errors_are_those_of_the_file(source, tmp_path, dtype, group_by):
    adapter = lt.convert(lt.load(source), rank=(5, 4), dtype=dtype, group_by=group_by)
    adapter.save(tmp_path / "lotr")
    true, found = dense_lora(source, 2.0), dense_lotr(tmp_path / "lotr")
    assert adapter.relative_error == pytest.approx(distance(found, true), rel=1e-6)
    config = read_config(tmp_path / "lotr")
    true, found = by_group(true, config), by_group(found, config)
    rows = {row.group: row for row in adapter.summary}
    assert rows.keys() == true.keys()
    for name, tensor in true.items():
        error = np.linalg.norm(tensor - found[name]) / np.linalg.norm(tensor)
        assert rows[name].relative_error == pytest.approx(error, rel=1e-6)
        bound = tails(tensor, *rows[name].ranks)
        assert rows[name].lower_bound == pytest.approx(bound, rel=1e-5)
        assert rows[name].lower_bound <= rows[name].relative_error
        # HOOI starts from the HOSVD, which is within √2 of the best.
        assert error <= np.sqrt(2) * bound + 0.01
    whole = [np.linalg.norm(true[n]) * rows[n].lower_bound for n in rows]
    norm = np.linalg.norm([np.linalg.norm(true[n]) for n in rows])
    assert adapter.lower_bound == pytest.approx(np.linalg.norm(whole) / norm, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_storage_error_is_reported_at_full_rank(source, tmp_path, dtype):
    adapter = lt.convert(lt.load(source), rank=(20, 10), dtype=dtype)
    adapter.save(tmp_path / "lotr")
    error = distance(dense_lotr(tmp_path / "lotr"), dense_lora(source, 2.0))
    assert error > 1e-4
    assert adapter.relative_error == pytest.approx(error, rel=1e-3)
    assert adapter.lower_bound < 1e-6


def test_full_rank_is_exact(source, tmp_path):
    adapter = lt.convert(lt.load(source), rank=(20, 10))
    adapter.save(tmp_path / "lotr")
    assert largest_distance(dense_lotr(tmp_path / "lotr"), dense_lora(source, 2.0)) < 2e-6
    assert adapter.relative_error < 1e-6


def test_full_rank_is_exact_in_float64(tmp_path):
    pairs = {
        name: (b.astype(float), a.astype(float)) for name, (b, a) in bert_pairs(layers=11).items()
    }
    lora = write_lora(tmp_path / "lora", pairs, dtype="float64")
    adapter = lt.convert(lt.load(lora), rank=(20, 10))
    assert adapter.dtype == np.float64
    assert adapter.relative_error < 1e-14
    adapter.save(tmp_path / "lotr")
    assert largest_distance(dense_lotr(tmp_path / "lotr"), dense_lora(lora, 2.0)) < 1e-13


@pytest.mark.parametrize("stored", list(DTYPES))
def test_the_adapters_own_type_is_kept(tmp_path, stored):
    lora = write_lora(tmp_path / "lora", bert_pairs(layers=2), dtype=stored)
    lt.convert(lt.load(lora), rank=3).save(tmp_path / "lotr")
    assert {x.dtype for x in read_arrays(tmp_path / "lotr").values()} == {DTYPES[stored]}


@pytest.mark.parametrize("dtype", [*DTYPES, *DTYPES.values()])
def test_another_type_on_request(source, dtype):
    adapter = lt.convert(lt.load(source), rank=2, dtype=dtype)
    expected = DTYPES[str(dtype)]
    assert adapter.dtype == expected
    for group in adapter.groups:
        assert group.left.dtype == group.right.dtype == expected
    assert adapter.bytes == adapter.parameters * expected.itemsize


@pytest.mark.parametrize("dtype", ["int8", "float8_e8m0fnu", "complex64", "f32", "", ">f4"])
def test_unknown_types_are_refused(source, dtype):
    with pytest.raises(lt.OptionError, match="float32, float16"):
        lt.convert(lt.load(source), rank=2, dtype=dtype)


def test_parameters_and_bytes(source):
    lora = lt.load(source)
    adapter = lt.convert(lora, rank=(5, 4), dtype="float16")
    # Cores of rank 3 at (5, 4): a product would take 27 numbers, the core takes 20.
    sizes = {m * 5 + 10 * 4 + 12 * 20 for m in (12, 20)}
    assert {row.parameters for row in adapter.summary} == sizes
    expected = 2 * (12 * 5 + 10 * 4 + 12 * 20) + 20 * 5 + 10 * 4 + 12 * 20
    assert adapter.parameters == expected
    assert adapter.bytes == 2 * expected
    assert adapter.source_parameters == lora.parameters == 12 * 3 * (22 + 22 + 30)
    assert adapter.source_bytes == lora.bytes == 4 * lora.parameters


def test_ranks_are_clamped_to_what_a_group_needs(tmp_path):
    pairs = bert_pairs(layers=11) | {
        "pooler.dense": (np.ones((12, 1), "float32"), np.ones((1, 10), "float32"))
    }
    lora = write_lora(tmp_path / "lora", pairs, rank_pattern={"pooler.dense": 1})
    rows = {row.group: row for row in lt.convert(lt.load(lora), rank=(15, 9)).summary}
    ranks = {row.group: row.ranks for row in rows.values()}
    (pooler,) = (name for name in ranks if "pooler" in name)
    assert ranks.pop(pooler) == (1, 1)
    assert sorted(ranks.values()) == [(12, 9), (12, 9), (15, 9)]
    assert rows[pooler].relative_error < 1e-6


@pytest.mark.parametrize(
    "rank", [0, -1, 21, (3, 11), (21, 3), (0, 3), (3, -1), (3,), (3, 3, 3), 2.5, (2.5, 3), "16"]
)
def test_impossible_ranks(source, rank):
    with pytest.raises(RankError, match="rank"):
        lt.convert(lt.load(source), rank=rank)


def test_a_numpy_integer_is_a_rank(source):
    assert {g.rank for g in lt.convert(lt.load(source), rank=np.int64(2)).groups} == {(2, 2)}


def test_error_falls_with_rank(source):
    lora = lt.load(source)
    errors = [lt.convert(lora, rank=r).relative_error for r in range(1, 11)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[0] > 0.3
    assert errors[-1] < errors[0] / 2


def one_module(seed, m=30, n=40, r=6):
    """A LoRA of one module in float64, and its stack."""
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    module = LoraModule("model.layers.0.self_attn.q_proj", b, a)
    return LoraAdapter((module,), {}, np.dtype(np.float64)), lt.LowRankStack([b], [a])


@pytest.mark.parametrize("seed", range(3))
def test_a_tolerance_that_is_attained_to_the_last_digit(seed):
    """Errors read off the library's own curve are tolerances like any other."""
    adapter, stack = one_module(seed)
    for point in lt.rate_distortion(stack, slice_ranks=[6]):
        if point.p < 6:
            found = lt.convert(adapter, tolerance=point.relative_error)
            assert found.relative_error <= point.relative_error
            # One module: the smaller rank decides, and rounding may cost one more.
            assert min(found.groups[0].rank) - min(point.p, point.q) in {0, 1}


def test_only_products_count(tmp_path):
    rng = np.random.default_rng(3)
    pairs = {name: (b.astype(float), a.astype(float)) for name, (b, a) in bert_pairs().items()}
    turned = {}
    for name, (b, a) in pairs.items():
        s = rng.normal(size=(3, 3)) + 3 * np.eye(3)
        turned[name] = (b @ s, np.linalg.solve(s, a))
    one = lt.convert(lt.load(write_lora(tmp_path / "a", pairs, dtype="float64")), rank=3)
    two = lt.convert(lt.load(write_lora(tmp_path / "b", turned, dtype="float64")), rank=3)
    assert one.relative_error == pytest.approx(two.relative_error, rel=1e-6)
    assert lt.compare(one, two).relative_error < 1e-2


def test_progress_is_told_of_every_group(source):
    calls = []
    adapter = lt.convert(lt.load(source), rank=2, progress=lambda *call: calls.append(call))
    names = [group.name for group in adapter.groups]
    assert calls == [(name, i, len(names)) for i, name in enumerate(names)]


def test_extras_and_what_the_adapter_applies_to_travel_along(tmp_path):
    extras = {f"{PREFIX}classifier.weight": np.arange(6, dtype="float16").reshape(2, 3)}
    fields = {
        "modules_to_save": ["classifier"],
        "layers_to_transform": [1, 2],
        "target_modules": ["q"],
        "revision": "v1",
    }
    lora = write_lora(tmp_path / "lora", extras=extras, lora_dropout=0.1, **fields)
    lt.convert(lt.load(lora), rank=2).save(tmp_path / "lotr")
    config = read_config(tmp_path / "lotr")
    assert fields.items() <= config.items()
    assert config["base_model_name_or_path"] == "tiny/bert"
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert not {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"} & config.keys()
    (key,) = extras
    stored = read_arrays(tmp_path / "lotr")[key]
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, extras[key])
    assert set(lt.load(tmp_path / "lotr").extras) == {key}


def test_a_lotr_is_not_converted_again(source):
    with pytest.raises(UnsupportedAdapterError, match="export"):
        lt.convert(lt.convert(lt.load(source), rank=2), rank=1)


@pytest.mark.parametrize(
    ("group_by", "kind"),
    [("(", FormatError), ("nothing", FormatError), ("query|dense", ShapeError)],
)
def test_bad_groupings(source, group_by, kind):
    with pytest.raises(kind):
        lt.convert(lt.load(source), rank=2, group_by=group_by)


def test_a_zero_adapter(tmp_path):
    pairs = {name: (0 * b, a) for name, (b, a) in bert_pairs(layers=2).items()}
    adapter = lt.convert(lt.load(write_lora(tmp_path / "lora", pairs)), rank=2)
    assert adapter.relative_error == adapter.lower_bound == 0.0
    adapter.save(tmp_path / "lotr")
    assert not any(delta.any() for delta in dense_lotr(tmp_path / "lotr").values())
    exported = adapter.to_lora()
    assert not any(delta.any() for delta in dense(exported).values())


def test_one_zero_slice(tmp_path):
    pairs = bert_pairs(layers=3)
    name = "encoder.layer.1.attention.self.query"
    pairs[name] = (0 * pairs[name][0], pairs[name][1])
    lora = write_lora(tmp_path / "lora", pairs)
    lt.convert(lt.load(lora), rank=4).save(tmp_path / "lotr")
    assert np.abs(dense_lotr(tmp_path / "lotr")[name]).max() < 1e-6
    rows = {row.name: row for row in lt.compare(lt.load(lora), lt.load(tmp_path / "lotr")).modules}
    assert rows[name].relative_error in (0.0, float("inf"))


def test_a_single_module(tmp_path):
    pairs = {"head": bert_pairs(layers=1)["encoder.layer.0.attention.self.query"]}
    lora = write_lora(tmp_path / "lora", pairs)
    adapter = lt.convert(lt.load(lora), rank=2)
    b, a = (x.astype(float) for x in pairs["head"])
    values = np.linalg.svd(b @ a, compute_uv=False)
    best = np.linalg.norm(values[2:]) / np.linalg.norm(values)
    assert adapter.relative_error == pytest.approx(best, rel=1e-5)
    assert adapter.lower_bound == pytest.approx(best, rel=1e-5)


def test_ranks_that_differ_from_layer_to_layer(tmp_path):
    pairs = {
        name: (b[:, : 1 + i % 3], a[: 1 + i % 3])
        for i, (name, (b, a)) in enumerate(bert_pairs().items())
    }
    pattern = {name: b.shape[1] for name, (b, _) in pairs.items()}
    lora = write_lora(tmp_path / "lora", pairs, rank_pattern=pattern)
    adapter = lt.convert(lt.load(lora), rank=(20, 10))
    true = dense_lora(lora, {name: 6.0 / r for name, r in pattern.items()})
    adapter.save(tmp_path / "lotr")
    assert largest_distance(dense_lotr(tmp_path / "lotr"), true) < 3e-6


def test_half_precision_that_cannot_hold_the_core_is_refused_and_not_written(tmp_path):
    """Factors of 200 fit float16; ‖ΔW‖ = 200 · 200 · √120 does not."""
    pairs = {"layers.0.q": (np.full((12, 1), 200.0), np.full((1, 10), 200.0))}
    lora = write_lora(tmp_path / "lora", pairs, dtype="float16")
    found = lotr("convert", lora, "-o", tmp_path / "lotr", "--rank", 1)
    if found.code == 0:
        assert largest_distance(dense_lotr(tmp_path / "lotr"), dense_lora(lora, 2.0)) < 1e-2
        return
    assert found.code == 1
    assert len(found.err.splitlines()) == 1, found.err
    assert "float16" in found.err
    assert "float32" in found.err
    assert not (tmp_path / "lotr").exists()


def test_tiny_values_in_half_precision_are_reported_honestly(tmp_path):
    pairs = {"layers.0.q": (np.full((12, 1), 3e-4), np.full((1, 10), 3e-4))}
    lora = write_lora(tmp_path / "lora", pairs, dtype="float16")
    adapter = lt.convert(lt.load(lora), rank=1)
    adapter.save(tmp_path / "lotr")
    error = distance(dense_lotr(tmp_path / "lotr"), dense_lora(lora, 2.0))
    assert adapter.relative_error == pytest.approx(error, rel=1e-3)


# --- compare --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_comparison_against_dense(source, tmp_path, dtype):
    lt.convert(lt.load(source), rank=4, dtype=dtype).save(tmp_path / "lotr")
    found = lt.compare(lt.load(source), lt.load(tmp_path / "lotr"))
    true, other = dense_lora(source, 2.0), dense_lotr(tmp_path / "lotr")
    assert found.relative_error == pytest.approx(distance(other, true), rel=1e-5)
    assert found.max_slice_error == pytest.approx(largest_distance(other, true), rel=1e-5)
    assert [row.name for row in found.modules] == [m.name for m in lt.load(source).modules]
    for row in found.modules:
        expected = distance({row.name: other[row.name]}, {row.name: true[row.name]})
        assert row.relative_error == pytest.approx(expected, rel=1e-5)


def test_comparison_agrees_with_what_convert_reports(source, tmp_path):
    for dtype in ("float32", "bfloat16"):
        adapter = lt.convert(lt.load(source), rank=4, dtype=dtype)
        adapter.save(tmp_path / dtype)
        found = lt.compare(lt.load(source), LotrAdapter.load(tmp_path / dtype))
        assert found.relative_error == pytest.approx(adapter.relative_error, rel=1e-6)


def test_an_adapter_equals_itself(source):
    lora = lt.load(source)
    adapter = lt.convert(lora, rank=4, dtype="bfloat16")
    for one in (lora, adapter):
        found = lt.compare(one, one)
        assert found.relative_error == found.max_slice_error == 0.0
        assert {row.relative_error for row in found.modules} == {0.0}


def test_small_differences_are_seen_as_such(tmp_path):
    """1e-9 in float64 is neither 0 nor 1e-8: a difference of norms would lose it."""
    pairs = {name: (b.astype(float), a.astype(float)) for name, (b, a) in bert_pairs(1).items()}
    near = {name: (b * (1 + 1e-9), a) for name, (b, a) in pairs.items()}
    one = lt.load(write_lora(tmp_path / "a", pairs, dtype="float64"))
    two = lt.load(write_lora(tmp_path / "b", near, dtype="float64"))
    assert lt.compare(one, two).relative_error == pytest.approx(1e-9, rel=1e-4)


def test_another_gauge_is_the_same_adapter(tmp_path):
    pairs = {name: (b.astype(float), a.astype(float)) for name, (b, a) in bert_pairs(2).items()}
    turned = {name: (b[:, ::-1] * 3, a[::-1] / 3) for name, (b, a) in pairs.items()}
    one = lt.load(write_lora(tmp_path / "a", pairs, dtype="float64"))
    two = lt.load(write_lora(tmp_path / "b", turned, dtype="float64"))
    assert lt.compare(one, two).relative_error < 1e-14


def test_modules_of_one_side_only_count_as_zero_in_the_other(tmp_path):
    pairs = bert_pairs(layers=2)
    half = {name: pair for name, pair in pairs.items() if ".0." in name}
    whole = lt.load(write_lora(tmp_path / "a", pairs))
    part = lt.load(write_lora(tmp_path / "b", half))
    true = dense_lora(tmp_path / "a", 2.0)
    norms = {name: np.linalg.norm(delta) for name, delta in true.items()}
    missing = np.linalg.norm([norms[n] for n in norms if n not in half])
    found = lt.compare(whole, part)
    expected = missing / np.linalg.norm(list(norms.values()))
    assert found.relative_error == pytest.approx(expected, rel=1e-6)
    assert found.max_slice_error == pytest.approx(1.0)
    reverse = lt.compare(part, whole)
    assert reverse.max_slice_error == float("inf")
    assert reverse.relative_error == pytest.approx(
        missing / np.linalg.norm([norms[n] for n in half]), rel=1e-6
    )
    answer = document("verify", tmp_path / "b", tmp_path / "a")
    assert answer["max_slice_error"] is None


def test_unlike_shapes_are_named(tmp_path):
    pairs = bert_pairs(layers=1)
    name = "encoder.layer.0.attention.self.query"
    other = pairs | {name: (np.ones((7, 3), "float32"), np.ones((3, 10), "float32"))}
    one, two = write_lora(tmp_path / "a", pairs), write_lora(tmp_path / "b", other)
    with pytest.raises(FormatError, match=rf"{name}.*12 × 10.*7 × 10"):
        lt.compare(lt.load(one), lt.load(two))


def test_huge_alpha_is_refused_with_its_name(tmp_path):
    tensors = lora_tensors(bert_pairs(layers=1))
    path = write_adapter(tmp_path / "a", lora_config(3, lora_alpha=1e300), tensors)
    with pytest.raises(LotrError) as caught, np.errstate(all="ignore"):
        lt.convert(lt.load(path), rank=2)
    assert "alpha" in str(caught.value)
