"""Bad input: one sentence, exit code 1, nothing written, an existing output untouched."""

from __future__ import annotations

import json
import os
import random
import struct
import warnings

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    assert_refused,
    bert_pairs,
    edit_config,
    lotr,
    lotr_process,
    raw_safetensors,
    read_arrays,
    read_config,
    read_header,
    snapshot,
    write_adapter,
    write_lora,
)
from damaged_files import DAMAGED, QUERY, A, bad_tensors, lora, with_value


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Thousands of small writes; that they reach the disk is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- damaged inputs -------------------------------------------------------------------------------


def commands(path, out):
    """Every command that reads an adapter."""
    return [
        ["inspect", path],
        ["convert", path, "-o", out, "--rank", 1],
        ["export", path, "-o", out],
        ["verify", path, path],
    ]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_adapter_is_refused_by_every_command(tmp_path, damage):
    path, out = tmp_path / "adapter", tmp_path / "out"
    parts = DAMAGED[damage](path)
    before = snapshot(tmp_path)
    for command in [*commands(path, out), ["inspect", path, "--json"]]:
        assert_refused(lotr(*command), *parts)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_adapter_leaves_an_existing_output_alone(tmp_path, damage):
    path = tmp_path / "adapter"
    parts = DAMAGED[damage](path)
    out = lora(tmp_path / "out")
    before = snapshot(tmp_path)
    assert_refused(lotr("convert", path, "-o", out, "--rank", 1, "--force"), *parts)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_python_api_says_the_same(tmp_path, damage):
    path = tmp_path / "adapter"
    parts = DAMAGED[damage](path)
    with pytest.raises(lt.LotrError) as caught:
        lt.convert(lt.load(path), rank=1)
    if "cannot be read" not in str(caught.value):  # safetensors names any one of two tensors
        assert lotr("inspect", path).err == f"lotr: error: {caught.value}\n"
    for part in parts:
        assert str(part) in str(caught.value)


def test_in_a_process_of_its_own(tmp_path):
    """Once for real: no traceback, one line, nothing written."""
    path, out = tmp_path / "adapter", tmp_path / "out"
    parts = bad_tensors(with_value(np.nan), A)(path)
    assert_refused(lotr_process("convert", path, "-o", out, "--rank", 1), *parts)
    assert not out.exists()


def test_a_path_that_no_file_system_takes(tmp_path):
    long = "x" * 300
    good = lora(tmp_path / "good")
    for command in (
        ["inspect", long],
        ["convert", long, "-o", tmp_path / "out", "--rank", 1],
        ["convert", good, "-o", tmp_path / long, "--rank", 1],
        ["verify", good, long],
        ["export", good, "-o", tmp_path / long],
    ):
        assert_refused(lotr(*command), long)


def test_the_home_of_nobody(tmp_path):
    good = lora(tmp_path / "good")
    assert_refused(lotr("inspect", "~nobody-of-this-name/x"), "nobody-of-this-name")
    out = "~nobody-of-this-name/out"
    assert_refused(lotr("convert", good, "-o", out, "--rank", 1), "nobody-of-this-name")


# --- bad options on good adapters -----------------------------------------------------------------

