"""Truncating adapters and their files: within what was asked for, the best of their ranks."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from lotrtensor import (
    LotrAdapter,
    OptionError,
    RankError,
    convert,
    load,
    truncate,
)
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.core.fit.truncate import truncate_tucker2
from tests.adapters_fixtures import (
    DTYPES,
    Peft,
    assert_refused,
    assert_same_modules,
    bert_pairs,
    dense_lora,
    dense_lotr,
    distance,
    document,
    lotr,
    quiet,
    read_arrays,
    read_config,
    write_lora,
)


def stored_bytes(path):
    """Bytes of the tensors that a directory holds."""
    return sum(x.nbytes for x in read_arrays(path).values())


def source_deltas(path, dtype):
    """ΔW of every module as the source stores it: alpha = 2 r, so the scale is 2."""
    assert {x.dtype for x in read_arrays(path).values()} == {DTYPES[dtype]}
    return dense_lora(path, 2.0)


def written_deltas(path):
    """ΔW of every module of a LoRA with rank and alpha patterns: the scale is one."""
    config = read_config(path)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"]
    assert not config["use_rslora"]
    return dense_lora(path, 1.0)


def decaying_pairs(layers=4, seed=0, size=1.0):
    """Factors of rank 6 with falling singular values, of unlike norms and shapes."""
    rng, pairs = np.random.default_rng(seed), {}
    for name, (b, a) in bert_pairs(layers, r=6, seed=seed).items():
        u, _, vt = np.linalg.svd(b.astype(float) @ a, full_matrices=False)
        values = size * rng.uniform(0.2, 2) * rng.uniform(0.3, 0.8) ** np.arange(6)
        pairs[name] = ((u[:, :6] * values).astype(np.float32), vt[:6].astype(np.float32))
    return pairs


ALL_DTYPES = list(DTYPES)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("goal", [0.3, 0.1, 0.05])
@pytest.mark.parametrize("command", ["truncate", "convert"])
def test_the_written_file_is_within_the_tolerance(tmp_path, dtype, goal, command):
    """Measured on the two files, storage type included."""
    source = write_lora(tmp_path / "source", decaying_pairs(), dtype=dtype)
    found = lotr(command, source, "-o", tmp_path / "out", "--tolerance", goal)
    assert found.code == 0, found.err
    read = written_deltas if command == "truncate" else dense_lotr
    error = distance(read(tmp_path / "out"), source_deltas(source, dtype))
    assert error <= goal
    assert error > goal / 3
    assert stored_bytes(tmp_path / "out") < stored_bytes(source)
    assert {x.dtype for x in read_arrays(tmp_path / "out").values()} == {DTYPES[dtype]}


@pytest.mark.parametrize("sizes", [(1e-3, 1.0), (1e-4, 1e-4), (1e-5, 1e-5)], ids=str)
@pytest.mark.parametrize("command", ["truncate", "convert"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_updates_are_within_the_tolerance(tmp_path, sizes, command, dtype):
    """Where float16 has few digits left, ranks make room, or the command refuses."""
    source = write_lora(tmp_path / "source", decaying_pairs(), dtype=dtype)
    arrays = read_arrays(source)
    rng = np.random.default_rng(0)
    for key, x in arrays.items():
        size, decay = (sizes[0], 0.6 ** np.arange(6)) if "lora_B" in key else (sizes[1], 1.0)
        arrays[key] = (size * rng.standard_normal(x.shape) * decay).astype(x.dtype)
    safetensors.numpy.save_file(arrays, source / "adapter_model.safetensors")
    for goal in (0.003, 0.01, 0.1):
        out = tmp_path / f"out {goal}"
        found = lotr(command, source, "-o", out, "--tolerance", goal)
        if found.code:
            assert_refused(found, "tolerance")
            continue
        read = written_deltas if command == "truncate" else dense_lotr
        assert distance(read(out), source_deltas(source, dtype)) <= goal


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("energy", [0.8, 0.99])
@pytest.mark.parametrize("command", ["truncate", "convert"])
def test_the_written_file_keeps_the_energy(tmp_path, dtype, energy, command):
    """1 − error² is at least what was asked for."""
    source = write_lora(tmp_path / "source", decaying_pairs(), dtype=dtype)
    found = lotr(command, source, "-o", tmp_path / "out", "--energy", energy)
    assert found.code == 0, found.err
    read = written_deltas if command == "truncate" else dense_lotr
    assert 1 - distance(read(tmp_path / "out"), source_deltas(source, dtype)) ** 2 >= energy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("command", ["truncate", "convert"])
@pytest.mark.parametrize(
    "budget", ["25%", "40%", "99%", "2KB", "2KiB", "5000", "5000B", "900p", "400p"]
)
def test_the_written_tensors_are_within_the_budget(tmp_path, dtype, command, budget):
    """Bytes of the tensors in the file; or a refusal that names the smallest number."""
    source = write_lora(tmp_path / "source", decaying_pairs(3), dtype=dtype)
    itemsize, whole = DTYPES[dtype].itemsize, stored_bytes(source)
    limit = {"2KB": 2000, "2KiB": 2048, "5000": 5000, "5000B": 5000}.get(budget)
    if budget.endswith("%"):
        limit = float(budget[:-1]) / 100 * whole
    elif budget.endswith("p"):
        limit = float(budget[:-1]) * itemsize
    found = lotr(command, source, "-o", tmp_path / "out", "--budget", budget)
    if found.code:
        # Rank 1 everywhere: Σ (m + n) for a LoRA, m + n + K a group for a LoTR.
        smallest = 3 * 22 + 3 * 22 + 3 * 30 if command == "truncate" else 22 + 22 + 30 + 9
        assert_refused(found, "budget", smallest)
        assert limit < smallest * itemsize
        assert not (tmp_path / "out").exists()
        return
    assert stored_bytes(tmp_path / "out") <= limit
    read = written_deltas if command == "truncate" else dense_lotr
    assert distance(read(tmp_path / "out"), source_deltas(source, dtype)) < 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("command", ["truncate", "convert"])
def test_more_budget_is_never_more_error(tmp_path, dtype, command):
    """Over many budgets, measured on the adapters."""
    source = load(write_lora(tmp_path / "source", decaying_pairs(3), dtype=dtype))
    whole = {m.name: m.B.astype(float) @ m.A.astype(float) for m in source.modules}
    errors = []
    for percent in range(18, 100, 6):
        if command == "truncate":
            found = truncate(source, budget=f"{percent}%")
        else:
            found = convert(source, budget=f"{percent}%").to_lora()
        deltas = {m.name: m.B.astype(float) @ m.A.astype(float) for m in found.modules}
        errors.append(distance(deltas, whole))
    rounding = {"float32": 1e-6, "bfloat16": 1e-2}[dtype] if command == "convert" else 1e-9
    assert np.all(np.diff(errors) <= rounding), errors


def test_truncation_by_rank_is_the_dense_truncation(tmp_path):
    """Module by module: the leading singular values of ΔW and nothing else."""
    source = write_lora(tmp_path / "source", decaying_pairs())
    for rank in (1, 3, 6):
        out = tmp_path / f"rank {rank}"
        assert lotr("truncate", source, "-o", out, "--rank", rank).code == 0
        found = written_deltas(out)
        for name, delta in source_deltas(source, "float32").items():
            u, values, vt = np.linalg.svd(delta)
            best = u[:, :rank] * values[:rank] @ vt[:rank]
            assert np.linalg.norm(found[name] - best) <= 1e-6 * np.linalg.norm(delta), name
        assert stored_bytes(out) == stored_bytes(source) * rank // 6


@pytest.mark.parametrize("goal", [("--budget", "50%"), ("--tolerance", "0.2")])
def test_ranks_differ_and_the_allocation_is_optimal(tmp_path, goal):
    """No ranks of at most that size have a smaller error: all slices of two kinds cost 22."""
    pairs = {k: v for k, v in decaying_pairs(3).items() if "intermediate" not in k}
    source = write_lora(tmp_path / "source", pairs)
    assert lotr("truncate", source, "-o", tmp_path / "out", *goal).code == 0
    ranks = {k: x.shape[0] for k, x in read_arrays(tmp_path / "out").items() if "lora_A" in k}
    assert len(set(ranks.values())) > 1
    deltas = source_deltas(source, "float32")
    values = np.sort(
        np.concatenate([np.linalg.svd(d, compute_uv=False)[1:] for d in deltas.values()])
    )
    kept = sum(ranks.values()) - len(ranks)
    best = np.linalg.norm(values[: len(values) - kept])
    error = distance(written_deltas(tmp_path / "out"), deltas)
    norm = np.sqrt(sum(np.linalg.norm(d) ** 2 for d in deltas.values()))
    assert error == pytest.approx(best / norm, rel=1e-5)
    if goal[0] == "--tolerance":
        assert np.linalg.norm(values[: len(values) - kept + 1]) / norm > 0.2


def test_the_document_tells_what_was_written(tmp_path):
    """JSON: the error against the source, sizes before and after."""
    source = write_lora(tmp_path / "source", decaying_pairs(), dtype="bfloat16")
    told = document("truncate", source, "-o", tmp_path / "out", "--budget", "30%")
    truth = distance(written_deltas(tmp_path / "out"), source_deltas(source, "bfloat16"))
    assert told["relative_error"] == pytest.approx(truth, rel=1e-4)
    assert told["bytes"] == stored_bytes(tmp_path / "out") == 2 * told["parameters"]
    assert told["source_bytes"] == stored_bytes(source)


def test_uniform_ranks_are_padded_on_request(tmp_path):
    """One rank for all, the ΔW of that allocation; no patterns."""
    source = write_lora(tmp_path / "source", decaying_pairs())
    one = ["--allocation", "uniform"]
    for name, more in (("own", []), ("one", one), ("uniform", ["--uniform"])):
        assert lotr("truncate", source, "-o", tmp_path / name, "--tolerance", 0.2, *more).code == 0
    config = read_config(tmp_path / "uniform")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert len({x.shape[0] for k, x in read_arrays(tmp_path / "uniform").items() if "A" in k}) == 1
    assert distance(written_deltas(tmp_path / "uniform"), written_deltas(tmp_path / "one")) == 0
    assert read_config(tmp_path / "own")["rank_pattern"]


def test_a_lotr_stays_a_lotr(tmp_path):
    """The same groups at lower ranks, within a tolerance against the LoTR."""
    source = write_lora(tmp_path / "source", decaying_pairs())
    assert lotr("convert", source, "-o", tmp_path / "lotr", "--rank", 8).code == 0
    before = dense_lotr(tmp_path / "lotr")
    for goal in (["--rank", 2], ["--tolerance", 0.2], ["--budget", "40%"], ["--energy", 0.9]):
        out = tmp_path / goal[0]
        found = lotr("truncate", tmp_path / "lotr", "-o", out, *goal)
        assert found.code == 0, found.err
        groups = read_config(out)["groups"]
        assert [g["name"] for g in groups] == [
            g["name"] for g in read_config(tmp_path / "lotr")["groups"]
        ]
        assert stored_bytes(out) < stored_bytes(tmp_path / "lotr")
        error = distance(dense_lotr(out), before)
        if goal[0] == "--tolerance":
            assert error <= 0.2
        if goal[0] == "--energy":
            assert 1 - error**2 >= 0.9
    assert stored_bytes(tmp_path / "--budget") <= 0.4 * stored_bytes(tmp_path / "lotr")


def test_a_lotr_at_its_own_rank_is_itself(tmp_path):
    """Idempotent on files too."""
    write_lora(tmp_path / "lora", decaying_pairs())
    for command, of, out in (("convert", "lora", "a"), ("truncate", "a", "b")):
        assert lotr(command, tmp_path / of, "-o", tmp_path / out, "--rank", 5).code == 0
    assert distance(dense_lotr(tmp_path / "b"), dense_lotr(tmp_path / "a")) < 1e-6


@pytest.mark.parametrize(
    "goal",
    [{"rank": 5}, {"tolerance": 1e-9}, {"budget": "100%"}, {"energy": 1 - 1e-12}],
    ids=lambda goal: next(iter(goal)),
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_lotr_that_keeps_its_ranks_is_left_as_it_is(tmp_path, goal, dtype):
    """Nothing rounds it anew, and nothing makes it larger."""
    source = convert(load(write_lora(tmp_path / "lora", decaying_pairs(), dtype=dtype)), rank=5)
    found = truncate(source, **goal)
    assert found.bytes == source.bytes
    assert found.relative_error == found.lower_bound == 0.0
    for group, before in zip(found.groups, source.groups, strict=True):
        np.testing.assert_array_equal(group.left, before.left)
        np.testing.assert_array_equal(group.right, before.right)
        np.testing.assert_array_equal(group.tucker2().core, before.tucker2().core)
    with pytest.raises(RankError, match=r"\(5, 5\)"):
        truncate(source, rank=6)


@pytest.mark.parametrize("goal", [{"rank": 2}, {"tolerance": 0.2}, {"budget": "40%"}])
@pytest.mark.parametrize("group_by", ["type", "query"])
def test_a_lotr_is_rounded_as_its_tucker2s_are(tmp_path, goal, group_by):
    """The error told is that of the dense slices, near that of `Tucker2.truncate`."""
    lora = load(write_lora(tmp_path / "lora", decaying_pairs(1 if group_by == "query" else 4)))
    source = convert(lora, rank=(6, 4), group_by=group_by)
    found = truncate(source, **goal)
    assert found.bytes < source.bytes
    lost2 = norm2 = 0.0
    for group, before in zip(found.groups, source.groups, strict=True):
        true, written = before.tucker2().to_dense(), group.tucker2().to_dense()
        error = np.linalg.norm(true - written) / np.linalg.norm(true)
        assert group.fit.relative_error == pytest.approx(error, rel=1e-6, abs=1e-12)
        best = truncate_tucker2(before.tucker2(), group.rank).to_dense()
        assert error <= 1.001 * np.linalg.norm(true - best) / np.linalg.norm(true) + 1e-6
        lost2 += np.sum((true - written) ** 2)
        norm2 += np.sum(true**2)
    assert found.relative_error == pytest.approx(np.sqrt(lost2 / norm2), rel=1e-6)
    assert found.relative_error <= goal.get("tolerance", 1.0)
    assert found.source_bytes == source.bytes


@pytest.mark.parametrize("tolerance", [0.5, 1e-3, 1e-12])
def test_a_trained_lotr_is_rounded(tolerance):
    """Factors that are not orthonormal, more columns than rows, a scale beside the cores."""
    rng = np.random.default_rng(0)
    group = LotrGroup(
        name="q",
        modules=("layer.0.q", "layer.1.q"),
        left=rng.standard_normal((5, 7)),
        right=rng.standard_normal((9, 4)),
        cores=tuple(rng.standard_normal((2, 7, 4))),
        slice_ranks=(4, 4),
        scale=0.5,
    )
    found = truncate(LotrAdapter((group,), {}, np.dtype(float)), tolerance=tolerance)
    true, written = group.tucker2().to_dense(), found.groups[0].tucker2().to_dense()
    error = np.linalg.norm(true - written) / np.linalg.norm(true)
    assert found.relative_error == pytest.approx(error, abs=1e-14)
    assert error <= tolerance
    assert found.parameters < group.parameters


@pytest.mark.parametrize("command", ["truncate", "convert"])
@pytest.mark.parametrize(
    "goal", [("--tolerance", 0.1), ("--energy", 0.9), ("--budget", "50%"), ("--rank", 1)]
)
def test_an_adapter_of_zeros(tmp_path, command, goal):
    """A fresh LoRA, B = 0, meets any goal."""
    pairs = {k: (0 * b, a) for k, (b, a) in bert_pairs(2).items()}
    source = write_lora(tmp_path / "source", pairs)
    found = lotr(command, source, "-o", tmp_path / "out", *goal)
    assert found.code == 0, found.err
    assert not any(x.any() for x in dense_lora_or_lotr(tmp_path / "out").values())


def dense_lora_or_lotr(path):
    """ΔW of a directory of either form."""
    return dense_lotr(path) if read_config(path)["peft_type"] == "LOTR" else written_deltas(path)


def test_one_group_of_zeros_beside_others(tmp_path):
    """Gets the smallest ranks and disturbs nothing."""
    pairs = {k: (0 * b if "query" in k else b, a) for k, (b, a) in decaying_pairs().items()}
    source = write_lora(tmp_path / "source", pairs)
    for goal in (("--tolerance", 0.1), ("--budget", "50%")):
        out = tmp_path / goal[0]
        found = lotr("convert", source, "-o", out, *goal)
        assert found.code == 0, found.err
        deltas = dense_lotr(out)
        assert all(not x.any() for name, x in deltas.items() if "query" in name)
        if goal[0] == "--tolerance":
            assert distance(deltas, source_deltas(source, "float32")) <= 0.1


@pytest.mark.parametrize("command", ["truncate", "convert"])
@pytest.mark.parametrize(
    ("goal", "named"),
    [
        (["--tolerance", "0"], "tolerance"),
        (["--tolerance", "1.5"], "tolerance"),
        (["--energy", "1"], "energy"),
        (["--energy", "90"], "energy"),
        (["--budget", "10p"], "budget"),
        (["--budget", "abc"], "budget"),
        (["--rank", "0"], "rank"),
        (["--rank", "2", "--budget", "50%"], "rank and budget"),
        (["--tolerance", "1e-9"], "tolerance"),
    ],
)
def test_goals_that_cannot_be_met(tmp_path, command, goal, named):
    """One sentence, exit code 1, nothing written."""
    # alpha / r = 5/3: the scale that goes into B is rounded, so that no LoRA is the source itself.
    source = write_lora(tmp_path / "source", dtype="bfloat16", lora_alpha=5)
    assert_refused(lotr(command, source, "-o", tmp_path / "out", *goal), named)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_needs_all_its_ranks_is_left_as_it_is(tmp_path):
    """No tolerance is too small for the factors that were read: nothing rounds them anew."""
    source = write_lora(tmp_path / "source", dtype="bfloat16")
    assert lotr("truncate", source, "-o", tmp_path / "out", "--tolerance", "1e-9").code == 0
    assert distance(written_deltas(tmp_path / "out"), source_deltas(source, "bfloat16")) == 0


@pytest.mark.parametrize("goal", [("--budget", "50%"), ("--tolerance", 0.2), ("--energy", 0.9)])
def test_one_rank_for_all_on_request(tmp_path, goal):
    """--allocation uniform: one rank, the goal holds, and free ranks are no worse."""
    source = write_lora(tmp_path / "source", decaying_pairs())
    deltas, errors = source_deltas(source, "float32"), {}
    for allocation in ("uniform", "optimal"):
        out = tmp_path / allocation
        found = lotr("truncate", source, "-o", out, *goal, "--allocation", allocation)
        assert found.code == 0, found.err
        errors[allocation] = distance(written_deltas(out), deltas)
    ranks = {x.shape[0] for k, x in read_arrays(tmp_path / "uniform").items() if "lora_A" in k}
    assert len(ranks) == 1
    if goal[0] == "--budget":
        assert stored_bytes(tmp_path / "uniform") <= 0.5 * stored_bytes(source)
        assert errors["optimal"] <= errors["uniform"]
    else:
        assert stored_bytes(tmp_path / "optimal") <= stored_bytes(tmp_path / "uniform")
        assert errors["uniform"] <= {"--tolerance": 0.2, "--energy": np.sqrt(0.1)}[goal[0]]
    with pytest.raises(OptionError, match="allocation"):
        truncate(load(source), rank=2, allocation="best")


def mixed_pairs():
    """Modules of ranks 6 and 3."""
    return {
        name: (b, a) if "query" in name else (b[:, :3].copy(), a[:3].copy())
        for name, (b, a) in decaying_pairs().items()
    }


@pytest.mark.parametrize("make_pairs", [decaying_pairs, mixed_pairs])
@pytest.mark.parametrize("goal", [("--budget", "50%"), ("--tolerance", 0.3), ("--energy", 0.9)])
def test_padding_keeps_the_goal(tmp_path, goal, make_pairs):
    """--uniform: the file that is written is within the budget, zeros included."""
    pairs = make_pairs()
    ranks = {f"{name}$": b.shape[1] for name, (b, _) in pairs.items()}
    patterns = {"rank_pattern": ranks, "alpha_pattern": ranks, "lora_alpha": 6}
    source = write_lora(tmp_path / "source", pairs, **patterns)
    out = tmp_path / "out"
    found = lotr("truncate", source, "-o", out, *goal, "--uniform")
    assert found.code == 0, found.err
    written = read_arrays(out)
    assert len({x.shape[0] for k, x in written.items() if "lora_A" in k}) == 1
    error = distance(dense_lora(out, 1.0), dense_lora(source, 1.0))
    if goal[0] == "--budget":
        assert stored_bytes(out) <= 0.5 * stored_bytes(source)
        rank = read_config(out)["r"]
        assert stored_bytes(out) * (rank + 1) / rank > 0.5 * stored_bytes(source)
    else:
        assert error <= {"--tolerance": 0.3, "--energy": np.sqrt(0.1)}[goal[0]]


def test_padding_is_for_a_lora(tmp_path):
    """A LoTR has nothing to pad, and two goals are two goals."""
    source = write_lora(tmp_path / "source", decaying_pairs())
    convert(load(source), rank=2).save(tmp_path / "lotr")
    found = lotr("truncate", tmp_path / "lotr", "-o", tmp_path / "out", "--rank", 1, "--uniform")
    assert_refused(found, "--uniform is for a LoRA")
    goals = ("--rank", 1, "--budget", "50%", "--uniform")
    assert_refused(lotr("truncate", source, "-o", tmp_path / "out", *goals), "rank and budget")


@pytest.mark.parametrize("budget", ["1", "0", "1p", "0.1%"])
def test_a_budget_that_pays_nothing_names_the_smallest_size(tmp_path, budget):
    """The size that it names is one that can be had, and no smaller one is."""
    source = write_lora(tmp_path / "source", decaying_pairs(), dtype="bfloat16")
    assert lotr("convert", source, "-o", tmp_path / "shared", "--rank", 2).code == 0
    for command, of in (("truncate", source), ("convert", source), ("truncate", "shared")):
        found = lotr(command, tmp_path / of, "-o", tmp_path / "out", "--budget", budget)
        named = re.search(r"needs (\d+) parameters, (\d+) bytes", found.err)
        assert found.code == 1
        assert int(named[2]) == 2 * int(named[1])
        out = tmp_path / f"{command}-{named[1]}"
        assert lotr(command, tmp_path / of, "-o", out, "--budget", named[2]).code == 0
        assert stored_bytes(out) == int(named[2])
        less = f"{int(named[1]) - 1}p"
        assert lotr(command, tmp_path / of, "-o", tmp_path / "no", "--budget", less).code == 1


def test_options_that_nothing_answers_to(tmp_path):
    """A pair of ranks for a LoRA, an allocation for a LoTR, a rank beyond every module."""
    source = load(write_lora(tmp_path / "source", decaying_pairs()))
    for rank, named in (((2, 3), "one integer"), ("2", "one integer"), (True, "one integer")):
        with pytest.raises(RankError, match=named):
            truncate(source, rank=rank)
    with pytest.raises(RankError, match=r"rank is 100; .* is 6, encoder\.layer\.0.*'s"):
        truncate(source, rank=100)
    shared = convert(source, rank=4)
    assert {group.rank for group in truncate(shared, rank=(2, 3)).groups} == {(2, 3)}
    for allocation in ("uniform", "x"):
        with pytest.raises(OptionError, match=f"allocation is '{allocation}'"):
            truncate(shared, rank=2, allocation=allocation)
    with pytest.raises(RankError, match="no group needs more than"):
        convert(source, rank=100)


@pytest.mark.parametrize("number", [1.5, "2", True, 0])
def test_clusters_are_counted(tmp_path, number):
    """No TypeError from deep inside."""
    source = load(write_lora(tmp_path / "source", decaying_pairs()))
    with pytest.raises(RankError, match="cluster is"):
        convert(source, rank=2, cluster=number)
    with pytest.raises(RankError, match="pair"):
        convert(source, rank=(1, 2, 3), cluster=2)
    two = convert(source, rank=np.int64(2), cluster=np.int64(2))
    assert len(two.groups) == 2 * len(convert(source, rank=2).groups)


def test_truncation_needs_a_goal(tmp_path):
    """Unlike convert, which has a default and says so."""
    source = write_lora(tmp_path / "source", decaying_pairs())
    assert_refused(lotr("truncate", source, "-o", tmp_path / "out"), "nothing given")
    found = lotr("convert", source, "-o", tmp_path / "out")
    assert found.code == 0
    assert "25%" in found.out + found.err
    assert stored_bytes(tmp_path / "out") <= 0.25 * stored_bytes(source)
    found = lotr("convert", source, "-o", tmp_path / "two", "--json")
    told = json.loads(found.out)
    assert told["bytes"] <= 0.25 * told["source_bytes"]
    assert "25%" in found.err


def test_a_default_that_is_too_little(tmp_path):
    """One module of rank 1 cannot be smaller: the message says that nothing was asked for."""
    pairs = {"q": (np.ones((6, 1), np.float32), np.ones((1, 5), np.float32))}
    source = write_lora(tmp_path / "source", pairs)
    found = lotr("convert", source, "-o", tmp_path / "out")
    assert_refused(found, "no rank is given", "25%", "needs 12")


@quiet
@pytest.mark.parametrize("goal", [{"budget": "40%"}, {"tolerance": 0.3}, {"rank": 2}])
def test_peft_loads_ranks_of_every_size(tmp_path, goal):
    """rank_pattern and alpha_pattern as PEFT reads them: the same ΔW, module by module."""
    peft = Peft()
    adapted = peft.adapt(
        peft.bert(3), tmp_path / "source", target_modules=["query", "value", "dense"], r=4
    )
    truth = peft.deltas(adapted)
    ((name, value),) = goal.items()
    out = tmp_path / "out"
    assert lotr("truncate", tmp_path / "source", "-o", out, f"--{name}", value).code == 0
    found = peft.deltas(peft.load(peft.bert(3), out))
    expected = written_deltas(out)
    assert_same_modules(found, expected)
    assert found.keys() == truth.keys()
    if name != "rank":
        assert len({x.shape[0] for k, x in read_arrays(out).items() if "lora_A" in k}) > 1
    if name == "tolerance":
        assert distance(found, truth) <= 0.3
