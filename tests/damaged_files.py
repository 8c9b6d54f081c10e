"""Every way to damage an adapter that is tried, by name: a function that makes one at a path."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np

from adapters_fixtures import (
    CONFIG,
    INDEX,
    PREFIX,
    WEIGHTS,
    bert_pairs,
    lora_config,
    lora_tensors,
    raw_safetensors,
    read_arrays,
    write_adapter,
    write_lora,
)

QUERY = "encoder.layer.0.attention.self.query"
A, B = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"


def lora(path, **fields):
    """A small valid LoRA."""
    return write_lora(path, bert_pairs(layers=2), **fields)


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