OPTIONS = {
    "rank_0": (["--rank", "0"], ["rank", "0"]),
    "rank_negative": (["--rank", "-3"], ["rank", "-3"]),
    "rank_too_large": (["--rank", "11"], ["rank", "11"]),
    "rank_enormous": (["--rank", str(10**30)], ["rank"]),
    "dtype_unknown": (["--rank", "1", "--dtype", "float8"], ["float8", "bfloat16"]),
    "dtype_integer": (["--rank", "1", "--dtype", "int8"], ["int8", "bfloat16"]),
    "dtype_empty": (["--rank", "1", "--dtype", ""], ["dtype"]),
    "pattern_no_regex": (["--rank", "1", "--group-by", "x=("], ["x=("]),
    "pattern_matches_nothing": (["--rank", "1", "--group-by", "k_proj"], ["k_proj"]),
    "pattern_mixes_shapes": (
        ["--rank", "1", "--group-by", "all=."],
        ["all", "(12, 10)", "(20, 10)"],
    ),
    "pattern_empty": (["--rank", "1", "--group-by", ""], ["group"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_of_convert(tmp_path, case):
    options, parts = OPTIONS[case]
    path = lora(tmp_path / "adapter")
    out = lora(tmp_path / "out", r=3)
    before = snapshot(tmp_path)
    assert_refused(lotr("convert", path, "-o", tmp_path / "new", *options), *parts)
    assert_refused(lotr("convert", path, "-o", out, "--force", *options), *parts)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("rank", [0, -1])
def test_bad_ranks_of_export(tmp_path, rank):
    lt.convert(lt.load(lora(tmp_path / "lora")), rank=2).save(tmp_path / "lotr")
    before = snapshot(tmp_path)
    found = lotr("export", tmp_path / "lotr", "-o", tmp_path / "out", "--rank", rank)
    assert_refused(found, "rank", rank)
    assert snapshot(tmp_path) == before


def test_too_large_for_vllm(tmp_path):
    record = {"name": "q", "modules": ["layers.0.q"], "shape": [520, 530], "rank": [513, 513]}
    record |= {"slice_ranks": [513], "scale": 1.0, "embedding": False, "fit": None}
    config = {"peft_type": "LOTR", "format_version": 1, "groups": [record]}
    tensors = {
        "base_model.lotr_left.q": np.eye(520, 513, dtype="float32"),
        "base_model.lotr_right.q": np.eye(530, 513, dtype="float32"),
        f"{PREFIX}layers.0.q.lotr_core": np.eye(513, dtype="float32"),
    }
    path = write_adapter(tmp_path / "lotr", config, tensors)
    before = snapshot(tmp_path)
    found = lotr("export", path, "-o", tmp_path / "out", "--pad")
    assert_refused(found, "513", "512")
    assert snapshot(tmp_path) == before


def test_the_wrong_kind_of_adapter(tmp_path):
    path = lora(tmp_path / "lora")
    lt.convert(lt.load(path), rank=2).save(tmp_path / "lotr")
    before = snapshot(tmp_path)
    assert_refused(lotr("export", path, "-o", tmp_path / "out"), path, "LoTR")
    assert_refused(
        lotr("convert", tmp_path / "lotr", "-o", tmp_path / "out", "--rank", 1), "LoTR", "export"
    )
    assert snapshot(tmp_path) == before


def test_adapters_of_different_models(tmp_path):
    one = lora(tmp_path / "one")
    pairs = bert_pairs(layers=2) | {
        QUERY: (np.ones((7, 3), "float32"), np.ones((3, 10), "float32"))
    }
    two = write_lora(tmp_path / "two", pairs)
    assert_refused(lotr("verify", one, two), QUERY, "12 × 10", "7 × 10")


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("kind", ["adapter", "directory", "file", "link", "parent is a file"])
def test_outputs_that_stand_in_the_way(tmp_path, kind, force):
    path = lora(tmp_path / "lora")
    lt.convert(lt.load(path), rank=2).save(tmp_path / "lotr")
    out = tmp_path / "out"
    if kind == "adapter":
        lora(out)
        if force:
            return
    elif kind == "directory":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
    elif kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.symlink_to(path)
    else:
        (tmp_path / "file").write_text("precious")
        out = tmp_path / "file" / "out"
    before = snapshot(tmp_path)
    for command in (["convert", path, "--rank", 2], ["export", tmp_path / "lotr"]):
        assert_refused(lotr(*command, "-o", out, *force), out)
        assert snapshot(tmp_path) == before


def test_an_output_is_refused_before_any_work(tmp_path):
    """Even where the input would be refused too: the output is looked at first."""
    out = lora(tmp_path / "out")
    assert_refused(lotr("convert", tmp_path / "missing", "-o", out, "--rank", 1), out, "--force")


# --- any change of any file -----------------------------------------------------------------------

STRANGE = [None, True, False, -1, 0, 1.5, 1e999, "", "x", "(", [], [1], ["("], {}, {"(": 1}]
STRANGE += [{"query": "x"}, {"query": [1]}, {"query": None}, 10**400, [[]], [None], {"a": {}}]


def survives(path, scratch):
    """Read, convert, write, export: each works or raises a LotrError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # huge numbers overflow on their way to a refusal
        try:
            adapter = lt.load(path)
            if isinstance(adapter, lt.LoraAdapter):
                adapter.save(scratch, force=True)
                adapter = lt.convert(adapter, rank=1)
            adapter.save(scratch, force=True)
            assert adapter.relative_error is None or adapter.relative_error >= 0
            exported = lt.load(scratch).to_lora()
            exported.save(scratch, force=True)
            lt.load(scratch)
        except lt.LotrError as error:
            assert str(error)
            assert "\n" not in str(error)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """One adapter of each format."""
    base = tmp_path_factory.mktemp("fuzz")
    extras = {f"{PREFIX}classifier.weight": np.ones((2, 3), dtype="float32")}
    pairs = {QUERY: bert_pairs(layers=1)[QUERY]}
    write_lora(base / "lora", pairs, extras=extras, modules_to_save=["classifier"], use_rslora=True)
    # Ranks (7, 7) against slices of rank 3 are kept as products, the clamped (3, 3) densely.
    queries = {name: pair for name, pair in bert_pairs(layers=3).items() if "query" in name}
    pairs = queries | {"head": (np.ones((12, 3), "float32"), np.ones((3, 10), "float32"))}
    whole = write_lora(base / "whole", pairs, dtype="bfloat16")
    lt.convert(lt.load(whole), rank=7).save(base / "lotr")
    keys = read_arrays(base / "lotr")
    assert {key.rpartition(".")[2] for key in keys if "core" in key} == {
        "lotr_core",
        "lotr_core_left",
        "lotr_core_right",
    }
    return base


def damage_bytes(generator, content):
    """A few flipped bits, a cut, a doubled or a zeroed stretch."""
    changed = bytearray(content)
    kind = generator.randrange(5)
    start = generator.randrange(len(changed))
    stop = min(len(changed), start + generator.randrange(1, 40))
    if kind <= 1:
        for _ in range(generator.randrange(1, 6)):
            # The header is where the harm is.
            place = generator.randrange(min(len(changed), 2500) if kind else len(changed))
            changed[place] ^= 1 << generator.randrange(8)
    elif kind == 2:
        del changed[start:]
    elif kind == 3:
        changed[start:stop] = bytes(stop - start)
    else:
        changed[start:start] = changed[start:stop]
    return bytes(changed)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["lora", "lotr"])
def test_random_damage(valid, tmp_path, kind, name):
    files = {file.name: file.read_bytes() for file in (valid / kind).iterdir()}
    path, scratch = tmp_path / "damaged", tmp_path / "scratch"
    path.mkdir()
    for file, content in files.items():
        (path / file).write_bytes(content)
    survives(path, scratch)
    for seed in range(80):
        changed = damage_bytes(random.Random(f"{kind} {name} {seed}"), files[name])
        (path / name).write_bytes(changed)
        try:
            survives(path, scratch)
        except Exception as error:
            raise AssertionError(f"seed {seed} of {kind}/{name}") from error


LORA_FIELDS = [
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("modules_to_save", "init_lora_weights", "use_dora", "use_bdlora", "target_parameters"),
    *("target_modules", "base_model_name_or_path", "task_type", "trainable_token_indices"),
]


@pytest.mark.parametrize("field", LORA_FIELDS)
def test_any_value_in_any_field_of_a_lora_config(valid, tmp_path, field):
    path = write_adapter(tmp_path / "a", read_config(valid / "lora"), read_arrays(valid / "lora"))
    original = read_config(path)
    for value in STRANGE:
        (path / CONFIG).write_text(json.dumps(original | {field: value}))
        try:
            survives(path, tmp_path / "scratch")
        except Exception as error:
            raise AssertionError(f"{field} = {str(value)[:40]!r}") from error
        if field in ("base_model_name_or_path", "task_type"):
            found = lotr("inspect", path)
            assert found.code in (0, 1), (value, found)


@pytest.mark.parametrize(
    "field",
    ["name", "modules", "shape", "rank", "slice_ranks", "scale", "embedding", "fit"]
    + [f"fit.{name}" for name in ("relative_error", "lower_bound", "norm", "parameters", "bytes")]
    + ["/groups", "/format_version", "/target_modules", "/modules_to_save", "/bias"],
)
def test_any_value_in_any_field_of_a_lotr_config(valid, tmp_path, field):
    path = write_adapter(tmp_path / "a", read_config(valid / "lotr"), read_arrays(valid / "lotr"))
    for value in STRANGE:
        config = read_config(valid / "lotr")
        if field.startswith("/"):
            config[field[1:]] = value
        elif "." in field:
            config["groups"][0]["fit"][field.split(".")[1]] = value
        else:
            config["groups"][0][field] = value
        (path / CONFIG).write_text(json.dumps(config))
        try:
            survives(path, tmp_path / "scratch")
            found = lotr("inspect", path)
        except Exception as error:
            raise AssertionError(f"{field} = {str(value)[:40]!r}") from error
        assert found.code in (0, 1), (value, found)


def test_every_header_field_of_every_tensor(valid, tmp_path):
    whole = (valid / "lora" / WEIGHTS).read_bytes()
    header = read_header(valid / "lora" / WEIGHTS)
    (length,) = struct.unpack("<Q", whole[:8])
    path = write_adapter(tmp_path / "a", read_config(valid / "lora"), {})
    for field in ("dtype", "shape", "data_offsets"):
        for value in [*STRANGE, [3], [3, 10, 1], [-3, -10], "F16", "I32", "BF16", "BOOL"]:
            changed = json.loads(json.dumps(header))
            changed[A][field] = value
            (path / WEIGHTS).write_bytes(raw_safetensors(changed, whole[8 + length :]))
            try:
                survives(path, tmp_path / "scratch")
            except Exception as error:
                raise AssertionError(f"{field} = {str(value)[:40]!r}") from error


def test_a_valid_adapter_passes_the_same_way(tmp_path):
    """The fixtures of this file are valid where nothing is broken."""
    path = lora(tmp_path / "adapter")
    for command in commands(path, tmp_path / "out")[:2]:
        found = lotr(*command)
        assert (found.code, found.err) == (0, "")
    edit_config(path, r=3)
    assert lotr("verify", path, tmp_path / "out").code == 0
