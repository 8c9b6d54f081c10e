"""An adapter back into a checkpoint: every number of it, and every other byte kept."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from lotrtensor import (
    DataError,
    FormatError,
    LotrError,
    LotrWarning,
    extract,
    load,
    merge,
)
from tests.adapters_fixtures import (
    DTYPES,
    assert_refused,
    assert_same_modules,
    bert_pairs,
    dense_lotr,
    distance,
    edit_config,
    lotr,
    snapshot,
    write_lora,
)
from tests.checkpoint_fixtures import (
    INDEX,
    D,
    F,
    deltas,
    full,
    model,
    pair,
    read,
    tune,
    write,
)

# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("group_by", ["type", "shape", "none", "query|value"])
def test_full_rank_and_merge_give_the_tuned_weights(tmp_path, shards, group_by):
    """float32: to 1e-6 of the update, entry by entry; the rest bit by bit."""
    base_dir, _, base, tuned = pair(tmp_path, shards=shards)
    merge(base_dir, full(tmp_path, group_by=group_by), tmp_path / "merged")
    found, files = read(tmp_path / "merged")
    assert found.keys() == tuned.keys()
    assert files == read(base_dir)[1]
    for key, x in tuned.items():
        assert found[key].dtype == np.float32
        assert np.max(np.abs(found[key] - x)) <= 1e-6 * (1 + np.abs(x).max())
        if np.array_equal(base[key], x):
            assert np.array_equal(found[key], x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_half_precision_comes_back_exactly(tmp_path, dtype, shards):
    """base + ΔW rounds to the tuned weights, bit by bit."""
    base_dir, _, _, tuned = pair(tmp_path, dtype, shards)
    merge(base_dir, full(tmp_path), tmp_path / "merged")
    found, _ = read(tmp_path / "merged")
    for key, x in tuned.items():
        assert found[key].dtype == DTYPES[dtype]
        assert np.array_equal(found[key].astype(np.float64), x.astype(np.float64)), key


def test_double_precision(tmp_path):
    """float64 checkpoints keep their digits."""
    base_dir, _, _, tuned = pair(tmp_path, "float64")
    adapter = extract(base_dir, tmp_path / "tuned", rank=(F, D))
    assert adapter.dtype == np.float64
    merge(base_dir, adapter, tmp_path / "merged")
    found, _ = read(tmp_path / "merged")
    for key, x in tuned.items():
        assert np.max(np.abs(found[key] - x)) <= 1e-13


def test_mixed_types(tmp_path):
    """A float32 base and a bfloat16 tuned model; each tensor keeps the base's type."""
    base = model()
    tuned = {k: x.astype(DTYPES["bfloat16"]) if x.ndim == 2 else x for k, x in tune(base).items()}
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    merge(tmp_path / "base", full(tmp_path), tmp_path / "merged")
    found, _ = read(tmp_path / "merged")
    for key in ("encoder.layer.0.attention.self.query.weight", "embeddings.word_embeddings.weight"):
        assert found[key].dtype == np.float32
        assert np.max(np.abs(found[key] - tuned[key].astype(np.float32))) < 1e-6


@pytest.mark.parametrize("form", ["lotr", "lora"])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_slices_of_unlike_precision_share_a_group(tmp_path, form, side):
    """One layer in float64, one in bfloat16, the rest in float32."""
    both = {"base": model(), "tuned": tune(model(), rank=2)}
    for layer, dtype in ((0, "float64"), (1, "bfloat16")):
        key = f"encoder.layer.{layer}.attention.self.query.weight"
        both[side][key] = both[side][key].astype(DTYPES[dtype])
    for name, tensors in both.items():
        write(tmp_path / name, tensors)
    adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=12, dtype="float64", form=form)
    if form == "lotr":
        adapter = adapter.to_lora()
    found = {m.name: m.B.astype(float) @ m.A for m in adapter.modules}
    assert distance(found, deltas(both["base"], both["tuned"])) < 1e-6


