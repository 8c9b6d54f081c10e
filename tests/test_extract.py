"""Weight deltas of checkpoints to an adapter, and an adapter back into a checkpoint."""

import itertools
import json
import re
import shutil
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from lotrtensor import (
    DataError,
    FormatError,
    LotrError,
    LotrWarning,
    RankError,
    extract,
    load,
    merge,
)
from lotrtensor.core.fit import tuning
from tests.adapters_fixtures import (
    DTYPES,
    Peft,
    assert_refused,
    assert_same_modules,
    bert_pairs,
    dense_lora,
    dense_lotr,
    distance,
    edit_config,
    lotr,
    lotr_process,
    nth_call,
    quiet,
    raw_safetensors,
    read_arrays,
    read_config,
    snapshot,
    write_lora,
)

INDEX = "model.safetensors.index.json"
unconverged = pytest.mark.filterwarnings("ignore:.*did not converge:lotrtensor.errors.LotrWarning")

D, F, V = 12, 16, 20
"""Width, inner width and vocabulary of the model."""


def model(seed=0, layers=3):
    """The tensors of a small encoder, float32, entries between 1/2 and 1."""
    rng = np.random.default_rng(seed)
    shapes = {"embeddings.word_embeddings.weight": (V, D), "embeddings.LayerNorm.weight": (D,)}
    for i in range(layers):
        prefix = f"encoder.layer.{i}."
        shapes |= {
            f"{prefix}attention.self.query.weight": (D, D),
            f"{prefix}attention.self.query.bias": (D,),
            f"{prefix}attention.self.value.weight": (D, D),
            f"{prefix}intermediate.dense.weight": (F, D),
            f"{prefix}intermediate.dense.bias": (F,),
        }
    return {key: rng.uniform(0.5, 1, shape).astype(np.float32) for key, shape in shapes.items()}


def tune(tensors, seed=1, rank=None, pattern="query|intermediate|word_embeddings", size=0.05):
    """Change the weights that match: by updates of some rank, or by full ones."""
    rng, tuned = np.random.default_rng(seed), dict(tensors)
    for key, x in tensors.items():
        if re.search(pattern, key) and key.endswith("weight"):
            m, n = x.shape
            r = rank or min(m, n)
            delta = size * rng.standard_normal((m, r)) @ rng.standard_normal((r, n)) / np.sqrt(r)
            tuned[key] = (x + delta).astype(x.dtype)
    return tuned


def cast(tensors, dtype):
    """Every tensor in one type."""
    return {key: x.astype(DTYPES[dtype]) for key, x in tensors.items()}


