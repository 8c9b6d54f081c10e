"""The native LoTR directory, byte by byte: golden files, sizes, and every contradiction refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    CONFIG,
    DTYPES,
    PREFIX,
    WEIGHTS,
    bert_pairs,
    dense,
    dense_lotr,
    edit_config,
    largest_distance,
    read_arrays,
    read_config,
    read_header,
    snapshot,
    with_checksums,
    write_adapter,
    write_lora,
)
from lotrtensor import DataError, FormatError, LotrAdapter, UnsupportedAdapterError
from lotrtensor.adapters.lotr_group import FactoredCore, FitRecord, LotrGroup

GOLDEN = Path(__file__).parent / "golden"
LEFT, RIGHT = "base_model.lotr_left.", "base_model.lotr_right."
VALUE = [f"encoder.layer.{i}.attention.self.value" for i in (1, 2, 10)]


def ramp(rows, columns, start, dtype):
    """Multiples of 1/8 that every storage type holds exactly."""
    values = (np.arange(rows * columns) * 3 + start) % 17 - 8
    return (values.reshape(rows, columns) / 8).astype(DTYPES[dtype])


def golden_adapter(dtype):
    """Two groups: three slices, one core a product; a single embedding; a carried tensor."""
    value = LotrGroup(
        name="value",
        modules=tuple(VALUE),
        left=ramp(6, 4, 0, dtype),
        right=ramp(5, 4, 1, dtype),
        cores=(
            ramp(4, 4, 2, dtype),
            FactoredCore(ramp(4, 1, 3, dtype), ramp(1, 4, 4, dtype)),
            ramp(4, 4, 5, dtype),
        ),
        slice_ranks=(5, 1, 4),
        fit=FitRecord(relative_error=0.25, lower_bound=0.125, norm=8.0, parameters=66, bytes=264),
    )
    words = LotrGroup(
        name="embeddings.word_embeddings",
        modules=("embeddings.word_embeddings",),
        left=ramp(6, 2, 6, dtype),
        right=ramp(7, 1, 7, dtype),
        cores=(ramp(2, 1, 8, dtype),),
        slice_ranks=(1,),
        embedding=True,
    )
    config = {
        "base_model_name_or_path": "org/model",
        "task_type": "SEQ_CLS",
        "modules_to_save": ["classifier"],
        "target_modules": ["value", "word_embeddings"],
    }
    extras = {f"{PREFIX}classifier.bias": np.array([0.5, -1.0], dtype="float32")}
    return LotrAdapter((value, words), config, DTYPES[dtype], extras)


def golden_path(dtype):
    """The directory committed for a storage type."""
    return GOLDEN / ("native-v1" if dtype == "float32" else f"native-v1-{dtype}")


golden = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@golden
def test_golden_files_are_written_byte_by_byte(tmp_path, dtype):
    golden_adapter(dtype).save(tmp_path / "out")
    expected = snapshot(golden_path(dtype))
    assert snapshot(tmp_path / "out") == expected | {WEIGHTS: with_checksums(expected[WEIGHTS])}
    assert set(snapshot(golden_path(dtype))) == {CONFIG, WEIGHTS}


@golden
def test_golden_files_are_read(dtype):
    expected, found = golden_adapter(dtype), lt.load(golden_path(dtype))
    assert isinstance(found, LotrAdapter)
    assert found.config == expected.config
    assert found.dtype == expected.dtype
    for one, other in zip(found.groups, expected.groups, strict=True):
        for name in ("name", "modules", "slice_ranks", "embedding", "fit", "shape", "rank"):
            assert getattr(one, name) == getattr(other, name)
        assert_arrays(one.left, other.left)
        assert_arrays(one.right, other.right)
        for a, b in zip(one.cores, other.cores, strict=True):
            assert type(a) is type(b)
            for part in ("left", "right") if isinstance(a, FactoredCore) else (None,):
                assert_arrays(getattr(a, part) if part else a, getattr(b, part) if part else b)
    ((key, value),) = found.extras.items()
    assert_arrays(value, expected.extras[key])


def assert_arrays(found, expected):
    """Equal values, equal types."""
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@golden
def test_golden_header(dtype):
    """The layout as documented, read without safetensors."""
    header = read_header(golden_path(dtype) / WEIGHTS)
    assert header.pop("__metadata__") == {"format": "pt"}
    letters = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    assert {key: (row["dtype"], row["shape"]) for key, row in header.items()} == {
        LEFT + "value": (letters, [6, 4]),
        RIGHT + "value": (letters, [5, 4]),
        f"{PREFIX}{VALUE[0]}.lotr_core": (letters, [4, 4]),
        f"{PREFIX}{VALUE[1]}.lotr_core_left": (letters, [4, 1]),
        f"{PREFIX}{VALUE[1]}.lotr_core_right": (letters, [1, 4]),
        f"{PREFIX}{VALUE[2]}.lotr_core": (letters, [4, 4]),
        LEFT + "embeddings.word_embeddings": (letters, [6, 2]),
        RIGHT + "embeddings.word_embeddings": (letters, [7, 1]),
        f"{PREFIX}embeddings.word_embeddings.lotr_core": (letters, [2, 1]),
        f"{PREFIX}classifier.bias": ("F32", [2]),
    }


def test_golden_config():
    config = read_config(golden_path("float32"))
    groups = config.pop("groups")
    assert config == {
        "base_model_name_or_path": "org/model",
        "format_version": 1,
        "modules_to_save": ["classifier"],
        "peft_type": "LOTR",
        "target_modules": ["value", "word_embeddings"],
        "task_type": "SEQ_CLS",
    }
    assert [group["name"] for group in groups] == ["value", "embeddings.word_embeddings"]
    assert groups[0] == {
        "name": "value",
        "modules": VALUE,
        "shape": [6, 5],
        "rank": [4, 4],
        "slice_ranks": [5, 1, 4],
        "scale": 1.0,
        "embedding": False,
        "fit": {
            "relative_error": 0.25,
            "lower_bound": 0.125,
            "norm": 8.0,
            "parameters": 66,
            "bytes": 264,
        },
    }
    assert (groups[1]["embedding"], groups[1]["fit"]) == (True, None)


@golden
def test_deltas_of_the_golden_files(dtype):
    """U G_k Vᵀ of the formulas above, against what an export of full rank gives."""
    expected = dense_lotr(golden_path(dtype))
    assert expected[VALUE[1]].shape == (6, 5)
    by_hand = (
        ramp(6, 4, 0, dtype).astype(float)
        @ ramp(4, 1, 3, dtype).astype(float)
        @ ramp(1, 4, 4, dtype).astype(float)
        @ ramp(5, 4, 1, dtype).astype(float).T
    )
    np.testing.assert_allclose(expected[VALUE[1]], by_hand, rtol=0, atol=1e-15)
    found = dense(lt.load(golden_path(dtype)).to_lora())
    assert largest_distance(found, expected) < (1e-12 if dtype == "float32" else 1e-6)


def test_rewriting_gives_the_same_bytes(tmp_path):
    lt.convert(lt.load(write_lora(tmp_path / "lora")), rank=(7, 6), dtype="bfloat16").save(
        tmp_path / "one"
    )
    lt.load(tmp_path / "one").save(tmp_path / "two")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_the_same_conversion_gives_the_same_bytes(tmp_path):
    source = write_lora(tmp_path / "lora")
    for name in ("one", "two"):
        lt.convert(lt.load(source), rank=4).save(tmp_path / name)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("rank", [(2, 2), (5, 5), (12, 10)])
def test_bytes_on_disk_are_parameters_times_itemsize(tmp_path, dtype, rank):
    adapter = lt.convert(lt.load(write_lora(tmp_path / "lora")), rank=rank, dtype=dtype)
    adapter.save(tmp_path / "out")
    header = read_header(tmp_path / "out" / WEIGHTS)
    header.pop("__metadata__")
    data = sum(end - start for start, end in (row["data_offsets"] for row in header.values()))
    assert data == adapter.bytes == adapter.parameters * DTYPES[dtype].itemsize
    whole = (tmp_path / "out" / WEIGHTS).read_bytes()
    assert len(whole) == 8 + int.from_bytes(whole[:8], "little") + data
    assert adapter.parameters == sum(row.parameters for row in adapter.summary)
    assert sum(row.bytes for row in adapter.summary) == data


def test_factors_are_stored_once_a_group(tmp_path):
    lt.convert(lt.load(write_lora(tmp_path / "lora")), rank=3, group_by="shape").save(
        tmp_path / "out"
    )
    keys = read_arrays(tmp_path / "out").keys()
    assert sorted(key for key in keys if "lotr_left" in key) == [LEFT + "12x10", LEFT + "20x10"]
    assert sorted(key for key in keys if "lotr_right" in key) == [RIGHT + "12x10", RIGHT + "20x10"]
    assert len(keys) == 2 + 2 + 36


@pytest.mark.parametrize("rank", [(4, 4), (6, 6), (6, 7), (8, 5), (12, 10)])
def test_a_core_is_a_product_only_where_that_is_cheaper(tmp_path, rank):
    """Slices of rank 3: 3 (p + q) < p q decides; at (6, 6) both take 36."""
    lora = write_lora(tmp_path / "lora")
    adapter = lt.convert(lt.load(lora), rank=rank)
    adapter.save(tmp_path / "out")
    p, q = rank
    factored = 3 * (p + q) < p * q
    keys = read_arrays(tmp_path / "out").keys()
    assert sum(key.endswith(".lotr_core") for key in keys) == (0 if factored else 36)
    assert sum(key.endswith(".lotr_core_left") for key in keys) == (36 if factored else 0)
    assert sum(key.endswith(".lotr_core_right") for key in keys) == (36 if factored else 0)
    core = min(p * q, 3 * (p + q))
    assert adapter.parameters == 36 * core + 2 * (12 * p + 10 * q) + 20 * p + 10 * q
    read = lt.load(tmp_path / "out")
    assert largest_distance(dense(read.to_lora()), dense_lotr(tmp_path / "out")) < 2e-6


# --- scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 1 / 3, -0.7])
@golden
def test_the_scale_of_a_group_is_folded_in(tmp_path, dtype, scale):
    source = write_adapter(tmp_path / "in", read_config(golden_path(dtype)), read_golden(dtype))
    config = read_config(source)
    config["groups"][0]["scale"] = scale
    edit_config(source, groups=config["groups"])
    adapter = lt.load(source)
    true = dense_lotr(source)
    group = adapter.groups[0].tucker2()
    found = {name: group.slice(k) for k, name in enumerate(VALUE)}
    assert largest_distance(found, {name: true[name] for name in VALUE}) < 1e-6
    adapter.save(tmp_path / "out")
    rewritten = dense_lotr(tmp_path / "out")
    tolerance = 1e-6 if dtype == "float32" else 4e-3
    assert largest_distance(rewritten, true) < tolerance


def read_golden(dtype):
    """The tensors of a golden directory."""
    return read_arrays(golden_path(dtype))


# --- contradictions -------------------------------------------------------------------------------


@pytest.fixture
def native(tmp_path):
    """A copy of the golden directory to be damaged."""
    return write_adapter(
        tmp_path / "native", read_config(golden_path("float32")), read_golden("float32")
    )


def refused(path, kind, *parts):
    """Assert that reading fails with a sentence that names all parts."""
    with pytest.raises(kind) as caught:
        lt.load(path)
    for part in (str(path), *parts):
        assert part in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [0, 3, "1", None, [1], 1.5, True])
def test_another_format_version(native, version):
    edit_config(native, format_version=version)
    refused(native, FormatError, "format_version", repr(version))


def test_no_format_version(native):
    config = read_config(native)
    del config["format_version"]
    (native / CONFIG).write_text(json.dumps(config))
    refused(native, FormatError, "format_version")


@pytest.mark.parametrize("key", [key for key in read_golden("float32") if "lotr_" in key])
def test_every_missing_tensor_is_named(native, key):
    tensors = read_golden("float32")
    del tensors[key]
    write_adapter(native, read_config(native), tensors)
    if key.endswith("_left"):
        refused(native, FormatError, key.removesuffix("_left"))
    else:
        refused(native, FormatError, key)


@pytest.mark.parametrize("key", [key for key in read_golden("float32") if "lotr_" in key])
@pytest.mark.parametrize("change", ["transposed", "wider", "flat", "nan", "integer"])
def test_every_wrong_tensor_is_named(native, key, change):
    tensors = read_golden("float32")
    x = tensors[key]
    tensors[key] = {
        "transposed": x.T if x.shape[0] != x.shape[1] else x[:-1],
        "wider": np.pad(x, ((0, 0), (0, 1))),
        "flat": x.ravel(),
        "nan": np.where(np.arange(x.size).reshape(x.shape) == 0, np.float32("nan"), x),
        "integer": x.astype("int32"),
    }[change]
    write_adapter(native, read_config(native), tensors)
    refused(native, DataError if change in ("nan", "integer") else FormatError, key)


@pytest.mark.parametrize(
    "key",
    [
        LEFT + "query",
        f"{PREFIX}{VALUE[0]}.lotr_core_left",
        f"{PREFIX}{VALUE[1]}.lotr_core",
        f"{PREFIX}encoder.layer.3.attention.self.value.lotr_core",
        f"{PREFIX}{VALUE[0]}.lora_A.weight",
        f"{PREFIX}scorer.scale",
    ],
)
def test_leftover_tensors_are_named(native, key):
    tensors = read_golden("float32") | {key: np.ones((4, 4), dtype="float32")}
    write_adapter(native, read_config(native), tensors)
    with pytest.raises(lt.LotrError) as caught:
        lt.load(native)
    assert PREFIX + VALUE[0] in str(caught.value) or key in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slice_ranks", [4, 1]),
        ("slice_ranks", [4, 1, 4, 4]),
        ("slice_ranks", [0, 1, 4]),
        ("slice_ranks", [-1, 1, 4]),
        ("slice_ranks", [2.5, 1, 4]),
        ("slice_ranks", ["4", 1, 4]),
        ("slice_ranks", [4, 2, 4]),
        ("slice_ranks", 3),
        ("rank", [4]),
        ("rank", [4, 4, 4]),
        ("rank", 4),
        ("rank", [3, 4]),
        ("rank", [0, 0]),
        ("shape", [5, 6]),
        ("shape", [6]),
        ("shape", None),
        ("modules", VALUE[:2]),
        ("modules", [*VALUE, "more"]),
        ("modules", [VALUE[0]] * 3),
        ("modules", []),
        ("modules", "value"),
        ("modules", [1, 2, 3]),
        ("name", "query"),
        ("name", None),
        ("scale", "one"),
        ("scale", None),
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("scale", [1.0]),
        ("fit", {"relative_error": 0.5}),
        ("fit", {"unknown": 1}),
        ("fit", "good"),
        (
            "fit",
            {"relative_error": "x", "lower_bound": 0, "norm": 1, "parameters": 1, "bytes": 1},
        ),
    ],
)
def test_a_group_record_that_is_wrong(native, field, value):
    groups = read_config(native)["groups"]
    groups[0][field] = value
    edit_config(native, groups=groups)
    refused(native, FormatError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("slice_ranks", value) for value in ([4, 1], [0, 1, 4], [2.5, 1, 4], ["4", 1, 4], 3)],
        *[("rank", [4]), ("rank", [0, 0]), ("shape", None), ("modules", [VALUE[0]] * 3)],
        *[("modules", "value"), ("modules", [1, 2, 3]), ("name", None), ("scale", "one")],
        *[("scale", True), ("embedding", "no"), ("fit", {"relative_error": 0.5}), ("fit", "good")],
    ],
)
def test_the_peft_method_refuses_the_same_records_in_the_same_words(native, field, value):
    method = pytest.importorskip("lotrtensor.peft")
    groups = read_config(native)["groups"]
    assert len(method.LotrConfig(groups=groups).plans()) == len(groups)
    groups[0][field] = value
    edit_config(native, groups=groups)
    with pytest.raises(FormatError) as ours:
        lt.load(native)
    with pytest.raises(FormatError) as theirs:
        method.LotrConfig(groups=groups)
    assert f"{field} of a group is" in str(ours.value)
    assert str(ours.value).partition(": ")[2] == str(theirs.value).partition(": ")[2]


@pytest.mark.parametrize("field", ["name", "modules", "shape", "rank", "slice_ranks", "scale"])
def test_a_group_record_that_lacks_a_field(native, field):
    groups = read_config(native)["groups"]
    del groups[0][field]
    edit_config(native, groups=groups)
    refused(native, FormatError, field)


@pytest.mark.parametrize("groups", [None, [], {}, "value", [1], [[]], [None]])
def test_groups_that_are_none(native, groups):
    edit_config(native, groups=groups)
    refused(native, FormatError, "group")


def test_a_group_listed_twice(native):
    groups = read_config(native)["groups"]
    edit_config(native, groups=[groups[0], groups[0]])
    refused(native, FormatError)


def test_a_rank_below_that_of_a_core_does_not_change_it_silently(native):
    """A core of rank 4 whose record says 3: refused, or exported as it is, not cut in silence."""
    groups = read_config(native)["groups"]
    groups[0]["slice_ranks"] = [3, 1, 4]
    edit_config(native, groups=groups)
    true = dense_lotr(native)
    assert np.linalg.matrix_rank(true[VALUE[0]]) == 4
    try:
        found = dense(lt.load(native).to_lora())
    except lt.LotrError:
        return
    assert largest_distance(found, true) < 1e-6


def test_a_lora_is_no_lotr_and_the_other_way_round(native, tmp_path):
    lora = write_lora(tmp_path / "lora", bert_pairs(layers=1))
    with pytest.raises(UnsupportedAdapterError, match="LORA"):
        LotrAdapter.load(lora)
    with pytest.raises(UnsupportedAdapterError, match="LOTR"):
        lt.LoraAdapter.load(native)


def test_shards_of_a_lotr(native):
    tensors = read_golden("float32")
    import safetensors.numpy

    names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        safetensors.numpy.save_file(
            {key: x for key, x in tensors.items() if names[key] == name}, native / name
        )
    (native / WEIGHTS).unlink()
    (native / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert len(lt.load(native).groups) == 2
