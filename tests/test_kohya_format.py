"""Single-file LoRAs of image models: kohya's and diffusers' names, against diffusers itself."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from adapters_fixtures import (
    DTYPES,
    assert_refused,
    assert_same_modules,
    dense,
    dense_lotr,
    distance,
    document,
    lotr,
    read_arrays,
    read_config,
    read_header,
    with_checksums,
    write_lora,
)
from kohya_fixtures import BLOCK, METADATA, deltas, kohya_tensors, metadata_of, write
from lotrtensor.adapters.grouping import Slot, group_modules, module_kind

GOLDEN = Path(__file__).parent / "golden" / "kohya.safetensors"

# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1.5, None])
def test_deltas_are_alpha_over_r_up_down(tmp_path, dtype, alpha):
    tensors = kohya_tensors(dtype, alpha)
    adapter = lt.load(write(tmp_path / "cat.safetensors", tensors, METADATA))
    assert isinstance(adapter, lt.LoraAdapter)
    assert_same_modules(dense(adapter), deltas(tensors))
    assert adapter.dtype == DTYPES[dtype]
    numbers = sum(x.size for key, x in tensors.items() if "lora_" in key.split(".", 1)[1])
    assert (adapter.parameters, adapter.bytes) == (numbers, numbers * DTYPES[dtype].itemsize)


@pytest.mark.parametrize("form", [(), (1,), (1, 1)])
def test_alpha_of_any_shape_of_one_number(tmp_path, form):
    tensors = kohya_tensors()
    expected = deltas(tensors)
    tensors = {k: x.reshape(form) if k.endswith(".alpha") else x for k, x in tensors.items()}
    assert_same_modules(dense(lt.load(write(tmp_path / "a.safetensors", tensors))), expected)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        (".processor.to_q_lora.down.weight", ".processor.to_q_lora.up.weight"),
    ],
)
@pytest.mark.parametrize("part", ["unet", "transformer", "text_encoder_2"])
def test_dotted_names_of_every_style_come_back(tmp_path, part, down, up):
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(3):
        tensors[f"{part}.blocks.{layer}.attn1{down}"] = rng.normal(size=(2, 6)).astype("float32")
        tensors[f"{part}.blocks.{layer}.attn1{up}"] = rng.normal(size=(5, 2)).astype("float32")
    path = write(tmp_path / "in.safetensors", tensors)
    true = deltas(tensors, (down, up))
    stem = down.removesuffix(".down.weight").removesuffix("_lora") if "processor" in down else ""
    adapter = lt.load(path)
    found = dense(adapter)
    assert_same_modules({n.removesuffix(stem): x for n, x in found.items()}, true)
    adapter.save(tmp_path / "out.safetensors")
    again = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert again.keys() == tensors.keys()
    assert_same_modules(deltas(again, (down, up)), true)


def test_scales_in_the_header_are_those_of_the_components(tmp_path):
    rng = np.random.default_rng(0)
    tensors, true = {}, {}
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"blocks.1.q": 1},
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 4,
        "text_encoder.use_rslora": True,
    }
    scales = {"unet.blocks.0.q": 3, "unet.blocks.1.q": 0.5, "text_encoder.q": 4 / np.sqrt(2)}
    for name, scale in scales.items():
        a, b = rng.normal(size=(2, 6)), rng.normal(size=(5, 2))
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        true[name] = scale * b @ a
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    adapter = lt.load(write(tmp_path / "in.safetensors", tensors, metadata))
    assert_same_modules(dense(adapter), true)
    adapter.save(tmp_path / "out.safetensors")
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "out.safetensors")
    assert_same_modules(dense(lt.load(tmp_path / "out.safetensors")), true)


def test_the_directory_that_diffusers_writes(tmp_path):
    tensors = kohya_tensors()
    write(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    assert_same_modules(dense(lt.load(tmp_path)), deltas(tensors))


# --- grouping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (BLOCK.format(1, 0, "q"), BLOCK.replace("_0_", "_*_").format("*", "*", "q")),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1",) * 2,
        ("lora_unet_double_blocks_7_img_mlp_2", "lora_unet_double_blocks_*_img_mlp_*"),
        ("unet.up_blocks.1.conv_2", "unet.up_blocks.*.conv_2"),
        ("text_encoder_2.layers.3.lora_4", "text_encoder_2.layers.*.lora_4"),
    ],
)
def test_numbers_between_underscores_are_layers_in_flattened_names(name, kind):
    assert module_kind(name) == kind.replace("_11_", "_*_")


def test_groups_by_type():
    names = [BLOCK.format(b, a, k) for b in (0, 1) for a in (0, 1) for k in "qv"]
    names += [f"lora_unet_up_blocks_{b}_attentions_0_ff_net_0_proj" for b in (1, 2, 10)]
    groups = group_modules([Slot(name, (8, 8)) for name in reversed(names)])
    assert set(groups) == {"attn1_to_q", "attn1_to_v", "proj"}
    assert [slot.name for slot in groups["attn1_to_q"]] == names[:8:2]
    assert [slot.name for slot in groups["proj"]] == names[8:]


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_convert_and_export_come_back_to_kohya(tmp_path, dtype):
    tensors = kohya_tensors(dtype)
    source = write(tmp_path / "in.safetensors", tensors, METADATA)
    native = lt.convert(lt.load(source), rank=(9, 8))
    assert native.dtype == DTYPES[dtype]
    native.save(tmp_path / "lotr")
    true = deltas(tensors)
    noise = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
    assert distance(dense_lotr(tmp_path / "lotr"), true) < noise
    for form in ([], ["--format", "kohya"]):
        out = tmp_path / f"out{len(form)}.safetensors"
        said = document("export", tmp_path / "lotr", "-o", out, *form)
        assert said["relative_error"] < noise
        found = safetensors.numpy.load_file(out)
        assert found.keys() == tensors.keys()
        assert distance(deltas(found), true) < noise
        for key, x in found.items():
            expected = np.dtype("float32") if key.endswith(".alpha") else DTYPES[dtype]
            assert (x.shape, x.dtype) == (tensors[key].shape, expected)
        fields = {"ss_network_dim": "Dynamic", "ss_network_alpha": "3.0", "format": "pt"}
        metadata = metadata_of(out)
        assert len(metadata.pop("lotr_crc32")) == 8 * (len(read_header(out)) - 1)
        assert metadata == METADATA | fields


def test_truncate_keeps_the_form(tmp_path):
    tensors = kohya_tensors()
    source = write(tmp_path / "in.safetensors", tensors, METADATA)
    said = document("truncate", source, "-o", tmp_path / "out.safetensors", "--rank", 1)
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    assert metadata_of(tmp_path / "out.safetensors")["ss_network_dim"] == "1"
    best = deltas(tensors)
    for name, delta in best.items():
        u, s, vt = np.linalg.svd(delta)
        best[name] = s[0] * np.outer(u[:, 0], vt[0])
    assert_same_modules(deltas(found), best, 1e-5)
    assert said["relative_error"] == pytest.approx(distance(best, deltas(tensors)), rel=1e-5)


def test_modules_of_different_ranks_keep_them_under_one_alpha(tmp_path):
    """diffusers loses the alphas of single attention layers, but not one for all."""
    source = write(tmp_path / "in.safetensors", kohya_tensors())
    out = tmp_path / "out.safetensors"
    document("truncate", source, "-o", out, "--budget", "50%")
    found = safetensors.numpy.load_file(out)
    ranks = {k.split(".")[0]: x.shape[0] for k, x in found.items() if "lora_down" in k}
    assert len(set(ranks.values())) > 1
    alphas = {k.split(".")[0]: float(x) for k, x in found.items() if k.endswith(".alpha")}
    assert alphas == dict.fromkeys(ranks, max(ranks.values()))
    assert_same_modules(deltas(found), dense(lt.truncate(lt.load(source), budget="50%")), 1e-5)


def test_hashes_are_those_of_the_new_tensors(tmp_path):
    stale = METADATA | {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    source = write(tmp_path / "in.safetensors", kohya_tensors(), stale)
    lt.load(source).save(tmp_path / "out.safetensors")
    content = (tmp_path / "out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    expected = hashlib.sha256(content[8 + length :]).hexdigest()
    assert metadata_of(tmp_path / "out.safetensors")["sshs_model_hash"] == expected
    assert metadata_of(tmp_path / "out.safetensors")["sshs_legacy_hash"] != "0" * 8


def test_inspect_and_verify(tmp_path):
    source = write(tmp_path / "in.safetensors", kohya_tensors(), METADATA)
    said = document("inspect", source)
    assert (said["type"], said["file_style"]) == ("LORA", "kohya")
    assert said["base_model"] == "v1-5.safetensors"
    assert {group["name"] for group in said["groups"]} >= {"attn1_to_q", "conv1", "mlp_fc1"}
    assert "kohya" in lotr("inspect", source).out
    assert document("verify", source, source)["relative_error"] == 0.0


def test_equal_adapters_are_equal_files(tmp_path):
    source = write(tmp_path / "in.safetensors", kohya_tensors(), METADATA)
    for name in "ab":
        lt.load(source).save(tmp_path / f"{name}.safetensors")
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab"]
    assert contents[0] == contents[1]
    header = read_header(tmp_path / "a.safetensors")
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_golden_file_is_written_byte_by_byte(tmp_path):
    """A linear layer and a convolution in float16, alpha 2 at rank 1: scale 2 baked into up."""
    tensors = {
        "lora_unet_mid_block_0_q.lora_down.weight": np.array([[1, 2, 3]], "float16"),
        "lora_unet_mid_block_0_q.lora_up.weight": np.array([[0.5], [0.25]], "float16"),
        "lora_unet_mid_block_0_q.alpha": np.array(2, "float16"),
        "lora_unet_mid_block_0_conv.lora_down.weight": np.arange(4)
        .reshape(1, 1, 2, 2)
        .astype("float16"),
        "lora_unet_mid_block_0_conv.lora_up.weight": np.array([[[[1.5]]]], "float16"),
    }
    source = write(tmp_path / "in.safetensors", tensors, {"ss_b": "ü", "ss_a": "1"})
    lt.load(source).save(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == with_checksums(GOLDEN.read_bytes())
    found = safetensors.numpy.load_file(GOLDEN)
    assert found["lora_unet_mid_block_0_q.lora_up.weight"].tolist() == [[1.0], [0.5]]
    assert found["lora_unet_mid_block_0_q.alpha"].shape == ()
    assert found["lora_unet_mid_block_0_conv.lora_up.weight"].shape == (1, 1, 1, 1)


def test_lotr_config_keeps_what_the_file_needs(tmp_path):
    source = write(tmp_path / "in.safetensors", kohya_tensors(), METADATA)
    document("convert", source, "-o", tmp_path / "lotr", "--rank", 2)
    layout = read_config(tmp_path / "lotr")["single_file"]
    assert layout["metadata"] == METADATA
    assert {tuple(kernel) for kernel in layout["kernels"].values()} == {(1, 1), (3, 3)}
    assert all(key.startswith("base_model.") for key in read_arrays(tmp_path / "lotr"))


# --- from a PEFT directory ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        ("down_blocks.0.attn1.to_q", "lora_unet_down_blocks_0_attn1_to_q"),
        ("mid_block.attn1.to_out.0", "lora_unet_mid_block_attn1_to_out_0"),
        ("text_model.encoder.layers.0.q_proj", "lora_te_text_model_encoder_layers_0_q_proj"),
        ("transformer_blocks.0.attn.to_q", "lora_transformer_transformer_blocks_0_attn_to_q"),
    ],
)
def test_a_lotr_of_an_image_model_gets_flattened_names(tmp_path, name, flat):
    rng = np.random.default_rng(0)
    pairs = {name: (rng.normal(size=(6, 2)).astype("f4"), rng.normal(size=(2, 5)).astype("f4"))}
    document("convert", write_lora(tmp_path / "in", pairs), "-o", tmp_path / "lotr", "--rank", 2)
    document("export", tmp_path / "lotr", "-o", tmp_path / "o.safetensors", "--format", "kohya")
    b, a = pairs[name]
    found = deltas(safetensors.numpy.load_file(tmp_path / "o.safetensors"))
    assert_same_modules(found, {flat: 2.0 * b.astype("f8") @ a.astype("f8")}, 1e-5)


def test_a_language_model_has_no_names_in_kohyas_form(tmp_path):
    document("convert", write_lora(tmp_path / "in"), "-o", tmp_path / "lotr", "--rank", 2)
    out = tmp_path / "o.safetensors"
    found = lotr("export", tmp_path / "lotr", "-o", out, "--format", "kohya")
    assert_refused(found, "encoder.layer.0.attention.self.query", "PEFT directory")
    assert not out.exists()
