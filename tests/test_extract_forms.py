"""Extracted adapters in the forms that others read."""

import itertools
import json
import re

import numpy as np
import pytest

from lotrtensor import (
    LotrError,
    LotrWarning,
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
    dense_lora,
    dense_lotr,
    distance,
    lotr,
    quiet,
    read_arrays,
    read_config,
)
from tests.checkpoint_fixtures import (
    D,
    V,
    deltas,
    full,
    model,
    pair,
    read,
    tune,
    write,
)

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
    monkeypatch.setattr(tuning, "FULL_SVD_SIDE", 0)
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