def write(path, tensors, shards=1, **files):
    """A checkpoint directory: one file, or shards and their index."""
    path.mkdir(parents=True)
    keys = list(tensors)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    weight_map = {key: names[i * shards // len(keys)] for i, key in enumerate(keys)}
    for name in names:
        part = {k: x.copy(order="C") for k, x in tensors.items() if weight_map[k] == name}
        safetensors.numpy.save_file(part, path / name, metadata={"format": "pt"})
    if shards > 1:
        size = sum(x.nbytes for x in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "bert"}')
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def read(path):
    """All tensors of a checkpoint, and the file that each is in."""
    tensors, files = {}, {}
    for file in sorted(path.glob("*.safetensors")):
        for key, x in safetensors.numpy.load_file(file).items():
            tensors[key], files[key] = x, file.name
    return tensors, files


def pair(tmp_path, dtype="float32", shards=1, **how):
    """Base and tuned checkpoint in one type, with their tensors."""
    base = cast(model(), dtype)
    tuned = cast(tune(model(), **how), dtype)
    return (
        write(tmp_path / "base", base, shards),
        write(tmp_path / "tuned", tuned, shards),
        base,
        tuned,
    )


def deltas(base, tuned):
    """ΔW of the changed matrices by module, out × in; an embedding's is transposed."""
    found = {}
    for key, x in base.items():
        delta = tuned[key].astype(np.float64) - x.astype(np.float64)
        if x.ndim == 2 and delta.any():
            found[key.removesuffix(".weight")] = delta.T if "embeddings" in key else delta
    return found


def full(tmp_path, group_by="type"):
    """An adapter of full rank, in float32."""
    rank = (D, D) if group_by == "none" else (F, D)
    both = tmp_path / "base", tmp_path / "tuned"
    return extract(*both, rank=rank, dtype="float32", group_by=group_by)


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


# ---------------------------------------------------------------- goals


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("group_by", ["type", "none"])
@unconverged
def test_a_tolerance_is_not_exceeded(tmp_path, tolerance, group_by):
    """Of the file against the true deltas."""
    base_dir, tuned_dir, base, tuned = pair(tmp_path)
    adapter = extract(base_dir, tuned_dir, tolerance=tolerance, group_by=group_by)
    adapter.save(tmp_path / "adapter")
    error = distance(dense_lotr(tmp_path / "adapter"), deltas(base, tuned))
    assert error <= tolerance
    assert adapter.relative_error == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert adapter.lower_bound <= adapter.relative_error


@pytest.mark.parametrize("budget", ["30%", "60%", "2KB", "700p"])
@unconverged
def test_a_budget_is_not_exceeded(tmp_path, budget):
    """Bytes of the tensors; shares are of the deltas of the modules compared."""
    base_dir, tuned_dir, base, _ = pair(tmp_path)
    extract(base_dir, tuned_dir, budget=budget).save(tmp_path / "adapter")
    stored = sum(x.nbytes for x in read_arrays(tmp_path / "adapter").values())
    whole = sum(x.nbytes for x in base.values() if x.ndim == 2)
    limits = {"30%": 0.3 * whole, "60%": 0.6 * whole, "2KB": 2000, "700p": 2800}
    assert stored <= limits[budget]


def test_an_energy_is_kept(tmp_path):
    """1 − error²."""
    base_dir, tuned_dir, base, tuned = pair(tmp_path)
    extract(base_dir, tuned_dir, energy=0.95).save(tmp_path / "adapter")
    assert 1 - distance(dense_lotr(tmp_path / "adapter"), deltas(base, tuned)) ** 2 >= 0.95


@pytest.mark.parametrize("goal", [{}, {"rank": 2, "tolerance": 0.1}, {"rank": 0}, {"budget": "3p"}])
def test_goals_are_checked(tmp_path, goal):
    """As by convert; extract has no default."""
    base_dir, tuned_dir, _, _ = pair(tmp_path)
    with pytest.raises(RankError):
        extract(base_dir, tuned_dir, **goal)


def test_a_pattern_chooses_modules(tmp_path):
    """Only paths in which it occurs."""
    base_dir, tuned_dir, _, _ = pair(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LotrWarning)
        adapter = extract(base_dir, tuned_dir, rank=2, modules=r"layer\.[02]\..*query")
    assert [n for g in adapter.groups for n in g.modules] == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.2.attention.self.query",
    ]


# ---------------------------------------------------------------- what an adapter cannot hold


@pytest.mark.parametrize(
    "key", ["encoder.layer.1.intermediate.dense.bias", "embeddings.LayerNorm.weight"]
)
def test_changed_vectors_are_told_by_name(tmp_path, key):
    """Biases and norms that were trained are not part of the adapter."""
    base, tuned = model(), tune(model(), rank=2)
    tuned[key] = tuned[key] + np.float32(0.5)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    with pytest.warns(LotrWarning, match=re.escape(key)):
        extract(tmp_path / "base", tmp_path / "tuned", rank=4)
    arguments = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--rank", 4, "--json"]
    found = lotr_process("extract", *arguments, "-o", tmp_path / "adapter")
    assert found.code == 0, found.err
    assert key in found.err
    assert json.loads(found.out)["groups"]


def test_every_changed_vector_is_told(tmp_path):
    """Not the first alone."""
    base, tuned = model(), tune(model(), rank=2)
    keys = [f"encoder.layer.{i}.attention.self.query.bias" for i in range(3)]
    for key in keys:
        tuned[key] = tuned[key] * np.float32(2)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    with pytest.warns(LotrWarning) as caught:
        extract(tmp_path / "base", tmp_path / "tuned", rank=4)
    text = " ".join(str(w.message) for w in caught)
    assert "3 tensors" in text
    assert any(key in text for key in keys)


def test_tensors_of_one_side_are_told(tmp_path):
    """A new head, a dropped pooler."""
    base, tuned = model(), tune(model(), rank=2)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned | {"classifier.weight": np.ones((2, D), np.float32)})
    with pytest.warns(LotrWarning, match="classifier.weight"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=4)