@pytest.mark.parametrize("form", ["lotr", "lora"])
def test_the_command_line_goes_there_and_back(tmp_path, form):
    """extract, then merge; both tell what they did."""
    base_dir, tuned_dir, _, tuned = pair(tmp_path, rank=2, shards=2)
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    goal = ["--rank", 6, "--form", form]
    found = lotr("extract", "--base", base_dir, "--tuned", tuned_dir, "-o", out, *goal)
    assert found.code == 0, found.err
    found = lotr("merge", out, "--base", base_dir, "-o", merged)
    assert found.code == 0, found.err
    assert "7 weights changed" in found.out
    tensors, _ = read(merged)
    for key, x in tuned.items():
        assert np.max(np.abs(tensors[key] - x)) <= 2e-6, key


def test_unchanged_modules_are_left_out(tmp_path):
    """Of a group in part, and whole groups."""
    base = model()
    tuned = tune(base, pattern=r"layer.1.attention.self.query|intermediate", rank=2)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=6)
    names = sorted(name for group in adapter.groups for name in group.modules)
    assert names == sorted(deltas(base, tuned))
    assert len(names) == 4
    assert adapter.config["target_modules"] == names
    adapter.save(tmp_path / "adapter")
    assert_same_modules(dense_lotr(tmp_path / "adapter"), deltas(base, tuned), 1e-5)


@pytest.mark.parametrize("goal", [{"tolerance": 0.1}, {"budget": "50%"}, {"rank": 3}])
def test_unchanged_groups_cost_nothing(tmp_path, goal):
    """What does not differ takes no share of a budget, and no error of its own."""
    base = model()
    tuned = tune(base, pattern="query", rank=2)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    adapter = extract(tmp_path / "base", tmp_path / "tuned", **goal)
    assert [group.name for group in adapter.groups] == ["attention.self.query"]
    assert adapter.relative_error is not None
    assert adapter.relative_error < 1


def test_a_budget_just_large_enough_for_what_changed(tmp_path):
    """The smallest decomposition is that of the changed group: m + n + K numbers."""
    base = model()
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tune(base, pattern="query", rank=2))
    adapter = extract(tmp_path / "base", tmp_path / "tuned", budget=f"{D + D + 3}p")
    assert adapter.parameters == D + D + 3


# ---------------------------------------------------------------- merge keeps the rest


def test_a_lora_is_merged_with_its_scale(tmp_path):
    """base + (alpha / r) B A, computed by hand; the file names are the base's."""
    pairs = {n: x for n, x in bert_pairs(3).items() if "query" in n}
    rng = np.random.default_rng(0)
    base = {f"{n}.weight": rng.random((12, 10), np.float32) for n in pairs}
    write(tmp_path / "base", base, shards=2)
    write_lora(tmp_path / "lora", pairs)
    found = lotr("merge", tmp_path / "lora", "--base", tmp_path / "base", "-o", tmp_path / "merged")
    assert found.code == 0, found.err
    merged, files = read(tmp_path / "merged")
    assert files == read(tmp_path / "base")[1]
    for name, (b, a) in pairs.items():
        assert merged[f"{name}.weight"] == pytest.approx(
            base[f"{name}.weight"] + 2 * b @ a, abs=1e-4
        )


