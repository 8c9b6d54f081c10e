"""Adapters above a size are gone through module by module: the same numbers, in less memory."""

import copy
import os
import pickle
import resource
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    PREFIX,
    WEIGHTS,
    bert_pairs,
    lora_config,
    lora_tensors,
    lotr,
    shard,
    snapshot,
    with_checksums,
    write_adapter,
    write_lora,
)
from kohya_fixtures import kohya_tensors
from kohya_fixtures import write as write_file
from lotrtensor.adapters.formats import tensors
from lotrtensor.adapters.formats.streamed import Planned, write_streamed
from lotrtensor.adapters.modules import LazyModule
from lotrtensor.report.documents import inspect_document
from memory import peak_of


@pytest.fixture
def all_large(monkeypatch):
    """Every adapter counts as large."""
    monkeypatch.setattr(tensors, "IN_MEMORY", -1)


def plain(path, dtype):
    return write_lora(path, dtype=dtype)


def scaled(path, dtype):
    names = {"encoder.layer.2.intermediate.dense": 7}
    return write_lora(path, dtype=dtype, use_rslora=True, alpha_pattern=names)


def beyond_single_precision(path, dtype):
    """Factors that are worked with in float64, whatever they are stored in."""
    pairs = {name: (b * 1e-20, a) for name, (b, a) in bert_pairs(2).items()}
    return write_lora(path, pairs, dtype=dtype, lora_alpha=6e-14)


def embedding(path, dtype):
    rng = np.random.default_rng(0)
    key = f"{PREFIX}embeddings.word_embeddings.lora_embedding_"
    pairs = {"x": (rng.normal(size=(6, 2)), rng.normal(size=(2, 50)))}
    stored = lora_tensors(pairs, dtype)
    tensors = {key + side: stored[f"{PREFIX}x.lora_{side}.weight"] for side in "AB"}
    return write_adapter(path, lora_config(2), tensors)


def image(path, dtype):
    """Linear layers and convolutions of an image model."""
    return write_file(path.with_suffix(".safetensors"), kohya_tensors(dtype))


MAKERS = [plain, scaled, beyond_single_precision, embedding, image]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_factors_are_those_that_are_held_in_memory(make, dtype, tmp_path, monkeypatch):
    path = make(tmp_path / "a", dtype)
    small = lt.load(path)
    monkeypatch.setattr(tensors, "IN_MEMORY", -1)
    large = lt.load(path)
    assert all(isinstance(module, LazyModule) for module in large.modules)
    assert (large.parameters, large.bytes, large.dtype) == (
        small.parameters,
        small.bytes,
        small.dtype,
    )
    for own, other in zip(small.modules, large.modules, strict=True):
        assert (own.name, own.shape, own.rank, own.embedding, own.stored) == (
            other.name,
            other.shape,
            other.rank,
            other.embedding,
            other.stored,
        )
        for x, y in (
            (own.B, other.B),
            (own.A, other.A),
            *zip(own.factors(), other.factors(), strict=True),
        ):
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)