def test_equal_vectors_are_not_told(tmp_path):
    """No warning without a reason."""
    pair(tmp_path, rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(tmp_path / "base", tmp_path / "tuned", rank=6)


# ---------------------------------------------------------------- forms that others read


def test_embeddings_are_transposed(tmp_path):
    """ΔW is dim × tokens, under PEFT's embedding keys; merged the other way round."""
    base_dir, _, base, tuned = pair(tmp_path, pattern="word_embeddings")
    adapter = full(tmp_path, group_by="none")
    (group,) = adapter.groups
    assert group.embedding
    assert group.shape == (D, V)
    adapter.to_lora().save(tmp_path / "lora")
    arrays = read_arrays(tmp_path / "lora")
    name = "base_model.model.embeddings.word_embeddings.lora_embedding_"
    product = arrays[name + "B"].astype(float) @ arrays[name + "A"]
    expected = deltas(base, tuned)["embeddings.word_embeddings"]
    assert product.shape == (D, V)
    assert product == pytest.approx(expected, abs=1e-6)
    merge(base_dir, load(tmp_path / "lora"), tmp_path / "merged")
    key = "embeddings.word_embeddings.weight"
    assert read(tmp_path / "merged")[0][key] == pytest.approx(tuned[key], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("embed_out", False),  # GPT-NeoX
        ("electra.embeddings_project", False),
        ("albert.encoder.embedding_hidden_mapping_in", False),
        ("vision.patch_embedding_projection", False),
        ("gpt_neox.embed_in", True),
        ("model.embed_tokens", True),
        ("transformer.wpe", True),
        ("bert.embeddings.token_type_embeddings", True),
        ("shared", True),
        ("tokens_embed", True),
    ],
)
@pytest.mark.parametrize("form", ["lotr", "lora"])
def test_embeddings_are_told_by_their_whole_last_name(tmp_path, name, embedding, form):
    """A linear layer is none because its name speaks of embeddings: ΔW is then out × in."""
    base = {f"{name}.weight": np.zeros((V, D), np.float32)}
    tuned = {f"{name}.weight": np.random.default_rng(0).standard_normal((V, D)).astype("float32")}
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=D, form=form)
    lora = adapter if form == "lora" else adapter.to_lora()
    (module,) = lora.modules
    assert (module.name, module.embedding) == (name, embedding)
    assert module.shape == ((D, V) if embedding else (V, D))
    delta, product = tuned[f"{name}.weight"], module.B @ module.A
    assert product == pytest.approx(delta.T if embedding else delta, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"form": "LoRA"}, "form is 'LoRA'; expected 'lotr' or 'lora'"),
        ({"form": "foo"}, "form is 'foo'"),
        ({"allocation": "x"}, "allocation is 'x'; expected 'optimal' or 'uniform'"),
        ({"allocation": "uniform"}, "allocation is 'uniform', which a LoRA can have"),
        ({"form": "lora", "allocation": "x"}, "allocation is 'x'"),
        ({"form": "lora", "rank": (4, 6)}, r"rank is \(4, 6\); expected one integer"),
        ({"form": "lora", "rank": 100}, f"rank is 100; .* is {D}, .*query's"),
    ],
)
def test_options_that_nothing_answers_to(tmp_path, options, named):
    """A misspelled option is refused before the checkpoints are compared."""
    base, tuned, _, _ = pair(tmp_path, pattern="query")
    with pytest.raises(LotrError, match=named):
        extract(base, tuned, **{"rank": 2} | options)


@pytest.mark.parametrize("form", ["lotr", "lora"])
def test_fits_that_did_not_converge_are_told_once(tmp_path, monkeypatch, form):
    """One warning for all, with their number and the first names."""
    monkeypatch.setattr(tuning, "EXACT_FLOPS", 0)
    monkeypatch.setattr(tuning, "LAZY_PASSES", 1)
    monkeypatch.setattr(tuning, "FACTOR_PASSES", 1)
    base, tuned, _, _ = pair(tmp_path, pattern="query|value|intermediate")
    with pytest.warns(LotrWarning) as told:
        extract(base, tuned, rank=1, form=form, group_by="none")
    (message,) = [str(w.message) for w in told if "converge" in str(w.message)]
    assert "9 of 9" in message
    assert message.count("encoder.layer") == 3


def test_weights_stored_in_by_out(tmp_path):
    """fan_in_fan_out: ΔW is transposed, the config says so, merging transposes back."""
    rng = np.random.default_rng(0)
    base = {f"h.{i}.attn.c_attn.weight": rng.random((D, 3 * D), np.float32) for i in range(3)}
    tuned = tune(base, pattern="c_attn", rank=3)
    base_dir, tuned_dir = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    arguments = ["--base", base_dir, "--tuned", tuned_dir, "--rank", 9, "--fan-in-fan-out"]
    found = lotr("extract", *arguments, "-o", tmp_path / "adapter")
    assert found.code == 0, found.err
    assert read_config(tmp_path / "adapter")["fan_in_fan_out"] is True
    for name, x in dense_lotr(tmp_path / "adapter").items():
        delta = tuned[f"{name}.weight"].astype(float) - base[f"{name}.weight"]
        assert x.shape == (3 * D, D)
        assert x == pytest.approx(delta.T, abs=1e-5)
    merge(base_dir, load(tmp_path / "adapter"), tmp_path / "merged")
    for key, x in read(tmp_path / "merged")[0].items():
        assert x == pytest.approx(tuned[key], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_form_lora_is_a_plain_lora(tmp_path, dtype):
    """A PEFT directory of that rank whose ΔW is the best of its rank."""
    base_dir, tuned_dir, base, tuned = pair(tmp_path)
    out = tmp_path / "lora"
    arguments = ["--base", base_dir, "--tuned", tuned_dir, "--form", "lora", "--rank", 4]
    found = lotr("extract", *arguments, "-o", out, "--dtype", dtype)
    assert found.code == 0, found.err
    config = read_config(out)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert {x.dtype for x in read_arrays(out).values()} == {DTYPES[dtype]}
    found, expected = dense_lora(out, 1.0), deltas(base, tuned)
    expected = {n: x for n, x in expected.items() if "embeddings" not in n}
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        tail = np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[4:])
        error = np.linalg.norm(found[name] - delta)
        assert error == pytest.approx(tail, rel=5e-2 if dtype == "float32" else 0.1)


