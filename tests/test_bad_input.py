"""Bad input: one sentence, exit code 1, nothing written, an existing output untouched."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import warnings

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    CONFIG,
    INDEX,
    PREFIX,
    WEIGHTS,
    assert_refused,
    bert_pairs,
    edit_config,
    lora_config,
    lora_tensors,
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

QUERY = "encoder.layer.0.attention.self.query"
A, B = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"


def lora(path, **fields):
    """A small valid LoRA."""
    return write_lora(path, bert_pairs(layers=2), **fields)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Thousands of small writes; that they reach the disk is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- damaged inputs -------------------------------------------------------------------------------
# Each makes a damaged adapter at a path, and returns the words that the refusal must hold.


def missing(path):
    return [path, "does not exist"]


def a_file(path):
    path.write_text("hello")
    return [path, "file", CONFIG]


def the_weights_themselves(path):
    (lora(path.parent / "real") / WEIGHTS).rename(path)
    return [path, CONFIG]


def empty_directory(path):
    path.mkdir()
    return [path, CONFIG]


def config_is_a_directory(path):
    lora(path)
    (path / CONFIG).unlink()
    (path / CONFIG).mkdir()
    return [path, CONFIG]


def bad_config(content):
    def build(path):
        lora(path)
        (path / CONFIG).write_bytes(content)
        return [path, CONFIG]

    return build


def bad_weights(content):
    def build(path):
        lora(path)
        whole = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(content(whole) if callable(content) else content)
        return [path / WEIGHTS]

    return build


def bad_header(change):
    """A true file whose header tells something else."""

    def build(path):
        lora(path)
        whole = (path / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8 : 8 + length])
        change(header)
        (path / WEIGHTS).write_bytes(raw_safetensors(header, whole[8 + length :]))
        return [path / WEIGHTS]

    return build


def offsets_beyond_the_file(header):
    header[A]["data_offsets"][1] += 10**9


def overlapping_offsets(header):
    header[B]["data_offsets"] = header[A]["data_offsets"]


def negative_offsets(header):
    header[A]["data_offsets"] = [-4, 4]


def shape_and_size_disagree(header):
    header[A]["shape"][0] += 1


def enormous_shape(header):
    header[A]["shape"] = [2**62, 2**62]


def unknown_dtype(header):
    header[A]["dtype"] = "F33"


def no_offsets(header):
    del header[A]["data_offsets"]


def bad_tensors(change, *parts):
    """A valid file whose tensors make no adapter; ``parts`` are named beside the path."""

    def build(path):
        tensors = lora_tensors(bert_pairs(layers=2))
        change(tensors)
        write_adapter(path, lora_config(3), tensors)
        return [path, *parts]

    return build


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


def drop(key):
    return lambda tensors: tensors.pop(key)


def with_value(value, dtype="float32"):
    def change(tensors):
        tensors[A] = tensors[A].astype(dtype)
        tensors[A][1, 2] = value

    return change


def scales_of_blocks(path):
    """Written by hand: powers of two in eight bits, which scale blocks of other numbers."""
    lora(path)
    tensors = read_arrays(path)
    data, header = b"", {}
    for key, x in tensors.items():
        content = x.astype("float32").tobytes() if key != A else bytes(x.size)
        header[key] = {
            "dtype": "F8_E8M0" if key == A else "F32",
            "shape": list(x.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    (path / WEIGHTS).write_bytes(raw_safetensors(header, data))
    return [path, A, "dtype"]


def only_a_pickle(path):
    lora(path)
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    return [path, "adapter_model.bin", "save_pretrained"]


def no_weights(path):
    lora(path)
    (path / WEIGHTS).unlink()
    return [path, WEIGHTS]


def bad_field(*parts, **fields):
    def build(path):
        lora(path, **fields)
        return [path, *parts]

    return build


def bad_index(index, *parts):
    def build(path):
        lora(path)
        (path / WEIGHTS).rename(path / "part.safetensors")
        text = index if isinstance(index, str) else json.dumps(index)
        (path / INDEX).write_text(text)
        return [path, INDEX, *parts]

    return build


def a_key_with_a_line_break(path):
    write_lora(path, extras={"mystery\nlotr: all is well": np.ones(3, dtype="float32")})
    return [path, "mystery"]


def saves_a_number(path):
    extras = {f"{PREFIX}classifier.weight": np.ones((2, 3), dtype="float32")}
    lora(path, extras=extras, modules_to_save=5)
    return [path, "modules_to_save"]


DAMAGED = {
    "missing": missing,
    "a_file": a_file,
    "the_weights_themselves": the_weights_themselves,
    "empty_directory": empty_directory,
    "config_is_a_directory": config_is_a_directory,
    "empty_config": bad_config(b""),
    "invalid_json": bad_config(b'{"peft_type": "LORA",'),
    "json_list": bad_config(b'["LORA"]'),
    "json_null": bad_config(b"null"),
    "json_of_another_encoding": bad_config('{"peft_type": "LORA"}'.encode("utf-16")),
    "json_nested_too_deeply": bad_config(b'{"a": ' + b"[" * 200_000),
    "json_number_too_long": bad_config(b'{"r": ' + b"1" * 6000 + b"}"),
    "empty_weights": bad_weights(b""),
    "seven_bytes": bad_weights(bytes(7)),
    "header_length_only": bad_weights(struct.pack("<Q", 100)),
    "header_longer_than_file": bad_weights(lambda whole: struct.pack("<Q", 2**40) + whole[8:]),
    "header_is_no_json": bad_weights(raw_safetensors(b"{nonsense", b"")),
    "header_is_a_list": bad_weights(raw_safetensors(b"[]", b"")),
    "truncated_header": bad_weights(lambda whole: whole[:60]),
    "truncated_data": bad_weights(lambda whole: whole[:-1]),
    "one_byte_too_many": bad_weights(lambda whole: whole + b"x"),
    "half_the_file": bad_weights(lambda whole: whole[: len(whole) // 2]),
    "a_pickle_under_the_right_name": bad_weights(pickle.dumps({"a": 1})),
    "a_git_lfs_pointer": bad_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "offsets_beyond_the_file": bad_header(offsets_beyond_the_file),
    "overlapping_offsets": bad_header(overlapping_offsets),
    "negative_offsets": bad_header(negative_offsets),
    "shape_and_size_disagree": bad_header(shape_and_size_disagree),
    "enormous_shape": bad_header(enormous_shape),
    "unknown_dtype_in_header": bad_header(unknown_dtype),
    "no_offsets": bad_header(no_offsets),
    "a_without_b": bad_tensors(drop(B), A),
    "b_without_a": bad_tensors(drop(A), B),
    "inner_shapes_differ": bad_tensors(put(B, np.ones((12, 4), "float32")), A, B, "(12, 4)"),
    "outer_shapes_swapped": bad_tensors(put(A, np.ones((10, 3), "float32")), A, "(10, 3)"),
    "a_vector": bad_tensors(put(A, np.ones(30, "float32")), A, "(30,)"),
    "a_scalar": bad_tensors(put(A, np.float32(1)), A),
    "a_cube": bad_tensors(put(A, np.ones((3, 5, 2), "float32")), A),
    "a_convolution": bad_tensors(put(A, np.ones((3, 10, 1, 1), "float32")), A, "convolution"),
    "rank_zero": bad_tensors(
        lambda t: t.update({A: np.ones((0, 10), "float32"), B: np.ones((12, 0), "float32")}),
        "(0, 10)",
    ),
    "no_columns": bad_tensors(put(A, np.ones((3, 0), "float32")), A),
    "nan": bad_tensors(with_value(np.nan), A, "NaN"),
    "inf": bad_tensors(with_value(np.inf), A, "infinite"),
    "minus_inf_in_float16": bad_tensors(with_value(-np.inf, "float16"), A, "infinite"),
    "nan_in_float64": bad_tensors(with_value(np.nan, "float64"), A, "NaN"),
    "int8": bad_tensors(put(A, np.ones((3, 10), "int8")), A, "int8", "float32"),
    "bool": bad_tensors(put(A, np.ones((3, 10), "bool")), A, "bool"),
    "complex": bad_tensors(put(A, np.ones((3, 10), "complex64")), A, "complex64"),
    "scales of blocks": scales_of_blocks,
    "unknown_tensor": bad_tensors(put("mystery", np.ones(3, "float32")), "mystery"),
    "no_lora_tensors": bad_tensors(lambda t: t.clear()),
    "a_key_with_a_line_break": a_key_with_a_line_break,
    "only_a_pickle": only_a_pickle,
    "no_weights": no_weights,
    "unknown_peft_type": bad_field("peft_type", "'NEW'", peft_type="NEW"),
    "no_peft_type": bad_field("peft_type", "None", peft_type=None),
    "config_says_another_rank": bad_field(A.replace(".weight", ""), "4", "3", r=4),
    "pattern_says_another_rank": bad_field(QUERY, "2", rank_pattern={"query": 2}),
    "rank_is_nothing": bad_field("rank", r=None),
    "rank_is_a_word": bad_field("'three'", r="three"),
    "alpha_is_a_word": bad_field("lora_alpha", "'big'", lora_alpha="big"),
    "alpha_is_nothing": bad_field("lora_alpha", lora_alpha=None),
    "alpha_is_nan": bad_field("lora_alpha", lora_alpha=float("nan")),
    "alpha_is_huge": bad_field("alpha", lora_alpha=1e300),
    "alpha_is_an_enormous_integer": bad_field("alpha", lora_alpha=10**400),
    "alpha_is_a_list": bad_field("lora_alpha", lora_alpha=[1]),
    "patterns_are_a_list": bad_field("rank_pattern", rank_pattern=["query"]),
    "patterns_are_a_word": bad_field("alpha_pattern", alpha_pattern="query"),
    "pattern_is_no_regex": bad_field("rank_pattern", "(", rank_pattern={"(": 3}),
    "alpha_pattern_is_no_regex": bad_field("alpha_pattern", "*", alpha_pattern={"*": 3}),
    "modules_to_save_is_a_number": saves_a_number,
    "dora": bad_field("DoRA", use_dora=True),
    "index_names_a_missing_shard": bad_index({"weight_map": {A: "gone.safetensors"}}, "gone"),
    "index_names_a_missing_tensor": bad_index(
        {"weight_map": {"ghost": "part.safetensors"}}, "ghost"
    ),
    "index_leaves_the_directory": bad_index({"weight_map": {A: "../part.safetensors"}}, ".."),
    "index_names_an_absolute_path": bad_index({"weight_map": {A: "/etc/passwd"}}, "/etc/passwd"),
    "index_names_the_parent": bad_index({"weight_map": {A: ".."}}, ".."),
    "index_names_nothing": bad_index({"weight_map": {A: ""}}),
    "index_names_a_number": bad_index({"weight_map": {A: 3}}, "3"),
    "index_without_a_map": bad_index({"metadata": {}}, "weight_map"),
    "index_with_an_empty_map": bad_index({"weight_map": {}}, "weight_map"),
    "index_with_a_list": bad_index({"weight_map": [A]}, "weight_map"),
    "index_is_no_json": bad_index("{", "JSON"),
    "index_is_a_list": bad_index("[]"),
}


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