@pytest.mark.parametrize("read", [WEIGHTS, "shards"])
def test_commands_write_the_same_bytes(read, tmp_path, monkeypatch):
    path = write_lora(tmp_path / "a", dtype="bfloat16")
    if read == "shards":
        shard(path)
    commands = {
        "truncated": ("truncate", path, "--rank", 2),
        "within": ("truncate", path, "--tolerance", 0.3),
        "converted": ("convert", path, "--rank", 4),
        "within-lotr": ("convert", path, "--tolerance", 0.3),
        "sized": ("convert", path, "--budget", "50%", "--cluster", 2),
        "compressed": ("compress", path, "--budget", "50%"),
        "in-terms": ("compress", path, "--budget", "50%", "--form", "lora"),
        "exported": ("export", tmp_path / "0" / "converted"),
    }
    found = []
    for i, limit in enumerate((tensors.IN_MEMORY, -1)):
        monkeypatch.setattr(tensors, "IN_MEMORY", limit)
        for name, words in commands.items():
            assert lotr(*words, "-o", tmp_path / str(i) / name).code == 0
        told = [lotr(*words).out for words in (("inspect", path), ("verify", path, path))]
        found.append((snapshot(tmp_path / str(i)), told))
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An adapter of 20 MB, 160 modules of 0.13 MB in two groups, and a LoTR of it."""
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(4000, 8)), rng.normal(size=(8, 4000))
    names = [f"layers.{k}.{kind}" for k in range(80) for kind in "qv"]
    pairs = {name: (b * rng.normal(size=8), a) for name in names}
    path = tmp_path_factory.mktemp("wide")
    write_lora(path / "lora", pairs, dtype="bfloat16")
    lt.convert(lt.load(path / "lora"), rank=8).save(path / "lotr")
    return path


def load_and_compare(path, out):
    adapter = lt.load(path / "lora")
    assert inspect_document(adapter)["bytes"] == adapter.bytes
    assert lt.compare(adapter, lt.load(path / "lora")).relative_error == 0.0


def truncate(path, out):
    lt.truncate(lt.load(path / "lora"), rank=4).save(out)
    assert lt.load(out).modules[0].rank == 4


def export(path, out):
    lt.load(path / "lotr").to_lora().save(out)
    assert lt.compare(lt.load(path / "lora"), lt.load(out)).relative_error < 0.01


def compress(path, out):
    lt.compress(lt.load(path / "lora"), budget="2%", form="lora").save(out)


@pytest.mark.parametrize("job", [load_and_compare, truncate, export, compress])
def test_memory_does_not_grow_with_the_adapter(job, wide, tmp_path, all_large):
    size = (wide / "lora" / WEIGHTS).stat().st_size
    assert peak_of(lambda: job(wide, tmp_path / "out")) < size / 2


def test_an_adapter_outlives_its_directory_and_what_replaces_it(tmp_path, all_large):
    first, second = write_lora(tmp_path / "a"), write_lora(tmp_path / "b", bert_pairs(seed=1))
    adapter = lt.load(first)
    before = [module.factors() for module in adapter.modules]
    shutil.rmtree(first)
    second.rename(first)
    for (b, a), module in zip(before, adapter.modules, strict=True):
        assert np.array_equal(b, module.B)
        assert np.array_equal(a, module.A)


def test_an_adapter_is_written_over_the_one_it_came_from(tmp_path, all_large):
    path = write_lora(tmp_path / "a")
    expected = lt.truncate(lt.load(path), rank=2)
    expected.save(tmp_path / "b")
    assert lotr("truncate", path, "--rank", 2, "-o", path, "--force").code == 0
    assert snapshot(path) == snapshot(tmp_path / "b")


def test_nothing_is_left_where_writing_fails_on_the_way(tmp_path, all_large):
    name = "encoder.layer.9.intermediate.dense"
    pairs = bert_pairs()
    pairs[name] = pairs[name][0] * 1e8, pairs[name][1]
    adapter = lt.load(write_lora(tmp_path / "a", pairs))
    before = snapshot(tmp_path)
    with pytest.raises(lt.DataError, match=f"{name}.*float16 does not hold"):
        replace(adapter, dtype=np.dtype("float16")).save(tmp_path / "deep" / "b")
    assert snapshot(tmp_path) == before


def test_what_a_file_holds_now_is_not_taken_for_what_it_held(tmp_path, all_large):
    """Whatever size and times say."""
    path = write_lora(tmp_path / "a")
    weights = path / WEIGHTS
    os.utime(weights, ns=(0, 0))
    adapter = lt.load(path)
    content = weights.read_bytes()
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4) if content[-4:] != bytes(4) else b"abcd")
    os.utime(weights, ns=(0, 0))
    with pytest.raises(lt.FormatError, match="written to since the adapter was loaded"):
        lt.compare(adapter, adapter)


@pytest.mark.parametrize("size", [None, 4096, 100])
def test_a_file_that_is_written_to_after_it_was_loaded_is_refused(tmp_path, all_large, size):
    path = write_lora(tmp_path / "a")
    adapter = lt.load(path)
    if size is None:
        with (path / WEIGHTS).open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"abcd")
        os.utime(path / WEIGHTS, ns=(0, 0))  # whatever the clock's steps are
    else:
        os.truncate(path / WEIGHTS, size)
    with pytest.raises(lt.FormatError, match=r"written to|become shorter"):
        lt.truncate(adapter, rank=2)


def test_a_damaged_tensor_is_told_of_once_and_when_it_is_loaded(tmp_path, all_large):
    path = write_lora(tmp_path / "a")
    content = with_checksums((path / WEIGHTS).read_bytes())
    (path / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(lt.LotrWarning, match="checksum differs") as told:
        adapter = lt.load(path)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lt.compare(adapter, adapter).relative_error == 0.0


def test_what_is_no_number_is_refused_when_it_is_loaded(tmp_path, all_large):
    pairs = bert_pairs(1)
    b, a = pairs["encoder.layer.0.attention.self.query"]
    pairs["encoder.layer.0.attention.self.query"] = b * np.nan, a
    with pytest.raises(lt.DataError, match="NaN"):
        lt.load(write_lora(tmp_path / "a", pairs))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_its_factors_in_memory(tmp_path, all_large, copied):
    adapter = lt.load(write_lora(tmp_path / "a"))
    other = copied(adapter)
    (tmp_path / "a" / WEIGHTS).write_bytes(b"")
    assert not any(isinstance(module, LazyModule) for module in other.modules)
    assert other.modules[0].B.shape == (12, 3)


def test_a_changed_copy_is_a_module_in_memory(tmp_path, all_large):
    module = lt.load(write_lora(tmp_path / "a")).modules[0]
    other = replace(module, name="other")
    assert (type(other), other.name) == (lt.LoraModule, "other")
    assert np.array_equal(other.B, module.B)
    assert "on demand" in repr(module)
    assert isinstance(module, LazyModule)


def test_what_is_written_to_factors_is_not_lost_in_silence(tmp_path, all_large):
    module = lt.load(write_lora(tmp_path / "a")).modules[0]
    for factor in module.factors():
        with pytest.raises(ValueError, match="read-only"):
            factor[:] = 0.0


def sums_of(adapter):
    return [[float(np.sum(x)) for x in module.factors()] for module in adapter.modules * 50]


def test_processes_that_came_of_a_fork_read_one_file_side_by_side(tmp_path, all_large):
    adapter = lt.load(write_lora(tmp_path / "a"))
    expected, readers = sums_of(adapter), []
    for _ in range(2):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
            child = os.fork()
        if not child:
            try:
                os.write(writer, b"y" if sums_of(adapter) == expected else b"n")
            finally:
                os._exit(0)
        os.close(writer)
        readers.append(reader)
    assert sums_of(adapter) == expected
    assert [os.read(reader, 1) for reader in readers] == [b"y", b"y"]
    for reader in readers:
        os.close(reader)
        os.wait()


def test_threads_read_one_file_side_by_side(tmp_path, all_large):
    adapter = lt.load(write_lora(tmp_path / "a"))
    expected = [module.factors() for module in adapter.modules]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda module: module.factors(), adapter.modules * 20))
    for (b, a), (x, y) in zip(expected * 20, found, strict=True):
        assert np.array_equal(b, x)
        assert np.array_equal(a, y)


def test_a_tensor_that_is_not_as_planned_is_not_written(tmp_path):
    planned = {"a": Planned(np.dtype("f4"), (4, 2), lambda: np.ones((4, 3), "f4"))}
    with (tmp_path / "x").open("wb") as file, pytest.raises(lt.ShapeError, match=r"is .*4, 3"):
        write_streamed(file, planned, {np.dtype("f4"): "F32"}, {})


def test_shards_that_are_small_together_are_opened_one_by_one(tmp_path):
    path = shard(write_lora(tmp_path / "a"), parts=72)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 10, before[1]))
    try:
        found = lt.load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(found.modules) == 36


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_file_stays_open_for_an_adapter_in_memory(tmp_path, monkeypatch):
    path = write_lora(tmp_path / "a")
    before = open_files()
    small = lt.load(path)
    assert open_files() == before
    monkeypatch.setattr(tensors, "IN_MEMORY", -1)
    large = lt.load(path)
    assert open_files() == before + 1
    del large
    assert open_files() == before
    assert small.modules
