"""Which files of a checkpoint are read, and what is refused of them."""

import json
import re
import shutil
import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lotrtensor import (
    DataError,
    FormatError,
    LotrError,
    LotrWarning,
    extract,
    load,
    merge,
)
from tests.adapters_fixtures import (
    DTYPES,
    assert_refused,
    bert_pairs,
    distance,
    lotr,
    raw_safetensors,
    write_lora,
)
from tests.checkpoint_fixtures import (
    INDEX,
    D,
    deltas,
    dense_deltas,
    full,
    model,
    pair,
    read,
    tune,
    write,
)

# ---------------------------------------------------------------- files


def test_damaged_checkpoints(tmp_path):
    """Missing shards, damaged files, indices that lie."""
    pair(tmp_path, rank=2, shards=3)
    adapter = full(tmp_path)
    adapter.save(tmp_path / "adapter")
    shard = "model-00002-of-00003.safetensors"

    def refuse(name, *parts):
        for command in (
            ["merge", tmp_path / "adapter", "--base", tmp_path / name, "-o", tmp_path / "out"],
            [
                "extract",
                "--base",
                tmp_path / name,
                "--tuned",
                tmp_path / "tuned",
                "-o",
                tmp_path / "out",
                "--rank",
                2,
            ],
        ):
            assert_refused(lotr(*command), *parts)
        assert not (tmp_path / "out").exists()

    for name in ("missing", "cut", "outside", "list", "garbage"):
        write(tmp_path / name, model(), shards=3)
    (tmp_path / "missing" / shard).unlink()
    refuse("missing", shard)
    content = (tmp_path / "cut" / shard).read_bytes()
    (tmp_path / "cut" / shard).write_bytes(content[: len(content) // 2])
    refuse("cut", shard)
    index = json.loads((tmp_path / "outside" / INDEX).read_text())
    index["weight_map"] = {key: "../base/" + shard for key in index["weight_map"]}
    (tmp_path / "outside" / INDEX).write_text(json.dumps(index))
    refuse("outside", "shard")
    (tmp_path / "list" / INDEX).write_text('{"weight_map": []}')
    refuse("list", "weight_map")
    (tmp_path / "garbage" / INDEX).write_text("{")
    refuse("garbage", INDEX)


def test_an_index_that_promises_a_tensor_of_another_file(tmp_path):
    """What no shard holds is missing, by name."""
    pair(tmp_path, rank=2, shards=2)
    adapter = full(tmp_path)
    index = json.loads((tmp_path / "base" / INDEX).read_text())
    index["weight_map"]["pooler.dense.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "base" / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"pooler\.dense\.weight"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")


def test_a_pickled_checkpoint_is_refused(tmp_path):
    """With the way out."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x")
    for command in (["extract", "--tuned", tmp_path / "base", "--rank", 1], ["merge", "lora"]):
        write_lora(tmp_path / "lora", bert_pairs(1))
        arguments = [tmp_path / x if x == "lora" else x for x in command]
        found = lotr(*arguments, "--base", tmp_path / "base", "-o", tmp_path / "out")
        assert_refused(found, "pytorch_model.bin", "save_pretrained")


def test_a_key_in_two_shards_is_read_where_the_index_says(tmp_path):
    """A stale copy in the other shard is neither read nor changed."""
    base_dir, _, base, tuned = pair(tmp_path, rank=2, shards=2)
    key = "encoder.layer.0.attention.self.query.weight"
    last = base_dir / "model-00002-of-00002.safetensors"
    stale = {k: x for k, x in read(base_dir)[0].items() if k in safetensors.numpy.load_file(last)}
    safetensors.numpy.save_file(stale | {key: np.zeros((D, D), np.float32)}, last)
    adapter = full(tmp_path)
    assert distance(dense_deltas(adapter), deltas(base, tuned)) < 1e-5
    merge(base_dir, adapter, tmp_path / "merged")
    first = safetensors.numpy.load_file(tmp_path / "merged" / "model-00001-of-00002.safetensors")
    assert first[key] == pytest.approx(tuned[key], abs=1e-5)
    assert not safetensors.numpy.load_file(tmp_path / "merged" / last.name)[key].any()


# ---------------------------------------------------------------- quantised weights


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
def test_quantised_weights_are_refused_by_name(tmp_path, dtype):
    """An update rounded to integers is no update."""
    pairs = {"query": bert_pairs(1)["encoder.layer.0.attention.self.query"]}
    write_lora(tmp_path / "lora", pairs)
    write(tmp_path / "base", {"query.weight": np.ones((12, 10), dtype)})
    with pytest.raises(LotrError, match=r"query\.weight"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_types_that_numpy_cannot_read_are_refused_by_name(tmp_path):
    """float8 tensors beside the weights: one sentence, no traceback."""
    pairs = {"query": bert_pairs(1)["encoder.layer.0.attention.self.query"]}
    write_lora(tmp_path / "lora", pairs)
    weight = np.ones((12, 10), np.float32).tobytes()
    header = {
        "query.weight": {"dtype": "F32", "shape": [12, 10], "data_offsets": [0, 480]},
        "scale_f8": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [480, 484]},
    }
    (tmp_path / "base").mkdir()
    content = raw_safetensors(header, weight + b"\0" * 4)
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    found = lotr("merge", tmp_path / "lora", "--base", tmp_path / "base", "-o", tmp_path / "out")
    if found.code == 0:
        assert b"scale_f8" in (tmp_path / "out" / "model.safetensors").read_bytes()
    else:
        assert_refused(found, "scale_f8")


def test_integer_weights_are_refused_by_name(tmp_path):
    """A quantised checkpoint has no deltas."""
    for name, seed in (("base", 0), ("tuned", 1)):
        x = np.random.default_rng(seed).integers(0, 9, (4, 4)).astype(np.int8)
        write(tmp_path / name, {"q.weight": x})
    with pytest.raises(DataError, match=r"q\.weight"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_packed_weights_are_refused_by_name(tmp_path, side):
    """Four-bit weights have other keys than the whole ones; they are not taken for absent."""
    both = {"base": model(), "tuned": tune(model(), rank=2)}
    module = "encoder.layer.1.attention.self.query"
    del both[side][f"{module}.weight"]
    both[side][f"{module}.qweight"] = np.ones((2, D), np.int32)
    for name, tensors in both.items():
        write(tmp_path / name, tensors)
    options = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--rank", 2]
    found = lotr("extract", *options, "-o", tmp_path / "out")
    assert_refused(found, side, f"{module}.qweight", "dequantise")
    write_lora(tmp_path / "lora", {module: (np.ones((D, 1)), np.ones((1, D)))})
    if side == "base":
        found = lotr("merge", tmp_path / "lora", "--base", tmp_path / "base", "-o", tmp_path / "m")
        assert_refused(found, f"{module}.qweight", "dequantise")


def eight_bits(path, bits, dtype="F8_E4M3", more=None):
    """A checkpoint of one matrix in float8, 4 × 4, and what lies beside it."""
    header = {"q.weight": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, 16]}}
    content = np.asarray(bits).tobytes()
    for key in more or ():
        header[key] = {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]}
        content += np.float32(1).tobytes()
    path.mkdir()
    (path / "model.safetensors").write_bytes(raw_safetensors(header, content))
    return path


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats_are_read_and_written(tmp_path, name):
    """Extracted exactly; merged with one rounding, whose error is told."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    code = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[name]
    rng = np.random.default_rng(0)
    base, tuned = (rng.standard_normal((4, 4)).astype(dtype) for _ in range(2))
    eight_bits(tmp_path / "base", base, code)
    eight_bits(tmp_path / "tuned", tuned, code)
    adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=4, form="lora", dtype="float32")
    (module,) = adapter.modules
    delta = tuned.astype(float) - base.astype(float)
    assert module.B.astype(float) @ module.A == pytest.approx(delta, abs=1e-6)
    write_lora(tmp_path / "lora", {"q": (module.B / 3, module.A)})
    with pytest.warns(LotrWarning, match=rf"rounded to {name}.*error") as told:
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    found = np.frombuffer(content[-16:], dtype).reshape(4, 4)
    update = 2 / 3 * module.B.astype(float) @ module.A
    exact = base.astype(float) + update
    finfo = ml_dtypes.finfo(dtype)
    half = float(finfo.eps) / 2 * np.abs(exact) + float(finfo.smallest_subnormal) / 2
    assert (np.abs(found.astype(float) - exact) <= 1.0001 * half).all()
    error = np.linalg.norm(found.astype(float) - base.astype(float) - update)
    said = float(re.search(r"update is ([\d.e-]+)", str(told[0].message))[1])
    assert said == pytest.approx(error / np.linalg.norm(update), rel=0.01)


def test_an_adapter_is_not_stored_in_eight_bits(tmp_path):
    """The tuned checkpoint's type is no type of adapters: bfloat16 is."""
    one = np.full((4, 4), 0x38, np.uint8)
    eight_bits(tmp_path / "base", one * 0)
    eight_bits(tmp_path / "tuned", one)
    adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=1)
    assert adapter.dtype == DTYPES["bfloat16"]