def written_lora(path):
    """ΔW of every module of a LoRA directory that keeps its own ranks, embeddings included."""
    config, arrays, found = read_config(path), read_arrays(path), {}
    assert config["rank_pattern"] == config["alpha_pattern"]
    for key, a in arrays.items():
        if "lora_A" in key or "lora_embedding_A" in key:
            b = arrays[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            found[name] = b.astype(float) @ a.astype(float)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("goal", [{"tolerance": 0.3}, {"tolerance": 0.05}, {"energy": 0.9}])
@pytest.mark.parametrize("allocation", ["optimal", "uniform"])
def test_a_lora_within_a_tolerance(tmp_path, dtype, goal, allocation):
    """As written, measured on the files; the error told is that one."""
    base_dir, tuned_dir, base, tuned = pair(tmp_path)
    both, out = ["--base", base_dir, "--tuned", tuned_dir], tmp_path / "lora"
    ((name, value),) = goal.items()
    options = ["--form", "lora", f"--{name}", value, "--allocation", allocation, "--dtype", dtype]
    found = lotr("extract", *both, *options, "-o", out, "--json")
    assert found.code == 0, found.err
    error = distance(written_lora(out), deltas(base, tuned))
    assert error <= (value if name == "tolerance" else np.sqrt(1 - value))
    assert json.loads(found.out)["relative_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("budget", ["20%", "50%", "1500p"])
def test_a_loras_budget_buys_the_best_ranks(tmp_path, budget):
    """No other ranks of that size have a smaller error: by trying all, of three modules."""
    base = {k: x for k, x in model().items() if re.search("layer.[01].*query|0.*dense", k)}
    tuned = tune(base)
    base_dir, tuned_dir = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    adapter = extract(base_dir, tuned_dir, form="lora", budget=budget)
    adapter.save(tmp_path / "lora", uniform=False)
    changed = deltas(base, tuned)
    assert len(changed) == 3
    whole = sum(x.size for x in changed.values())
    limit = int(budget[:-1]) if budget.endswith("p") else int(budget[:-1]) / 100 * whole
    assert sum(x.size for x in read_arrays(tmp_path / "lora").values()) <= limit
    values = [np.linalg.svd(x, compute_uv=False) for x in changed.values()]
    costs = [sum(x.shape) for x in changed.values()]
    best = min(
        sum(np.sum(v[r:] ** 2) for v, r in zip(values, ranks, strict=True))
        for ranks in itertools.product(range(1, 13), repeat=3)
        if sum(c * r for c, r in zip(costs, ranks, strict=True)) <= limit
    )
    norm2 = sum(np.sum(v**2) for v in values)
    error = distance(written_lora(tmp_path / "lora"), changed)
    assert error == pytest.approx(np.sqrt(best / norm2), rel=1e-3, abs=1e-6)


def test_goals_of_a_lora_out_of_reach(tmp_path):
    """The smallest size and the smallest error are named; nothing is written."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, pattern="query")
    both, out = ["--base", base_dir, "--tuned", tuned_dir], tmp_path / "lora"
    for goal, parts in (
        (["--budget", f"{3 * 2 * D - 1}p"], ("budget", 3 * 2 * D)),
        (["--tolerance", "1e-5", "--dtype", "bfloat16"], ("tolerance", "bfloat16")),
        (["--rank", D + 1], ("rank", D + 1)),
        (["--rank", 2, "--energy", 0.5], ("rank and energy",)),
        ([], ("nothing given",)),
    ):
        assert_refused(lotr("extract", *both, "--form", "lora", "-o", out, *goal), *parts)
        assert not out.exists()


@quiet
def test_peft_applies_the_extracted_lora(tmp_path):
    """A real model: base weights with the LoRA give the tuned outputs."""
    peft = Peft()
    base = peft.bert(3)
    state = {k: x.numpy() for k, x in base.state_dict().items() if x.is_floating_point()}
    tuned = tune(state, rank=3, pattern=r"query|value|dense|word_embeddings")
    base_dir, tuned_dir = write(tmp_path / "base", state), write(tmp_path / "tuned", tuned)
    arguments = ["--base", base_dir, "--tuned", tuned_dir, "--form", "lora", "--rank", 3]
    found = lotr("extract", *arguments, "-o", tmp_path / "lora")
    assert found.code == 0, found.err
    adapted = peft.load(peft.bert(3), tmp_path / "lora")
    assert_same_modules(peft.deltas(adapted), deltas(state, tuned), 1e-5)
    target = peft.bert(3)
    missing = target.load_state_dict(
        {k: peft.torch.tensor(x) for k, x in tuned.items()}, strict=False
    )
    assert not missing.unexpected_keys
    assert peft.outputs(adapted) == pytest.approx(peft.outputs(target), abs=1e-4)


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


# ---------------------------------------------------------------- refusals


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


def test_carried_tensors_are_refused_by_name(tmp_path):
    """A fully trained head would be lost."""
    extras = {"base_model.model.classifier.weight": np.ones((2, 10), np.float32)}
    write_lora(tmp_path / "lora", extras=extras, modules_to_save=["classifier"])
    write(tmp_path / "base", {"x.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(FormatError, match="classifier"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
def test_quantised_weights_are_refused_by_name(tmp_path, dtype):
    """An update rounded to integers is no update."""
    pairs = {"query": bert_pairs(1)["encoder.layer.0.attention.self.query"]}
    write_lora(tmp_path / "lora", pairs)
    write(tmp_path / "base", {"query.weight": np.ones((12, 10), dtype)})
    with pytest.raises(LotrError, match=r"query\.weight"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_types_that_numpy_cannot_read_are_refused_by_name(tmp_path):
    """float8 tensors beside the weights: one sentence, no traceback."""
    pairs = {"query": bert_pairs(1)["encoder.layer.0.attention.self.query"]}
    write_lora(tmp_path / "lora", pairs)
    weight = np.ones((12, 10), np.float32).tobytes()
    header = {
        "query.weight": {"dtype": "F32", "shape": [12, 10], "data_offsets": [0, 480]},
        "scale_f8": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [480, 484]},
    }
    (tmp_path / "base").mkdir()
    content = raw_safetensors(header, weight + b"\0" * 4)
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    found = lotr("merge", tmp_path / "lora", "--base", tmp_path / "base", "-o", tmp_path / "out")
    if found.code == 0:
        assert b"scale_f8" in (tmp_path / "out" / "model.safetensors").read_bytes()
    else:
        assert_refused(found, "scale_f8")


def test_overflow_is_refused_by_name(tmp_path):
    """A sum beyond float16 is no weight."""
    write_lora(
        tmp_path / "lora", {"q": (np.full((3, 1), 100, np.float32), np.ones((1, 2), np.float32))}
    )
    write(tmp_path / "base", {"q.weight": np.full((3, 2), 65500, np.float16)})
    with pytest.raises(LotrError, match=r"q\.weight"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, side):
    """The key of the tensor, not the number of a slice."""
    both = {"base": model(), "tuned": tune(model(), rank=2)}
    key = "encoder.layer.1.attention.self.query.weight"
    both[side][key] = both[side][key].copy()
    both[side][key][3, 4] = value
    for name, tensors in both.items():
        write(tmp_path / name, tensors)
    with pytest.raises(DataError, match=re.escape(key)):
        extract(tmp_path / "base", tmp_path / "tuned", rank=2)


def test_integer_weights_are_refused_by_name(tmp_path):
    """A quantised checkpoint has no deltas."""
    for name, seed in (("base", 0), ("tuned", 1)):
        x = np.random.default_rng(seed).integers(0, 9, (4, 4)).astype(np.int8)
        write(tmp_path / name, {"q.weight": x})
    with pytest.raises(DataError, match=r"q\.weight"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1)


def test_checkpoints_that_do_not_fit(tmp_path):
    """Other shapes, no common weights, no difference, a pattern that matches nothing."""
    base = write(tmp_path / "base", model())
    key = "encoder.layer.0.attention.self.query.weight"
    other = write(tmp_path / "other", model() | {key: np.ones((D, D + 1), np.float32)})
    foreign = write(tmp_path / "foreign", {"x.weight": np.ones((2, 2), np.float32)})
    same = write(tmp_path / "same", model())
    for tuned, more, parts in (
        (other, [], (key, "(12, 13)", "(12, 12)")),
        (foreign, [], ("foreign",)),
        (same, [], ("same weights",)),
        (same, ["--modules", "nothing"], ("nothing",)),
        (same, ["--modules", "("], ("regular expression",)),
        (tmp_path / "absent", [], ("absent",)),
    ):
        arguments = ["--base", base, "--tuned", tuned, "-o", tmp_path / "out", "--rank", 2]
        assert_refused(lotr("extract", *arguments, *more), *parts)
        assert not (tmp_path / "out").exists()


def test_damaged_checkpoints(tmp_path):
    """Missing shards, damaged files, indices that lie."""
    pair(tmp_path, rank=2, shards=3)
    adapter = full(tmp_path)
    adapter.save(tmp_path / "adapter")
    shard = "model-00002-of-00003.safetensors"

    def refuse(name, *parts):
        for command in (
            ["merge", tmp_path / "adapter", "--base", tmp_path / name, "-o", tmp_path / "out"],
            [
                "extract",
                "--base",
                tmp_path / name,
                "--tuned",
                tmp_path / "tuned",
                "-o",
                tmp_path / "out",
                "--rank",
                2,
            ],
        ):
            assert_refused(lotr(*command), *parts)
        assert not (tmp_path / "out").exists()

    for name in ("missing", "cut", "outside", "list", "garbage"):
        write(tmp_path / name, model(), shards=3)
    (tmp_path / "missing" / shard).unlink()
    refuse("missing", shard)
    content = (tmp_path / "cut" / shard).read_bytes()
    (tmp_path / "cut" / shard).write_bytes(content[: len(content) // 2])
    refuse("cut", shard)
    index = json.loads((tmp_path / "outside" / INDEX).read_text())
    index["weight_map"] = {key: "../base/" + shard for key in index["weight_map"]}
    (tmp_path / "outside" / INDEX).write_text(json.dumps(index))
    refuse("outside", "shard")
    (tmp_path / "list" / INDEX).write_text('{"weight_map": []}')
    refuse("list", "weight_map")
    (tmp_path / "garbage" / INDEX).write_text("{")
    refuse("garbage", INDEX)


def test_an_index_that_promises_a_tensor_of_another_file(tmp_path):
    """What no shard holds is missing, by name."""
    pair(tmp_path, rank=2, shards=2)
    adapter = full(tmp_path)
    index = json.loads((tmp_path / "base" / INDEX).read_text())
    index["weight_map"]["pooler.dense.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "base" / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"pooler\.dense\.weight"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_packed_weights_are_refused_by_name(tmp_path, side):
    """Four-bit weights have other keys than the whole ones; they are not taken for absent."""
    both = {"base": model(), "tuned": tune(model(), rank=2)}
    module = "encoder.layer.1.attention.self.query"
    del both[side][f"{module}.weight"]
    both[side][f"{module}.qweight"] = np.ones((2, D), np.int32)
    for name, tensors in both.items():
        write(tmp_path / name, tensors)
    options = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--rank", 2]
    found = lotr("extract", *options, "-o", tmp_path / "out")
    assert_refused(found, side, f"{module}.qweight", "dequantise")
    write_lora(tmp_path / "lora", {module: (np.ones((D, 1)), np.ones((1, D)))})
    if side == "base":
        found = lotr("merge", tmp_path / "lora", "--base", tmp_path / "base", "-o", tmp_path / "m")
        assert_refused(found, f"{module}.qweight", "dequantise")


def test_eight_bit_floats_are_refused_by_name(tmp_path):
    """NumPy does not hold them; what differs in them is not lost without a word."""
    for name, byte in (("base", b"\0"), ("tuned", b"\1")):
        header = {"q.weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}
        (tmp_path / name).mkdir()
        content = raw_safetensors(header, byte * 4)
        (tmp_path / name / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"q\.weight has dtype F8_E4M3.*dequantise"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1)


def test_a_pickled_checkpoint_is_refused(tmp_path):
    """With the way out."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x")
    for command in (["extract", "--tuned", tmp_path / "base", "--rank", 1], ["merge", "lora"]):
        write_lora(tmp_path / "lora", bert_pairs(1))
        arguments = [tmp_path / x if x == "lora" else x for x in command]
        found = lotr(*arguments, "--base", tmp_path / "base", "-o", tmp_path / "out")
        assert_refused(found, "pytorch_model.bin", "save_pretrained")


def test_a_pattern_that_takes_long_to_match_nothing(tmp_path):
    """A thousand alternatives: one sentence."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    pattern = "|".join(f"nothing{i}" for i in range(1000))
    with pytest.raises(FormatError, match="nothing999"):
        extract(base_dir, tuned_dir, rank=2, modules=pattern)


@pytest.mark.parametrize("kind", ["integers", "matrix", "block", "type"])
def test_other_tensors_that_differ_are_told(tmp_path, kind):
    """Buffers of integers, matrices that are no weights, blocks of experts, another type."""
    extra = {
        "integers": np.arange(4),
        "matrix": np.ones((3, 4), np.float32),
        "block": np.ones((2, 3, 4), np.float32),
        "type": np.full(3, 0.1, np.float32),
    }[kind]
    other = extra.astype(np.float16) if kind == "type" else extra * 2
    write(tmp_path / "base", model() | {"extra": extra})
    write(tmp_path / "same", tune(model(), rank=2) | {"extra": extra})
    write(tmp_path / "tuned", tune(model(), rank=2) | {"extra": other})
    extract(tmp_path / "base", tmp_path / "same", rank=4)
    with pytest.warns(LotrWarning, match="extra"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=4)


def test_a_key_in_two_shards_is_read_where_the_index_says(tmp_path):
    """A stale copy in the other shard is neither read nor changed."""
    base_dir, _, base, tuned = pair(tmp_path, rank=2, shards=2)
    key = "encoder.layer.0.attention.self.query.weight"
    last = base_dir / "model-00002-of-00002.safetensors"
    stale = {k: x for k, x in read(base_dir)[0].items() if k in safetensors.numpy.load_file(last)}
    safetensors.numpy.save_file(stale | {key: np.zeros((D, D), np.float32)}, last)
    adapter = full(tmp_path)
    assert distance(dense_deltas(adapter), deltas(base, tuned)) < 1e-5
    merge(base_dir, adapter, tmp_path / "merged")
    first = safetensors.numpy.load_file(tmp_path / "merged" / "model-00001-of-00002.safetensors")
    assert first[key] == pytest.approx(tuned[key], abs=1e-5)
    assert not safetensors.numpy.load_file(tmp_path / "merged" / last.name)[key].any()


def dense_deltas(adapter):
    """ΔW of every module of a LoTR in memory."""
    return {
        name: group.tucker2().slice(k)
        for group in adapter.groups
        for k, name in enumerate(group.modules)
    }


# ---------------------------------------------------------------- the output


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("stands", [False, True])
def test_the_output_appears_whole_or_not_at_all(tmp_path, monkeypatch, number, stands):
    """A disk that fills up at any of four files leaves what was there, and nothing beside it."""
    base_dir, _, _, _ = pair(tmp_path, rank=2, shards=3)
    adapter, out = full(tmp_path), tmp_path / "merged"
    if stands:
        write(out, model(seed=9))
    before = snapshot(tmp_path)
    failing = nth_call(shutil.copyfile, number, OSError(28, "No space left on device"))
    monkeypatch.setattr(shutil, "copyfile", failing)
    with pytest.raises(FormatError, match="No space left"):
        merge(base_dir, adapter, out, force=True)
    assert snapshot(tmp_path) == before
    merge(base_dir, adapter, out, force=True)
    assert read(out)[0].keys() == model().keys()


@pytest.mark.parametrize("command", ["merge", "extract"])
def test_no_room_for_the_output(tmp_path, command):
    """The operating system refuses to write that much: one sentence, and nothing is left."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    full(tmp_path).save(tmp_path / "adapter")
    before = snapshot(tmp_path)
    arguments = {
        "merge": [tmp_path / "adapter", "--base", base_dir],
        "extract": ["--base", base_dir, "--tuned", tuned_dir, "--rank", 4],
    }
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    found = lotr_process(command, *arguments[command], "-o", tmp_path / "out", prelude=limit)
    assert_refused(found, "out", "cannot be written")
    assert snapshot(tmp_path) == before


def test_a_failed_rename_restores_what_stood_there(tmp_path, monkeypatch):
    """The old checkpoint is moved back."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    adapter, out = full(tmp_path), tmp_path / "merged"
    write(out, model(seed=9))
    before = snapshot(tmp_path)
    path_type = type(out)
    failing = nth_call(path_type.rename, 2, OSError(5, "Input/output error"))
    monkeypatch.setattr(path_type, "rename", failing)
    with pytest.raises(FormatError, match="cannot be written"):
        merge(base_dir, adapter, out, force=True)
    assert snapshot(tmp_path) == before


def test_outputs_that_stand_there(tmp_path):
    """Refused without --force; with it only a checkpoint is replaced, whole."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    full(tmp_path).save(tmp_path / "adapter")
    command = ["merge", tmp_path / "adapter", "--base", base_dir, "-o"]
    out = write(tmp_path / "out", model(seed=9), shards=2)
    assert_refused(lotr(*command, out), "exists", "--force")
    assert lotr(*command, out, "--force").code == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years")
    assert_refused(lotr(*command, tmp_path / "thesis", "--force"), "no checkpoint")
    (tmp_path / "file").write_text("x")
    assert_refused(lotr(*command, tmp_path / "file", "--force"), "file")
    assert (tmp_path / "thesis" / "draft.txt").read_text() == "years"


@pytest.mark.parametrize("spelling", ["base", "./base", "base/../base", "link"])
def test_the_base_is_no_output(tmp_path, monkeypatch, spelling):
    """However it is spelled, --force or not."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    full(tmp_path).save(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(base_dir)
    before = snapshot(base_dir)
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--force"]):
        found = lotr("merge", "adapter", "--base", "base", "-o", spelling, *more)
        assert_refused(found)
    assert snapshot(base_dir) == before
    assert (tmp_path / "link").is_symlink()


def test_an_output_that_holds_the_base_is_refused(tmp_path):
    """Replacing it would delete the base."""
    outer = write(tmp_path / "outer", model(seed=9))
    base_dir = write(outer / "base", model())
    write(tmp_path / "base", model())
    write(tmp_path / "tuned", tune(model(), rank=2))
    adapter = full(tmp_path)
    before = snapshot(base_dir)
    with pytest.raises(FormatError):
        merge(base_dir, adapter, outer, force=True)
    assert snapshot(base_dir) == before


def test_weights_of_other_forms_are_not_copied(tmp_path):
    """They would be the base's, beside the merged ones; the rest is, of a directory only."""
    base_dir, _, base, _ = pair(tmp_path, rank=2)
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "spiece.model",
    ):
        (base_dir / name).write_text("x")
    adapter = full(tmp_path)
    merge(base_dir, adapter, tmp_path / "merged")
    kept = ["config.json", "model.safetensors", "spiece.model"]
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == kept
    merge(base_dir / "model.safetensors", adapter, tmp_path / "single")
    assert [p.name for p in (tmp_path / "single").iterdir()] == ["model.safetensors"]
    assert read(tmp_path / "single")[0].keys() == base.keys()


