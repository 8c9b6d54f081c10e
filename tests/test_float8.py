"""Adapters in 8-bit floating point: read exactly, written with the error they have, or refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from adapters_fixtures import (
    WEIGHTS,
    Peft,
    assert_refused,
    bert_pairs,
    dense,
    dense_lora,
    dense_lotr,
    distance,
    document,
    largest_distance,
    lora_config,
    lora_tensors,
    lotr,
    quiet,
    raw_safetensors,
    read_config,
    read_header,
    write_adapter,
    write_lora,
)
from lotrtensor.adapters.formats.tensors import read_file

FLOAT8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def as_float8(path, dtype):
    """An adapter whose factors are stored in 8 bits, and its ΔW from those very numbers."""
    kind = np.dtype(getattr(ml_dtypes, dtype))
    pairs = bert_pairs(layers=2)
    tensors = {key: x.astype(kind) for key, x in lora_tensors(pairs).items()}
    write_adapter(path, lora_config(3), tensors)
    wide = {key: x.astype("f8") for key, x in tensors.items()}
    expected = {
        name: 2.0
        * wide[f"base_model.model.{name}.lora_B.weight"]
        @ wide[f"base_model.model.{name}.lora_A.weight"]
        for name in pairs
    }
    return path, expected


@pytest.mark.parametrize("dtype", FLOAT8)
def test_factors_are_read_exactly(tmp_path, dtype):
    path, expected = as_float8(tmp_path / "a", dtype)
    assert {e["dtype"] for k, e in read_header(path / WEIGHTS).items() if "lora" in k} == {
        FLOAT8[dtype]
    }
    found = lt.load(path)
    assert found.dtype.name == dtype
    assert found.bytes == found.parameters
    assert largest_distance(dense(found), expected) < 1e-6


@pytest.mark.parametrize("dtype", FLOAT8)
def test_torch_and_we_read_the_same_numbers(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    x = torch.randn(5, 7).to(getattr(torch, dtype))
    save_file({"x": x, "y": torch.ones(2)}, tmp_path / "t.safetensors")
    found = read_file(tmp_path / "t.safetensors")[0]
    np.testing.assert_array_equal(found["x"].astype("f4"), x.float().numpy())
    np.testing.assert_array_equal(found["y"], np.ones(2, "f4"))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_what_is_written_has_the_error_that_is_reported(tmp_path, dtype):
    source = write_lora(tmp_path / "a", bert_pairs(layers=3))
    report = document("convert", source, "-o", tmp_path / "b", "--rank", 9, "--dtype", dtype)
    header = read_header(tmp_path / "b" / WEIGHTS)
    assert {entry["dtype"] for key, entry in header.items() if "lotr" in key} == {FLOAT8[dtype]}
    stored = read_file(tmp_path / "b" / WEIGHTS)[0]
    wide = {key: x.astype("f8") for key, x in stored.items()}
    exact = dense_lotr(write_adapter(tmp_path / "wide", read_config(tmp_path / "b"), wide))
    error = distance(exact, dense_lora(source, 2.0))
    assert 0.005 < error < 0.3
    assert report["relative_error"] == pytest.approx(error, rel=1e-3)
    assert distance(dense(lt.load(tmp_path / "b").to_lora()), exact) < 1e-5


@pytest.mark.parametrize("dtype", FLOAT8)
def test_a_truncation_stays_in_the_type_and_comes_back(tmp_path, dtype):
    path, _ = as_float8(tmp_path / "a", dtype)
    document("truncate", path, "-o", tmp_path / "b", "--rank", 2)
    header = read_header(tmp_path / "b" / WEIGHTS)
    assert {entry["dtype"] for key, entry in header.items() if "lora" in key} == {FLOAT8[dtype]}
    found = document("verify", path, tmp_path / "b")["relative_error"]
    assert 0.0 < found < 0.5


@pytest.mark.parametrize("dtype", FLOAT8)
def test_not_a_number_in_8_bits_is_seen(tmp_path, dtype):
    tensors = lora_tensors(bert_pairs(layers=1))
    key = sorted(tensors)[0]
    tensors[key] = np.full((3, 10), np.nan).astype(getattr(ml_dtypes, dtype))
    path = write_adapter(tmp_path / "a", lora_config(3), tensors)
    assert_refused(lotr("inspect", path), path, key, "NaN or infinite")


def test_numbers_beyond_the_type_are_kept_by_a_scale(tmp_path):
    """Eight thousand times an adapter loses as much as it; a power of two takes the range."""
    errors = []
    for size in (1.0, 2.0**13):
        pairs = {name: (np.float32(size) * b, a) for name, (b, a) in bert_pairs(layers=2).items()}
        source, out = write_lora(tmp_path / f"a{size}", pairs), tmp_path / f"o{size}"
        found = lotr("convert", source, "-o", out, "--rank", 4, "--dtype", "float8_e4m3fn")
        assert found.code == 0, found.err
        errors.append(lt.compare(lt.load(source), lt.load(out)).relative_error)
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "U8"])
def test_other_small_types_are_refused(tmp_path, kind):
    size = {"F4": 12}.get(kind, 24)
    key = "base_model.model.x.q.lora_A.weight"
    header = {key: {"dtype": kind, "shape": [3, 8], "data_offsets": [0, size]}}
    path = write_adapter(tmp_path / "a", lora_config(3), {"x": np.ones(1)})
    other = "base_model.model.x.q.lora_B.weight"
    header[other] = {"dtype": "F32", "shape": [8, 3], "data_offsets": [size, size + 96]}
    (path / WEIGHTS).write_bytes(raw_safetensors(header, bytes(size + 96)))
    assert_refused(lotr("inspect", path), path, key, "dequantise")


@quiet
@pytest.mark.parametrize("dtype", FLOAT8)
def test_peft_computes_what_is_written(tmp_path, dtype):
    peft = Peft()
    peft.adapt(peft.bert(2), tmp_path / "a", target_modules=["query", "value"])
    source = lt.convert(lt.load(tmp_path / "a"), rank=8, dtype=dtype)
    source.to_lora().save(tmp_path / "o")
    stored = lt.load(tmp_path / "o")
    assert stored.dtype.name == dtype
    adapted = peft.load(peft.bert(2), tmp_path / "o")
    assert largest_distance(dense(stored), peft.deltas(adapted)) < 1e-5


def test_a_single_file_in_8_bits(tmp_path):
    kind = np.dtype(ml_dtypes.float8_e5m2)
    name = "transformer.blocks.0.q"
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8)).astype(kind), rng.normal(size=(8, 2)).astype(kind)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
    found = lt.load(tmp_path / "in.safetensors")
    assert largest_distance(dense(found), {name: b.astype("f8") @ a.astype("f8")}) < 1e-6