def test_a_sum_beyond_eight_bits_is_refused(tmp_path):
    """448 is the largest number of e4m3."""
    eight_bits(tmp_path / "base", np.full((4, 4), 0x7E, np.uint8))
    write_lora(
        tmp_path / "lora", {"q": (np.full((4, 1), 9, "float32"), np.ones((1, 4), "float32"))}
    )
    with pytest.raises(DataError, match=r"q\.weight.*does not fit into float8_e4m3fn"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


@pytest.mark.parametrize("scale", ["q.weight_scale", "q.weight_scale_inv", "q.scale_weight"])
def test_scaled_eight_bit_floats_are_quantised(tmp_path, scale):
    """A scale beside them: the numbers alone are no weights."""
    eight_bits(tmp_path / "base", np.zeros((4, 4), np.uint8), more=[scale])
    eight_bits(tmp_path / "tuned", np.ones((4, 4), np.uint8), more=[scale])
    write_lora(tmp_path / "lora", {"q": (np.ones((4, 1), "float32"), np.ones((1, 4), "float32"))})
    both = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--rank", 1]
    assert_refused(lotr("extract", *both, "-o", tmp_path / "out"), "quantised", "q.weight")
    merging = ["merge", tmp_path / "lora", "--base", tmp_path / "base", "-o", tmp_path / "out"]
    assert_refused(lotr(*merging), "quantised", "q.weight")
    assert not (tmp_path / "out").exists()


PACKED = {
    "bitsandbytes 4": {"weight": ((8, 1), np.uint8), "weight.absmax": ((2,), np.uint8)},
    "bitsandbytes 8": {"weight": ((4, 4), np.int8), "SCB": ((4,), np.float32)},
    "GPTQ": {"qweight": ((1, 4), np.int32), "scales": ((1, 4), np.float16)},
    "AWQ": {"qweight": ((4, 1), np.int32), "qzeros": ((1, 1), np.int32)},
    "compressed-tensors": {
        "weight_packed": ((4, 1), np.int32),
        "weight_scale": ((4, 1), "float16"),
    },
}


@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("sides", ["base", "tuned", "both"])
def test_packed_weights_are_called_quantised_before_shapes_are_compared(tmp_path, method, sides):
    """Whatever they are called; on one side, or on both with other numbers."""
    rng = np.random.default_rng(0)
    for side in ("base", "tuned"):
        tensors = {"q.weight": rng.random((4, 4), np.float32), "v.weight": np.eye(4)}
        if sides in (side, "both"):
            del tensors["q.weight"]
            for key, (shape, dtype) in PACKED[method].items():
                tensors[f"q.{key}"] = rng.integers(1, 9, shape).astype(dtype)
        path = write(tmp_path / side, tensors)
        quantised = {"quantization_config": {"quant_method": "some_method"}}
        (path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(DataError, match=r"q\..*quantised \(some_method\)"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1)
    if sides != "tuned":
        ones = np.ones((4, 1), np.float32)
        write_lora(tmp_path / "lora", {"q": (ones, ones.T)})
        with pytest.raises(DataError, match=r"q\..*quantised \(some_method\)"):
            merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


def test_packed_weights_that_are_the_same_are_no_news(tmp_path):
    """What differs beside them is extracted."""
    packed = {"q.qweight": np.ones((1, 4), np.int32), "ids": np.arange(4)}
    write(tmp_path / "base", packed | {"v.weight": np.eye(4)})
    write(tmp_path / "tuned", packed | {"v.weight": 2 * np.eye(4)})
    (group,) = extract(tmp_path / "base", tmp_path / "tuned", rank=4).groups
    assert group.modules == ("v",)


# ---------------------------------------------------------------- which file is read


def test_the_single_file_is_read_before_an_index(tmp_path):
    """As transformers does; what is left over is told, and not copied."""
    base = write(tmp_path / "base", {"q.weight": np.ones((4, 4), np.float32)})
    write(tmp_path / "old", {"q.weight": np.zeros((4, 4)), "v.weight": np.zeros((4, 4))}, shards=2)
    for path in (tmp_path / "old").iterdir():
        if path.name.startswith("model-") or path.name == INDEX:
            shutil.copy(path, base / path.name)
    ones = np.ones((4, 1), np.float32)
    write_lora(tmp_path / "lora", {"q": (ones, ones.T)})
    with pytest.warns(LotrWarning, match=r"model\.safetensors is read"):
        merge(base, load(tmp_path / "lora"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert np.array_equal(read(tmp_path / "out")[0]["q.weight"], np.full((4, 4), 3.0))


@pytest.mark.parametrize("shards", [1, 2])
def test_the_files_of_image_models(tmp_path, shards):
    """diffusers calls them diffusion_pytorch_model, and reads the shards first."""
    tensors = {f"blocks.{i}.to_q.weight": np.ones((4, 4), np.float32) for i in range(2)}
    base = write(tmp_path / "base", tensors, shards)
    for path in sorted(base.glob("model*")):
        text = path.name.replace("model", "diffusion_pytorch_model", 1)
        path.rename(base / text)
    index = base / f"diffusion_pytorch_{INDEX}"
    if shards == 2:
        index.write_text(index.read_text().replace('"model', '"diffusion_pytorch_model'))
        safetensors.numpy.save_file(
            {k: 0 * x for k, x in tensors.items()}, base / "diffusion_pytorch_model.safetensors"
        )
    ones = np.ones((4, 1), np.float32)
    write_lora(tmp_path / "lora", {f"blocks.{i}.to_q": (ones, ones.T) for i in range(2)})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merge(base, load(tmp_path / "lora"), tmp_path / "out")
    assert len(told) == shards - 1
    found, files = read(tmp_path / "out")
    assert all(name.startswith("diffusion_pytorch_model") for name in files.values())
    assert len(set(files.values())) == shards
    for x in found.values():
        assert np.array_equal(x, np.full((4, 4), 3.0))
    assert (
        lotr("merge", tmp_path / "lora", "--base", base, "-o", tmp_path / "out", "--force").code
        == 0
    )


def test_the_file_that_the_config_names(tmp_path):
    """transformers_weights comes before all names; it leads to no other directory."""
    base = write(tmp_path / "base", {"q.weight": np.zeros((4, 4), np.float32)})
    one = {"q.weight": np.ones((4, 4), np.float32)}
    safetensors.numpy.save_file(one, base / "other.safetensors")
    ones = np.ones((4, 1), np.float32)
    write_lora(tmp_path / "lora", {"q": (ones, ones.T)})
    adapter = load(tmp_path / "lora")
    (base / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    merge(base, adapter, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "other.safetensors",
    ]
    assert np.array_equal(read(tmp_path / "out")[0]["q.weight"], np.full((4, 4), 3.0))
    for wrong in ("../out/other.safetensors", "absent.safetensors", 3):
        (base / "config.json").write_text(json.dumps({"transformers_weights": wrong}))
        with pytest.raises(FormatError, match=r"transformers_weights|absent"):
            merge(base, adapter, tmp_path / "again")


def test_a_pipeline_is_several_models(tmp_path):
    """One of them has to be named."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    write_lora(tmp_path / "lora", bert_pairs(1))
    with pytest.raises(FormatError, match="name the directory of one"):
        merge(tmp_path / "base", load(tmp_path / "lora"), tmp_path / "out")


@pytest.mark.parametrize(
    "wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "h.0._fsdp_wrapped_module.q"]
)
def test_the_prefixes_of_wrappers_are_no_part_of_a_name(tmp_path, wrapped):
    """In both verbs, with a word; the merged file has the keys of the base."""
    rng = np.random.default_rng(0)
    before, after = rng.random((4, 4), np.float32), rng.random((4, 4), np.float32)
    key = wrapped.format("h.0.q") + ".weight"
    write(tmp_path / "base", {key: before})
    write(tmp_path / "tuned", {"h.0.q.weight": after})
    with pytest.warns(LotrWarning, match="prefix of a wrapper"):
        adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=4)
    assert adapter.groups[0].modules == ("h.0.q",)
    with pytest.warns(LotrWarning, match="prefix of a wrapper"):
        assert merge(tmp_path / "base", adapter, tmp_path / "out") == (key,)
    assert read(tmp_path / "out")[0][key] == pytest.approx(after, abs=1e-6)