def test_the_modules_of_a_sentence_encoder_are_copied(tmp_path):
    """Pooling and dense layers have directories of their own; no path leads elsewhere."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    paths = ["", "1_Pooling", "2_Dense", "../tuned", "absent"]
    (base_dir / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    for name in ("1_Pooling", "2_Dense", "onnx"):
        (base_dir / name).mkdir()
        (base_dir / name / "config.json").write_text(name)
    merge(base_dir, full(tmp_path), tmp_path / "merged")
    found = snapshot(tmp_path / "merged")
    assert found["2_Dense/config.json"] == b"2_Dense"
    assert {name for name, x in found.items() if x == b"(directory)"} == {"1_Pooling", "2_Dense"}
    for text in ("{", "[1]", "3", '[{"name": "x"}]'):
        (base_dir / "modules.json").write_text(text)
        with pytest.raises(FormatError, match=r"modules\.json"):
            merge(base_dir, full(tmp_path), tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_outputs_that_hold_an_input_are_refused(tmp_path):
    """The adapter that is merged, and the checkpoints that are compared, are not replaced."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    out = write(tmp_path / "out", model(seed=9))
    full(tmp_path).save(out / "adapter")
    assert_refused(
        lotr("merge", out / "adapter", "--base", base_dir, "-o", out, "--force"), "adapter"
    )
    outer = write_lora(tmp_path / "outer", bert_pairs(1))
    shutil.copytree(base_dir, outer / "base")
    options = ["--base", outer / "base", "--tuned", tuned_dir, "--rank", 2, "-o", outer, "--force"]
    assert_refused(lotr("extract", *options), "outer/base")
    assert read(outer / "base")[0]


