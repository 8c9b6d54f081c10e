"""Files that contradict themselves, change while they are read, or are no files at all.

Each is refused in a `LotrError`, or read as the file that the index names; none allocates more
than it holds, none kills the process.
"""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lotrtensor as lt
from lotrtensor.adapters.formats import header, tensors
from lotrtensor.adapters.formats.checkpoint import open_checkpoint
from lotrtensor.adapters.formats.json_text import DEEPEST, parse_json
from tests.adapters_fixtures import CONFIG, INDEX, PREFIX, WEIGHTS, write_lora
from tests.checkpoint_fixtures import model, write

KEY = PREFIX + "layers.0.q.lora_"


def raw(path, entries, blob=b"", metadata=None):
    """A safetensors file whose header is any JSON text or object."""
    text = entries if isinstance(entries, str) else json.dumps(entries | (metadata or {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + blob)
    return path


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def sharded(path, shards, weight_map):
    """A LoRA whose index is written by hand; shards are {name: {key: array}}."""
    write_lora(path)
    (path / WEIGHTS).unlink()
    config = json.loads((path / CONFIG).read_text()) | {"r": 2, "lora_alpha": 2}
    (path / CONFIG).write_text(json.dumps(config))
    for name, arrays in shards.items():
        entries, blob = {}, b""
        for key, x in arrays.items():
            entries[key] = entry(list(x.shape), len(blob), len(blob) + x.nbytes)
            blob += x.tobytes()
        raw(path / name, entries, blob)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


A, B = np.ones((2, 5), np.float32), np.ones((6, 2), np.float32)


def test_of_two_shards_that_hold_a_key_the_one_that_the_index_names_counts(tmp_path):
    shards = {"a.safetensors": {KEY + "A.weight": A}}
    shards["b.safetensors"] = {KEY + "B.weight": B, KEY + "A.weight": 7 * A}
    named = {KEY + "A.weight": "a.safetensors", KEY + "B.weight": "b.safetensors"}
    assert lt.load(sharded(tmp_path / "x", shards, named)).modules[0].A[0, 0] == 1.0
    named[KEY + "A.weight"] = "b.safetensors"
    assert lt.load(sharded(tmp_path / "y", {**shards}, named)).modules[0].A[0, 0] == 7.0


def test_a_shard_may_hold_nothing_that_the_index_does_not_name(tmp_path):
    shards = {"a.safetensors": {KEY + "A.weight": A, KEY + "B.weight": B, "x": A}}
    named = dict.fromkeys((KEY + "A.weight", KEY + "B.weight"), "a.safetensors")
    with pytest.raises(lt.FormatError, match="does not name x"):
        lt.load(sharded(tmp_path / "x", shards, named))


def test_a_key_that_stands_in_another_shard_than_the_index_says_is_refused(tmp_path):
    shards = {
        "a.safetensors": {KEY + "A.weight": A, KEY + "B.weight": B},
        "b.safetensors": {"x": A},
    }
    named = {KEY + "A.weight": "b.safetensors", KEY + "B.weight": "a.safetensors"}
    with pytest.raises(lt.FormatError, match="does not hold it"):
        lt.load(sharded(tmp_path / "x", shards, named | {"x": "b.safetensors"}))


@pytest.mark.parametrize("shard", [1, None, "", "..", "../a.safetensors", "a" * 300, "a\0"])
def test_an_index_names_files_beside_it(tmp_path, shard):
    for path in (tmp_path / INDEX, tmp_path / "model.safetensors.index.json"):
        path.write_text(json.dumps({"weight_map": {"x": shard}}))
        with pytest.raises(lt.FormatError):
            tensors.read_weight_map(path)
    with pytest.raises(lt.FormatError):
        open_checkpoint(tmp_path)


def test_of_a_checkpoint_too_a_key_in_two_shards_needs_the_index(tmp_path):
    for name in ("a", "b"):
        blob = np.ones(1, np.float32).tobytes() * 2
        raw(tmp_path / f"{name}.safetensors", {"x": entry([1], 0, 4), name: entry([1], 4, 8)}, blob)
    index = tmp_path / "model.safetensors.index.json"
    named = {"a": "a.safetensors", "b": "b.safetensors"}
    index.write_text(json.dumps({"weight_map": named}))
    with pytest.raises(lt.FormatError, match="both hold x"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": named | {"x": "b.safetensors"}}))
    assert open_checkpoint(tmp_path).tensors["x"].file == "b.safetensors"


HEADERS = {
    "no object": "[]",
    "no entry": {"x": 3},
    "no offsets": {"x": {"dtype": "F32", "shape": [1]}},
    "one offset": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
    "a shape of truth values": {"x": entry([True], 0, 4)},
    "a negative side": {"x": entry([-1, -1], 0, 4)},
    "a fraction": {"x": entry([1.0], 0, 4)},
    "too many sides": {"x": entry([1] * 65, 0, 4)},
    "a shape beyond any memory": {"x": entry([2**62, 0], 0, 0), "y": entry([1], 0, 4)},
    "a side beyond 64 bits": {"x": entry([0, 2**64 - 1], 0, 0), "y": entry([1], 0, 4)},
    "more than its bytes": {"x": entry([2], 0, 4)},
    "fewer than its bytes": {"x": entry([1], 0, 4, "F16")},
    "bytes twice": {"x": entry([1], 0, 4), "y": entry([1], 0, 4)},
    "a gap": {"x": entry([1], 1, 5)},
    "beyond the file": {"x": entry([2], 0, 8)},
    "less than the file": {"x": entry([0], 0, 0)},
    "backwards": {"x": entry([1], 4, 0), "y": entry([1], 0, 4)},
    "metadata that is no text": {"x": entry([1], 0, 4), "__metadata__": {"a": 1}},
    "a key twice": json.dumps({"x": entry([1], 0, 4)})[:-1] + ', "x": {}}',
    "half a character": '{"\\ud800": {}}',
    "no JSON": "{",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_contradicts_itself_or_its_file_is_refused(tmp_path, case):
    path = raw(tmp_path / "x.safetensors", HEADERS[case], b"0000")
    with pytest.raises(lt.FormatError):
        tensors.read_file(path)
    with pytest.raises(lt.FormatError):
        open_checkpoint(path)
    with pytest.raises(lt.LotrError):
        lt.load(path)


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 2**63) + b"{}", b"\0" * 8])
def test_what_is_shorter_than_its_header_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(lt.FormatError, match="damaged or incomplete"):
        header.read_header(path)


def test_a_header_is_read_as_the_safetensors_library_reads_it(tmp_path):
    import safetensors.numpy

    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 4), np.int8), "c": np.array(7)}
    arrays |= {"d": np.array([True, False]), "e": np.ones(3, np.float16), "f": np.ones(2, "c8")}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    found, metadata = tensors.read_file(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert found.keys() == arrays.keys()
    for key, x in arrays.items():
        assert (found[key].dtype, found[key].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(found[key], x)


@pytest.mark.parametrize("size", [4096, 100])
def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path, monkeypatch, size):
    path, real = write_lora(tmp_path / "x"), tensors.open_file

    def opened(name):
        found = real(name)
        os.truncate(name, size)
        return found

    monkeypatch.setattr(tensors, "open_file", opened)
    with pytest.raises(lt.FormatError, match="has become shorter"):
        lt.load(path)


def test_a_checkpoint_that_is_cut_after_it_was_opened_is_refused(tmp_path):
    source = open_checkpoint(write(tmp_path / "x", model()))
    os.truncate(tmp_path / "x" / "model.safetensors", 4000)
    name = max(source.tensors, key=lambda key: source.tensors[key].stop)
    with pytest.raises(lt.FormatError, match="has become shorter"):
        source.read(name)
    with pytest.raises(lt.FormatError, match="has become shorter"):
        list(source.blocks(name))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    path = write_lora(tmp_path / "x")
    for name in (WEIGHTS, CONFIG):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(lt.LotrError):
            lt.load(path)
        with pytest.raises(lt.FormatError, match="no regular file"):
            header.read_header(path / name)


@pytest.mark.parametrize("path", ["a" * 300, "a\0b", "\ud800"])
def test_names_that_no_file_system_takes_are_refused(path):
    with pytest.raises(lt.LotrError):
        lt.load(path)
    with pytest.raises(lt.LotrError):
        lt.merge(path, lt.LoraAdapter((), {}, np.dtype("f4")), "out")


@pytest.mark.parametrize("depth", [DEEPEST, 900, 100_000])
def test_json_beyond_any_config_s_depth_is_refused(depth):
    for opening, closing in ("[]", ('{"a":', "}")):
        with pytest.raises(lt.FormatError, match="deep"):
            parse_json(opening * (depth + 1) + "0" + closing * (depth + 1), "x")


def test_json_as_deep_as_that_is_read():
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@given(JSON)
def test_other_json_is_read_as_the_standard_library_reads_it(value):
    text = json.dumps(value)
    assert parse_json(text, "x") == json.loads(text)
    assert parse_json(text.encode(), "x") == value


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 1}}]'])
def test_a_key_that_is_there_twice_is_refused(text):
    with pytest.raises(lt.FormatError, match="twice"):
        parse_json(text, "x")


def test_a_config_beyond_the_largest_size_is_not_read(tmp_path, monkeypatch):
    path = write_lora(tmp_path / "x")
    monkeypatch.setattr("lotrtensor.adapters.formats.json_text.LARGEST", 100)
    with pytest.raises(lt.FormatError, match="at most 100"):
        lt.load(path)
