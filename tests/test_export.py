"""LoTR back to LoRA: exact at the original rank, portable, and the same to the real peft."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    DTYPES,
    PREFIX,
    WEIGHTS,
    Peft,
    assert_same_modules,
    bert_pairs,
    dense,
    dense_lora,
    dense_lotr,
    distance,
    document,
    largest_distance,
    lotr,
    quiet,
    read_arrays,
    read_config,
    read_header,
    write_lora,
)
from lotrtensor import RankError

SIZES = (8, 16, 32, 64, 128, 256, 320, 512)


@pytest.fixture(scope="module")
def peft():
    """The real thing."""
    return Peft()


@pytest.fixture(scope="module")
def lotr_dir(tmp_path_factory):
    """A LoTR of ranks (8, 7) from slices of rank 3, stored in float32."""
    base = tmp_path_factory.mktemp("export")
    lt.convert(lt.load(write_lora(base / "lora")), rank=(8, 7)).save(base / "lotr")
    return base / "lotr"


def truncated(delta, rank):
    """The best approximation of a rank, by a dense singular value decomposition."""
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def every_direction(adapter):
    """The ranks (p, q) that no group needs more of."""
    totals = {}
    for module in adapter.modules:
        key = (re.sub(r"\d+", "*", module.name), module.shape)
        totals[key] = totals.get(key, 0) + module.rank
    pairs = [[min(side, total) for side in shape] for (_, shape), total in totals.items()]
    return tuple(max(pair[i] for pair in pairs) for i in (0, 1))


# --- the real peft, there and back ----------------------------------------------------------------

TRIPS = {
    "bert": ("bert", {"target_modules": ["query", "value", "intermediate.dense"]}),
    "bert_patterns": (
        "bert",
        {
            "target_modules": ["query", "value"],
            "use_rslora": True,
            "rank_pattern": {"value": 2, r"layer\.1[01]\..*query": 3},
            "alpha_pattern": {"query": 5},
        },
    ),
    "bert_embedding": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "bert_bias": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "bert_all_biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "bert_some_layers": (
        "bert",
        {
            "target_modules": ["query"],
            "layers_to_transform": [1, 3],
            "layers_pattern": "layer",
        },
    ),
    "bert_replicated": (
        "bert",
        {"target_modules": ["query"], "layer_replication": [(0, 3), (1, 4)]},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
            "modules_to_save": ["lm_head"],
        },
    ),
    "llama_embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama_tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2, 5]}},
    ),
}


LARGE = ("bert", "bert_patterns")  # layer 10 sorts after layer 2


@quiet
@pytest.mark.parametrize("trip", TRIPS)
def test_lora_to_lotr_to_lora_is_the_same_model(peft, tmp_path, trip):
    kind, fields = TRIPS[trip]
    make = getattr(peft, kind)
    if kind == "bert" and trip not in LARGE:
        make = functools.partial(make, layers=4)
    adapted = peft.adapt(make(), tmp_path / "lora", **fields)
    if "modules_to_save" in fields or "bias" in fields or "trainable_token_indices" in fields:
        peft.torch.manual_seed(2)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.data += 0.1 * peft.torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "lora")
    source = lt.load(tmp_path / "lora")
    adapter = lt.convert(source, rank=every_direction(source))
    adapter.save(tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "back")

    again = peft.load(make(), tmp_path / "back")
    ours = dense(lt.load(tmp_path / "back"))
    found = peft.deltas(again)
    assert_same_modules(ours, found)
    assert_same_modules(dense_lotr(tmp_path / "lotr"), found, tolerance=2e-6)
    original = peft.deltas(adapted)
    assert_same_modules(found, original, tolerance=5e-6)
    expected = peft.outputs(adapted)
    assert np.abs(expected - peft.outputs(make())).max() > 5e-4 * np.abs(expected).max()
    np.testing.assert_allclose(
        peft.outputs(again), expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )


@quiet
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compressed_lotr_through_the_command_line(peft, tmp_path, dtype):
    peft.adapt(peft.bert(), tmp_path / "lora", dtype=dtype, target_modules=["query", "value"])
    assert lotr("convert", tmp_path / "lora", "-o", tmp_path / "lotr", "--rank", 9).code == 0
    assert lotr("export", tmp_path / "lotr", "-o", tmp_path / "back", "--pad").code == 0
    found = peft.deltas(peft.load(peft.bert(), tmp_path / "back"))
    tolerance = 2e-6 if dtype == "float32" else 1e-2
    assert_same_modules(dense_lotr(tmp_path / "lotr"), found, tolerance)
    assert_same_modules(dense(lt.load(tmp_path / "back")), found)


# --- against dense NumPy --------------------------------------------------------------------------


def test_the_original_rank_loses_nothing(lotr_dir, tmp_path):
    """rank(G_k) is at most 3, however large (p, q) = (8, 7) is."""
    lt.load(lotr_dir).to_lora().save(tmp_path / "lora")
    assert read_config(tmp_path / "lora")["r"] == 3
    assert largest_distance(dense_lora(tmp_path / "lora", 1.0), dense_lotr(lotr_dir)) < 2e-6


def test_the_original_rank_loses_nothing_in_float64(tmp_path):
    pairs = {name: (b.astype(float), a.astype(float)) for name, (b, a) in bert_pairs().items()}
    lora = write_lora(tmp_path / "lora", pairs, dtype="float64")
    lt.convert(lt.load(lora), rank=(8, 7)).save(tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "back")
    found = dense_lora(tmp_path / "back", 1.0)
    assert largest_distance(found, dense_lotr(tmp_path / "lotr")) < 1e-13


@pytest.mark.parametrize("rank", [1, 2])
def test_a_lower_rank_is_the_best_there_is(lotr_dir, tmp_path, rank):
    lt.load(lotr_dir).to_lora(rank).save(tmp_path / "lora")
    best = {name: truncated(delta, rank) for name, delta in dense_lotr(lotr_dir).items()}
    assert largest_distance(dense_lora(tmp_path / "lora", 1.0), best) < 1e-5
    assert read_config(tmp_path / "lora")["r"] == rank


def test_factors_that_are_not_orthonormal(tmp_path):
    """A trained U: only U G Vᵀ has meaning, the truncation must see through the factors."""
    rng = np.random.default_rng(0)
    native = tmp_path / "lotr"
    lt.convert(lt.load(write_lora(tmp_path / "lora", bert_pairs(3))), rank=4).save(native)
    tensors = read_arrays(native)
    for key in tensors:
        if "lotr_left" in key or "lotr_right" in key:
            skew = rng.normal(size=(4, 4)) + 2 * np.eye(4)
            tensors[key] = (tensors[key] @ skew * [1, 10, 0.1, 3]).astype("float32")
    import safetensors.numpy

    safetensors.numpy.save_file(tensors, native / WEIGHTS)
    true = dense_lotr(native)
    lt.load(native).to_lora(1).save(tmp_path / "one")
    best = {name: truncated(delta, 1) for name, delta in true.items()}
    assert largest_distance(dense_lora(tmp_path / "one", 1.0), best) < 1e-4
    lt.load(native).to_lora().save(tmp_path / "all")
    kept = {name: truncated(delta, 3) for name, delta in true.items()}
    assert largest_distance(dense_lora(tmp_path / "all", 1.0), kept) < 1e-4


@pytest.mark.parametrize("rank", [3, 4, 1000])
def test_a_larger_rank_than_there_is_changes_nothing(lotr_dir, tmp_path, rank):
    lt.load(lotr_dir).to_lora(rank).save(tmp_path / "lora")
    assert read_config(tmp_path / "lora")["r"] == 3


@pytest.mark.parametrize("rank", [0, -1])
def test_no_rank_at_all(lotr_dir, rank):
    with pytest.raises(RankError, match=f"rank is {rank}"):
        lt.load(lotr_dir).to_lora(rank)


# --- portable -------------------------------------------------------------------------------------


def assert_portable(path, rank):
    """One rank, alpha = r, no other scale rule, and every tensor of the shape that says so."""
    config = read_config(path)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
    assert config["use_rslora"] is False
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert isinstance(config["target_modules"], list | str)
    assert config["inference_mode"] is True
    for key, row in read_header(path / WEIGHTS).items():
        if "lora_A" in key or "embedding_A" in key:
            assert row["shape"][0] == rank
        if "lora_B" in key or "embedding_B" in key:
            assert row["shape"][1] == rank


def mixed_ranks(path):
    """A LoRA whose modules have ranks 1, 2 and 3, and alphas of their own."""
    pairs = {
        name: (b[:, : 1 + i % 3], a[: 1 + i % 3])
        for i, (name, (b, a)) in enumerate(bert_pairs(4).items())
    }
    pattern = {name: b.shape[1] for name, (b, _) in pairs.items()}
    return write_lora(
        path, pairs, rank_pattern=pattern, alpha_pattern={"query": 5}, use_rslora=True
    )


def test_unlike_ranks_are_padded_with_zeros(tmp_path):
    source = lt.load(mixed_ranks(tmp_path / "lora"))
    lt.convert(source, rank=(12, 10)).save(tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "back")
    assert_portable(tmp_path / "back", 3)
    assert largest_distance(dense_lora(tmp_path / "back", 1.0), dense(source)) < 1e-5
    tensors = read_arrays(tmp_path / "back")
    padded = {m.name: m.rank for m in source.modules if m.rank < 3}
    assert padded
    for name, rank in padded.items():
        assert not tensors[f"{PREFIX}{name}.lora_A.weight"][rank:].any()
        assert not tensors[f"{PREFIX}{name}.lora_B.weight"][:, rank:].any()


@quiet
def test_unlike_ranks_can_be_kept_where_only_peft_reads_them(peft, tmp_path):
    fields = {
        "target_modules": ["query", "value"],
        "rank_pattern": {"value": 2, r".*1\..*query": 3},
    }
    adapted = peft.adapt(peft.bert(), tmp_path / "lora", use_rslora=True, **fields)
    lt.load(tmp_path / "lora").save(tmp_path / "out", uniform=False)
    assert_same_modules(dense(lt.load(tmp_path / "out")), peft.deltas(adapted))
    again = peft.load(peft.bert(), tmp_path / "out")
    assert_same_modules(peft.deltas(again), peft.deltas(adapted))
    sizes = [sum(x.size for x in read_arrays(tmp_path / name).values()) for name in ("lora", "out")]
    assert sizes[0] == sizes[1]


def test_kept_ranks_of_a_module_whose_path_ends_like_anothers(tmp_path):
    """PEFT's patterns match the end of a path: that of "q" must not catch "a.q"."""
    pairs = {
        name: (np.ones((4, r), "float32"), np.ones((r, 5), "float32"))
        for name, r in {"a.q": 3, "q": 1, "b.a.q": 2}.items()
    }
    pattern = {"^b.a.q": 2, "^q": 1, "^a.q": 3}
    alphas = {name: 2 * r for name, r in pattern.items()}
    source = lt.load(
        write_lora(tmp_path / "lora", pairs, rank_pattern=pattern, alpha_pattern=alphas)
    )
    source.save(tmp_path / "out", uniform=False)
    again = lt.load(tmp_path / "out")
    assert {m.name: m.rank for m in again.modules} == {"a.q": 3, "q": 1, "b.a.q": 2}
    assert largest_distance(dense(again), dense(source)) < 1e-6