def test_extract_refuses_a_standing_output(tmp_path):
    """As every command does, before any work."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    (tmp_path / "out").mkdir()
    arguments = ["--base", base_dir, "--tuned", tuned_dir, "--rank", 2, "-o", tmp_path / "out"]
    assert_refused(lotr("extract", *arguments), "exists", "--force")
    assert list((tmp_path / "out").iterdir()) == []


def test_adapters_from_elsewhere_in_config(tmp_path):
    """fan_in_fan_out of the config decides how an update is laid on."""
    pairs = {"q": (np.ones((3, 1), np.float32), np.arange(4, dtype=np.float32)[None])}
    write_lora(tmp_path / "lora", pairs)
    edit_config(tmp_path / "lora", fan_in_fan_out=True)
    write(tmp_path / "base", {"q.weight": np.zeros((4, 3), np.float32)})
    merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")
    expected = 2 * np.arange(4)[:, None] * np.ones(3)
    assert np.array_equal(read(tmp_path / "out")[0]["q.weight"], expected)


# ---------------------------------------------------------------- memory


@unconverged
def test_few_slices_are_in_memory(tmp_path):
    """Twenty deltas of a mebibyte each: the peak is that of a few."""
    size, slices = 512, 20
    rng = np.random.default_rng(0)
    one = rng.standard_normal((size, size), np.float32)
    base = {f"h.{i}.q.weight": one for i in range(slices)}
    tuned = {key: one + np.float32(0.01 * (i + 1)) * one[::-1] for i, key in enumerate(base)}
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    tracemalloc.start()
    extract(tmp_path / "base", tmp_path / "tuned", rank=4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 8 * one.nbytes


@unconverged
@pytest.mark.parametrize("goal", [{"rank": 4}, {"tolerance": 0.5}])
def test_a_lora_takes_the_memory_of_a_few_slices(tmp_path, goal):
    """Beside its own factors."""
    size, slices = 256, 20
    rng = np.random.default_rng(0)
    one = rng.standard_normal((size, size), np.float32)
    tuned = {f"h.{i}.q.weight": one * np.float32(i + 2) for i in range(slices)}
    for i, x in enumerate(tuned.values()):
        x[:, :4] += 100 * (i + 1)
    write(tmp_path / "base", {key: one for key in tuned})
    write(tmp_path / "tuned", tuned)
    both = tmp_path / "base", tmp_path / "tuned"
    tracemalloc.start()
    adapter = extract(*both, form="lora", dtype="float32", **goal)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    factors = sum(module.B.nbytes + module.A.nbytes for module in adapter.modules)
    assert peak <= 3 * factors + 10 * one.nbytes


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