def test_types_keys_shards_and_files_are_kept(tmp_path):
    """Of every tensor, of any kind; so are metadata, index and the files beside."""
    pair(tmp_path, rank=2)
    adapter = full(tmp_path)
    base = model() | {
        "position_ids": np.arange(5),
        "mask": np.array([True, False]),
        "scalar": np.array(3.0, np.float64),
        "empty": np.zeros((0, 3), np.float32),
        "half.weight": np.ones((3, 3), np.float16),
        "brain.weight": np.ones((3, 3), ml_dtypes.bfloat16),
    }
    base_dir = write(
        tmp_path / "mixed", base, shards=4, **{"tokenizer.json": "{}", "vocab.txt": "a"}
    )
    changed = merge(base_dir, adapter, tmp_path / "merged")
    found, files = read(tmp_path / "merged")
    assert files == read(base_dir)[1]
    assert found.keys() == base.keys()
    for key, x in base.items():
        assert (found[key].dtype, found[key].shape) == (x.dtype, x.shape)
        assert np.array_equal(found[key], x) == (key not in changed)
    for name in ("config.json", "tokenizer.json", "vocab.txt", INDEX):
        assert (tmp_path / "merged" / name).read_bytes() == (base_dir / name).read_bytes()
    for name in set(files.values()):
        with safe_open(tmp_path / "merged" / name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_model_with_a_head_takes_its_encoders_adapter(tmp_path):
    """Names differ by the base model's prefix."""
    _, _, base, tuned = pair(tmp_path, rank=2)
    adapter = full(tmp_path)
    headed = {f"bert.{key}": x for key, x in base.items()} | {
        "cls.weight": np.ones((2, D), np.float32)
    }
    merge(write(tmp_path / "headed", headed), adapter, tmp_path / "merged")
    found, _ = read(tmp_path / "merged")
    for key, x in tuned.items():
        assert found[f"bert.{key}"] == pytest.approx(x, abs=2e-6)


def test_the_base_is_not_touched(tmp_path):
    """Not a byte."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    before = snapshot(base_dir)
    merge(base_dir, full(tmp_path), tmp_path / "merged")
    assert snapshot(base_dir) == before


# ---------------------------------------------------------------- layout


def test_adapters_from_elsewhere_in_config(tmp_path):
    """fan_in_fan_out of the config decides how an update is laid on."""
    pairs = {"q": (np.ones((3, 1), np.float32), np.arange(4, dtype=np.float32)[None])}
    write_lora(tmp_path / "lora", pairs)
    edit_config(tmp_path / "lora", fan_in_fan_out=True)
    write(tmp_path / "base", {"q.weight": np.zeros((4, 3), np.float32)})
    merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")
    expected = 2 * np.arange(4)[:, None] * np.ones(3)
    assert np.array_equal(read(tmp_path / "out")[0]["q.weight"], expected)


# ---------------------------------------------------------------- what does not fit


def test_foreign_adapters_are_refused_by_name(tmp_path):
    """A module that the checkpoint lacks, and one of another shape."""
    base = {"encoder.layer.0.attention.self.query.weight": np.ones((12, 10), np.float32)}
    write(tmp_path / "base", base)
    query = "encoder.layer.0.attention.self.query"
    absent = "encoder.layer.1.attention.self.query"
    write_lora(tmp_path / "foreign", {name: bert_pairs(2)[name] for name in (query, absent)})
    found = lotr("merge", tmp_path / "foreign", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert_refused(found, absent)
    write_lora(
        tmp_path / "unlike", {query: (np.ones((10, 2), np.float32), np.ones((2, 12), np.float32))}
    )
    found = lotr("merge", tmp_path / "unlike", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert_refused(found, query, "(12, 10)", "(10, 12)")
    assert not (tmp_path / "out").exists()


def test_an_ambiguous_name_is_refused(tmp_path):
    """Two models in one checkpoint: neither is guessed."""
    pairs = {"query": bert_pairs(1)["encoder.layer.0.attention.self.query"]}
    write_lora(tmp_path / "lora", pairs)
    base = {f"{side}.query.weight": np.ones((12, 10), np.float32) for side in ("left", "right")}
    write(tmp_path / "base", base)
    with pytest.raises(FormatError, match="query"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


@pytest.mark.parametrize("shape", [None, (3, 10)])
def test_carried_tensors_without_a_place_are_refused_by_name(tmp_path, shape):
    """A fully trained head that the base lacks, or has with other classes, would be lost."""
    extras = {"base_model.model.classifier.weight": np.ones((2, 10), np.float32)}
    pairs = {n: x for n, x in bert_pairs(1).items() if "query" in n}
    write_lora(tmp_path / "lora", pairs, extras=extras, modules_to_save=["classifier"])
    base = {f"{name}.weight": np.ones((12, 10), np.float32) for name in pairs}
    if shape:
        base["classifier.weight"] = np.ones(shape, np.float32)
    write(tmp_path / "base", base)
    with pytest.raises(FormatError, match=r"classifier.*merge_and_unload"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrapped", ["", "base_layer."])
def test_carried_tensors_replace_the_bases(tmp_path, wrapped):
    """A head that was trained in full is written in the base's type; biases are, too."""
    rng = np.random.default_rng(0)
    head, bias = rng.random((2, 10), np.float32), rng.random(12, np.float32)
    pairs = {n: x for n, x in bert_pairs(1).items() if "query" in n}
    (name,) = pairs
    extras = {
        "base_model.model.classifier.weight": head,
        f"base_model.model.{name}.{wrapped}bias": bias,
    }
    fields = {"modules_to_save": ["classifier"], "bias": "all"}
    write_lora(tmp_path / "lora", pairs, extras=extras, **fields)
    base = {
        f"{name}.weight": rng.random((12, 10), np.float32),
        f"{name}.bias": np.zeros(12, np.float32),
        "classifier.weight": np.zeros((2, 10), np.float16),
    }
    write(tmp_path / "base", base)
    with pytest.warns(LotrWarning, match=r"2 tensors .*replace"):
        changed = merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")
    assert changed == ("classifier.weight", f"{name}.bias", f"{name}.weight")
    found, _ = read(tmp_path / "out")
    assert np.array_equal(found["classifier.weight"], head.astype(np.float16))
    assert np.array_equal(found[f"{name}.bias"], bias)


def test_carried_tensors_do_not_replace_quantised_ones(tmp_path):
    """Numbers beside a scale of their own."""
    extras = {"base_model.model.classifier.weight": np.ones((2, 10), np.float32)}
    pairs = {n: x for n, x in bert_pairs(1).items() if "query" in n}
    write_lora(tmp_path / "lora", pairs, extras=extras, modules_to_save=["classifier"])
    base = {f"{name}.weight": np.ones((12, 10), np.float32) for name in pairs}
    base["classifier.weight"] = np.ones((2, 10), np.int8)
    write(tmp_path / "base", base)
    with pytest.raises(DataError, match=r"classifier\.weight.*quantised"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


@pytest.mark.parametrize("shape", [(12, 10, 1, 1), (12, 10, 3), (120,)])
def test_an_update_of_a_matrix_for_something_else(tmp_path, shape):
    """A convolution, a vector: one sentence."""
    pairs = {n: x for n, x in bert_pairs(1).items() if "query" in n}
    write_lora(tmp_path / "lora", pairs)
    write(tmp_path / "base", {f"{name}.weight": np.ones(shape, np.float32) for name in pairs})
    with pytest.raises(FormatError, match=r"query.*\(12, 10\).*different models"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


@pytest.mark.parametrize("own", [True, False])
def test_a_base_layer_that_was_written_along(tmp_path, own):
    """Dropped with a word where it is the base's, refused where it is another."""
    weight = np.random.default_rng(0).random((12, 10), np.float32)
    pairs = {"lm_head": bert_pairs(1)["encoder.layer.0.attention.self.query"]}
    saved = weight if own else weight + 1
    write_lora(
        tmp_path / "lora", pairs, extras={"base_model.model.lm_head.base_layer.weight": saved}
    )
    write(tmp_path / "base", {"lm_head.weight": weight})
    adapter = load(tmp_path / "lora")
    if not own:
        with pytest.raises(FormatError, match=r"another base.*merge_and_unload"):
            merge(tmp_path / "base", adapter, tmp_path / "out")
        return
    with pytest.warns(LotrWarning, match=r"base_layer\.weight"):
        merge(tmp_path / "base", adapter, tmp_path / "out")
    b, a = pairs["lm_head"]
    assert read(tmp_path / "out")[0]["lm_head.weight"] == pytest.approx(weight + 2 * b @ a)


def test_overflow_is_refused_by_name(tmp_path):
    """A sum beyond float16 is no weight."""
    write_lora(
        tmp_path / "lora", {"q": (np.full((3, 1), 100, np.float32), np.ones((1, 2), np.float32))}
    )
    write(tmp_path / "base", {"q.weight": np.full((3, 2), 65500, np.float16)})
    with pytest.raises(LotrError, match=r"q\.weight"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


# ---------------------------------------------------------------- memory of merge


def test_merge_takes_the_memory_of_a_few_slices(tmp_path):
    """One shard of twenty weights: the peak is that of one weight and its update."""
    size, slices = 512, 20
    one = np.ones((size, size), np.float32)
    write(tmp_path / "base", {f"h.{i}.q.weight": one for i in range(slices)})
    factors = np.ones((size, 2), np.float32), np.ones((2, size), np.float32)
    write_lora(tmp_path / "lora", {f"h.{i}.q": factors for i in range(slices)})
    adapter = load(tmp_path / "lora")
    tracemalloc.start()
    merge(tmp_path / "base", adapter, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 5 * one.nbytes