def test_a_lora_saved_as_it_was_read_is_portable_too(tmp_path):
    source = lt.load(mixed_ranks(tmp_path / "lora"))
    source.save(tmp_path / "out")
    assert_portable(tmp_path / "out", 3)
    assert largest_distance(dense_lora(tmp_path / "out", 1.0), dense(source)) < 1e-6
    assert lt.compare(source, lt.load(tmp_path / "out")).relative_error < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 8, 9, 64, 65, 257, 320, 321, 512])
def test_padding_gives_the_sizes_that_vllm_takes(tmp_path, rank):
    rng = np.random.default_rng(rank)
    pairs = {"layers.0.q": (rng.normal(size=(4, rank)), rng.normal(size=(rank, 5)))}
    source = lt.load(write_lora(tmp_path / "lora", pairs))
    source.save(tmp_path / "out", pad=True)
    expected = min(size for size in SIZES if size >= rank)
    assert_portable(tmp_path / "out", expected)
    assert largest_distance(dense_lora(tmp_path / "out", 1.0), dense(source)) < 1e-6


def test_no_padding_above_vllms_largest(tmp_path):
    pairs = {"layers.0.q": (np.ones((4, 513)), np.ones((513, 5)))}
    source = lt.load(write_lora(tmp_path / "lora", pairs))
    with pytest.raises(RankError, match=r"513.*512"):
        source.save(tmp_path / "out", pad=True)
    assert not (tmp_path / "out").exists()
    source.save(tmp_path / "out")
    assert_portable(tmp_path / "out", 513)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_type_is_that_of_the_lotr(tmp_path, dtype):
    lt.convert(lt.load(write_lora(tmp_path / "lora")), rank=(8, 7), dtype=dtype).save(
        tmp_path / "lotr"
    )
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "back")
    assert {x.dtype for x in read_arrays(tmp_path / "back").values()} == {DTYPES[dtype]}
    error = distance(dense_lora(tmp_path / "back", 1.0), dense_lotr(tmp_path / "lotr"))
    assert error < {"float64": 1e-13, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reported_difference_is_that_of_the_file(tmp_path, dtype):
    lt.convert(lt.load(write_lora(tmp_path / "lora")), rank=(8, 7), dtype=dtype).save(
        tmp_path / "lotr"
    )
    for rank in (1, 2):
        out = tmp_path / f"back{rank}"
        answer = document("export", tmp_path / "lotr", "-o", out, "--rank", rank)
        expected = distance(dense_lora(out, 1.0), dense_lotr(tmp_path / "lotr"))
        assert answer["relative_error"] == pytest.approx(expected, rel=1e-5)


def test_what_travels_along(tmp_path):
    extras = {
        f"{PREFIX}classifier.weight": np.arange(6, dtype="float16").reshape(2, 3),
        f"{PREFIX}encoder.layer.0.attention.self.query.bias": np.arange(12, dtype="float32"),
    }
    lora = write_lora(
        tmp_path / "lora",
        extras=extras,
        modules_to_save=["classifier"],
        bias="lora_only",
        fan_in_fan_out=True,
    )
    lt.convert(lt.load(lora), rank=4, dtype="bfloat16").save(tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "back")
    config = read_config(tmp_path / "back")
    assert config["modules_to_save"] == ["classifier"]
    assert (config["bias"], config["fan_in_fan_out"]) == ("lora_only", True)
    assert config["base_model_name_or_path"] == "tiny/bert"
    assert config["target_modules"] == ["dense", "query", "value"]
    tensors = read_arrays(tmp_path / "back")
    for key, value in extras.items():
        assert tensors[key].dtype == value.dtype
        np.testing.assert_array_equal(tensors[key], value)


def test_half_precision_that_cannot_hold_a_factor_is_refused_and_not_written(tmp_path):
    """B of 60000 with a scale of 2 is finite in float32 and infinite in float16."""
    pairs = {"layers.0.q": (np.full((4, 1), 6e4), np.full((1, 5), 1e-3))}
    source = lt.load(write_lora(tmp_path / "lora", pairs, dtype="float16"))
    try:
        source.save(tmp_path / "out")
    except lt.LotrError as error:
        assert "float16" in str(error)
        assert not (tmp_path / "out").exists()
        return
    found = dense_lora(tmp_path / "out", 1.0)
    assert largest_distance(found, dense(source)) < 1e-2


def test_an_embedding_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    stem = f"{PREFIX}words.lora_embedding_"
    extras = {
        stem + "A": rng.normal(size=(3, 50)).astype("float32"),
        stem + "B": rng.normal(size=(6, 3)).astype("float32"),
    }
    source = lt.load(write_lora(tmp_path / "lora", bert_pairs(1), extras=extras))
    lt.convert(source, rank=(3, 3)).save(tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "back")
    tensors = read_arrays(tmp_path / "back")
    assert tensors[stem + "A"].shape == (3, 50)
    assert tensors[stem + "B"].shape == (6, 3)
    assert_portable(tmp_path / "back", 3)
    again = lt.load(tmp_path / "back")
    (module,) = (m for m in again.modules if m.embedding)
    expected = 2.0 * extras[stem + "B"].astype(float) @ extras[stem + "A"].astype(float)
    assert distance({0: dense(again)[module.name]}, {0: expected}) < 1e-5
