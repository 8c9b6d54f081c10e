"""Weight deltas of checkpoints to an adapter."""

import itertools
import json
import re
import tracemalloc
import warnings

import numpy as np
import pytest

from lotrtensor import (
    DataError,
    FormatError,
    LoraAdapter,
    LotrError,
    LotrWarning,
    OptionError,
    RankError,
    extract,
    load,
    merge,
)
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.core.fit import tuning
from lotrtensor.verbs._extract import extraction_error
from tests.adapters_fixtures import (
    DTYPES,
    Peft,
    assert_refused,
    assert_same_modules,
    dense_lora,
    dense_lotr,
    distance,
    lotr,
    lotr_process,
    quiet,
    read_arrays,
    read_config,
)
from tests.checkpoint_fixtures import (
    D,
    F,
    V,
    deltas,
    full,
    model,
    pair,
    read,
    tune,
    write,
)

unconverged = pytest.mark.filterwarnings("ignore:.*did not converge:lotrtensor.errors.LotrWarning")


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
    arguments = ["--base", base_dir, "--tuned", tuned_dir, "--rank", 9, "--fan-in-fan-out", "."]
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


# ---------------------------------------------------------------- refusals


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


# ---------------------------------------------------------------- output


def test_extract_refuses_a_standing_output(tmp_path):
    """As every command does, before any work."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    (tmp_path / "out").mkdir()
    arguments = ["--base", base_dir, "--tuned", tuned_dir, "--rank", 2, "-o", tmp_path / "out"]
    assert_refused(lotr("extract", *arguments), "exists", "--force")
    assert list((tmp_path / "out").iterdir()) == []


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


# ---------------------------------------------------------------- resized, renamed, and nothing


@pytest.mark.parametrize("rows", [(20, 23), (23, 20)])
@pytest.mark.parametrize("form", ["lotr", "lora"])
def test_the_rows_in_common_of_a_resized_vocabulary(tmp_path, rows, form):
    """Refused; on request with the base's shape, zero where the tuned one has no row."""
    rng = np.random.default_rng(0)
    for name, count in zip(("base", "tuned"), rows, strict=True):
        write(tmp_path / name, {"embed_tokens.weight": rng.random((count, D), np.float32)})
    both = tmp_path / "base", tmp_path / "tuned"
    with pytest.raises(FormatError, match=r"resized.*--resized common-rows"):
        extract(*both, rank=D, form=form)
    with pytest.warns(LotrWarning, match=r"3 rows more; the 20 rows in common"):
        adapter = extract(*both, rank=D, form=form, resized="common-rows", dtype="float32")
    (module,) = (adapter if form == "lora" else adapter.to_lora()).modules
    before, after = (read(path)[0]["embed_tokens.weight"] for path in both)
    expected = np.zeros((rows[0], D))
    expected[:20] = after[:20].astype(float) - before[:20]
    assert pytest.approx(expected, abs=1e-5) == (module.B @ module.A).T
    if form == "lora":
        error = extraction_error(*both, adapter, resized="common-rows")
        assert error == pytest.approx(0, abs=1e-6)


def test_other_shapes_are_not_called_resized(tmp_path):
    """Columns that differ are another model's."""
    write(tmp_path / "base", {"q.weight": np.ones((4, 4), np.float32)})
    write(tmp_path / "tuned", {"q.weight": np.ones((4, 5), np.float32)})
    for resized in ("refuse", "common-rows"):
        with pytest.raises(FormatError, match="different models"):
            extract(tmp_path / "base", tmp_path / "tuned", rank=1, resized=resized)
    with pytest.raises(OptionError, match="resized is 'rows'"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1, resized="rows")


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("mlp.experts.gate_up_proj", r"1 tensors.*gate_up_proj \(2 × 3 × 4\).*no LoTR form"),
        ("conv.weight", r"conv\.weight"),
        (None, "same weights"),
    ],
)
def test_nothing_differs_is_said_where_nothing_does(tmp_path, extra, parts):
    """Else what differs is named."""
    block = np.ones((2, 3, 4), np.float32)
    more = {extra: block} if extra else {}
    write(tmp_path / "base", model() | more)
    write(tmp_path / "tuned", model() | {key: 2 * x for key, x in more.items()})
    with pytest.raises(FormatError, match=parts):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1)


def test_what_a_pattern_leaves_out_is_not_nothing(tmp_path):
    """The weights that it matches are the same, others are not."""
    write(tmp_path / "base", model())
    write(tmp_path / "tuned", tune(model(), pattern="query"))
    with pytest.raises(FormatError, match=r"no weight that the pattern.*query"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1, modules="intermediate")


def test_checkpoints_that_name_their_weights_differently(tmp_path):
    """As two releases of transformers do for one vision-language model; the base's names stay."""
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.q_proj.weight" for i in range(2)]
    before, after = ({n: rng.random((D, F), np.float32) for n in names} for _ in range(2))
    write(tmp_path / "base", {f"language_model.model.{n}": x for n, x in before.items()})
    write(tmp_path / "tuned", {f"model.language_model.{n}": x for n, x in after.items()})
    with pytest.warns(LotrWarning, match=r"is taken for language_model\.model\.layers"):
        adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=D, form="lora")
    assert len(adapter.modules) == 2
    for module in adapter.modules:
        name = module.name.removeprefix("language_model.model.") + ".weight"
        assert pytest.approx(after[name] - before[name], abs=1e-5) == module.B @ module.A


def test_some_names_that_both_have(tmp_path):
    """The rest is found under other prefixes all the same; a shape that differs is not."""
    rng = np.random.default_rng(0)
    head = {"lm_head.weight": np.eye(4, dtype=np.float32), "q.weight": rng.random((2, 2), "f4")}
    before, after = (rng.random((4, 4), np.float32) for _ in range(2))
    write(tmp_path / "base", head | {"layers.0.v.weight": before})
    write(tmp_path / "tuned", head | {"bert.layers.0.v.weight": after, "bert.q.weight": before})
    with pytest.warns(LotrWarning) as told:
        adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=4, form="lora")
    assert "other names for 1 tensors; bert.layers.0.v.weight" in str(told[0].message)
    assert "1 tensors differ" in str(told[1].message)
    (module,) = adapter.modules
    assert module.name == "layers.0.v"
    assert pytest.approx(after - before, abs=1e-5) == module.B @ module.A


def test_the_error_of_large_numbers_is_summed_in_double_precision(tmp_path):
    """Squares beyond float32."""
    base = {"q.weight": np.zeros((4, 4), np.float32)}
    tuned = {"q.weight": np.diag([3e19, 4e19, 0, 0]).astype(np.float32)}
    both = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    nothing = LoraAdapter(
        (LoraModule("q", np.diag([0, 4e19, 0, 0]), np.eye(4)),), {}, np.dtype("float32")
    )
    assert extraction_error(*both, nothing) == pytest.approx(0.6)


def test_the_error_of_shared_factors_is_the_one_that_extract_states(tmp_path):
    both = write(tmp_path / "base", model()), write(tmp_path / "tuned", tune(model()))
    adapter = extract(*both, rank=4)
    assert extraction_error(*both, adapter) == pytest.approx(adapter.relative_error, rel=1e-4)
