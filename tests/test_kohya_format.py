"""Single-file LoRAs of image models: kohya's and diffusers' names, against diffusers itself."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import lotrtensor as lt
from adapters_fixtures import (
    CONFIG,
    DTYPES,
    assert_refused,
    assert_same_modules,
    dense,
    dense_lotr,
    distance,
    document,
    edit_config,
    lotr,
    nth_call,
    read_arrays,
    read_config,
    read_header,
    snapshot,
    write_lora,
)
from lotrtensor.adapters.grouping import Slot, group_modules, module_kind

GOLDEN = Path(__file__).parent / "golden" / "kohya.safetensors"
BLOCK = "lora_unet_down_blocks_{}_attentions_{}_transformer_blocks_0_attn1_to_{}"
METADATA = {
    "ss_network_dim": "3",
    "ss_network_alpha": "1.5",
    "ss_sd_model_name": "v1-5.safetensors",
    "ss_tag_frequency": '{"ünï": {"cat": 3}}',
    "modelspec.title": "cats",
}


def kohya_tensors(dtype="float32", alpha=1.5, seed=0):
    """A small U-Net's file: linear layers, a 1 × 1 and a 3 × 3 convolution, a text encoder."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def add(name, down, up):
        tensors[name + ".lora_down.weight"] = rng.normal(size=down).astype(DTYPES[dtype])
        tensors[name + ".lora_up.weight"] = rng.normal(size=up).astype(DTYPES[dtype])
        if alpha is not None:
            tensors[name + ".alpha"] = np.array(alpha, dtype=DTYPES[dtype])

    for block in range(2):
        for layer in range(2):
            for kind in "qkv":
                add(BLOCK.format(block, layer, kind), (3, 8), (8, 3))
            add(
                f"lora_unet_down_blocks_{block}_attentions_{layer}_proj_in",
                (3, 8, 1, 1),
                (8, 3, 1, 1),
            )
            add(f"lora_unet_down_blocks_{block}_resnets_{layer}_conv1", (2, 4, 3, 3), (8, 2, 1, 1))
    for layer in range(3):
        add(f"lora_te_text_model_encoder_layers_{layer}_mlp_fc1", (3, 6), (10, 3))
    return tensors


def write(path, tensors, metadata=None):
    safetensors.numpy.save_file(tensors, path, metadata=metadata or {"format": "pt"})
    return path


def deltas(tensors, ends=(".lora_down.weight", ".lora_up.weight")):
    """ΔW of every module from the file's own tensors, a convolution's as m × (c k k)."""
    found = {}
    for key, down in tensors.items():
        if key.endswith(ends[0]):
            name = key.removesuffix(ends[0])
            up = tensors[name + ends[1]].astype(np.float64)
            down = down.astype(np.float64)
            r = down.shape[0]
            scale = (
                float(tensors[name + ".alpha"].reshape(())) / r if name + ".alpha" in tensors else 1
            )
            found[name] = scale * up.reshape(-1, r) @ down.reshape(r, -1)
    return found


def metadata_of(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()


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
        assert metadata_of(out) == METADATA | fields


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
    assert (tmp_path / "out.safetensors").read_bytes() == GOLDEN.read_bytes()
    found = safetensors.numpy.load_file(GOLDEN)
    assert found["lora_unet_mid_block_0_q.lora_up.weight"].tolist() == [[1.0], [0.5]]
    assert found["lora_unet_mid_block_0_q.alpha"].shape == ()
    assert found["lora_unet_mid_block_0_conv.lora_up.weight"].shape == (1, 1, 1, 1)


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


# --- refusals -------------------------------------------------------------------------------------

Q = BLOCK.format(0, 0, "q")


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"{Q}.hada_w1_a", "LoHa"),
        (f"{Q}.lokr_w1", "LoKr"),
        (f"{Q}.dora_scale", "DoRA"),
        ("unet.q.lora_magnitude_vector", "DoRA"),
        (f"{Q}.lora_mid.weight", "LoCon"),
        (f"{Q}.oft_blocks", "OFT"),
        (f"{Q}.a1.weight", "GLoRA"),
        (f"{Q}.on_input", "IA³"),
        ("unet.q.lora_B.bias", "bias"),
        (f"{Q}.lora_down.0.weight", "split"),
        ("bundle_emb.cat.string_to_param.*", "textual inversion"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, key, method):
    tensors = kohya_tensors() | {key: np.ones((3, 3), "float32")}
    source = write(tmp_path / "in.safetensors", tensors)
    for command in (["inspect", source], ["convert", source, "-o", tmp_path / "out"]):
        assert_refused(lotr(*command), source, key, method)
    assert not (tmp_path / "out").exists()


def damage(**change):
    """Tensors with some replaced; None removes one."""
    tensors = kohya_tensors()
    for end, value in change.items():
        key = f"{Q}.{end}" if end == "alpha" else f"{Q}.{end}.weight"
        tensors[key] = value
        if value is None:
            del tensors[key]
    return tensors


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (damage(lora_up=None), [f"{Q}.lora_down.weight", "partner"]),
        (damage(lora_down=None), [f"{Q}.lora_up.weight", "partner"]),
        (damage(alpha=np.array(np.nan)), [f"{Q}.alpha", "number"]),
        (damage(alpha=np.ones(2)), [f"{Q}.alpha", "one number"]),
        (damage(lora_up=np.ones((8, 4), "f4")), ["(8, 4)", "(3, 8)"]),
        (damage(lora_up=np.ones((8, 3, 1, 1), "f4")), ["(8, 3, 1, 1)", "convolution"]),
        (damage(lora_down=np.ones((3, 0), "f4")), ["(3, 0)"]),
        (damage(lora_up=np.full((8, 3), np.inf, "f4")), ["NaN or infinite"]),
        (damage(lora_up=np.ones((8, 3), "i4")), ["int32"]),
        (kohya_tensors() | {"lora_unet_x.unknown": np.ones(3)}, ["lora_unet_x.unknown", "lost"]),
        (kohya_tensors() | {"lora_unet_x.alpha": np.ones(1)}, ["lora_unet_x.alpha", "lost"]),
        (kohya_tensors() | {f"{Q}.lora_A.weight": np.ones((3, 8), "f4")}, [Q, "two styles"]),
        ({"model.layers.0.weight": np.ones((3, 3))}, ["no LoRA tensors", "lotr extract"]),
        ({}, ["no LoRA tensors"]),
    ],
)
def test_damaged_files_are_refused(tmp_path, tensors, words):
    source = write(tmp_path / "in.safetensors", tensors)
    assert_refused(lotr("inspect", source), source, *words)


def test_a_truncated_file(tmp_path):
    source = write(tmp_path / "in.safetensors", kohya_tensors())
    source.write_bytes(source.read_bytes()[:-7])
    assert_refused(lotr("inspect", source), source, "damaged")


def test_the_weights_file_of_a_directory_points_to_the_directory(tmp_path):
    source = write_lora(tmp_path / "in") / "adapter_model.safetensors"
    assert_refused(lotr("inspect", source), source, "directory", CONFIG)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_lora_config_in_the_header(tmp_path, text):
    source = write(tmp_path / "in.safetensors", kohya_tensors(), {"lora_adapter_metadata": text})
    assert_refused(lotr("inspect", source), source, "lora_adapter_metadata")


@pytest.mark.parametrize(
    "layout",
    [5, {"style": "of mine"}, {"style": []}, {"kernels": {"a": [0]}}, {"kernels": [1]}, {"x": 1}],
)
def test_a_damaged_layout_of_a_lotr_is_refused(tmp_path, layout):
    source = write(tmp_path / "in.safetensors", kohya_tensors())
    document("convert", source, "-o", tmp_path / "lotr", "--rank", 2)
    edit_config(tmp_path / "lotr", single_file=layout)
    assert_refused(lotr("inspect", tmp_path / "lotr"), tmp_path / "lotr", "single_file")


def test_outputs_that_do_not_suit_the_form(tmp_path):
    source = write(tmp_path / "in.safetensors", kohya_tensors())
    document("convert", source, "-o", tmp_path / "lotr", "--rank", 2)
    document("convert", write_lora(tmp_path / "peft"), "-o", tmp_path / "other", "--rank", 2)
    before = snapshot(tmp_path)
    out, file = tmp_path / "out", tmp_path / "out.safetensors"
    for command, word in (
        (["convert", source, "-o", file], "directory"),
        (["truncate", tmp_path / "lotr", "-o", file, "--rank", 1], "directory"),
        (["truncate", source, "-o", out, "--rank", 1], "out.safetensors"),
        (["truncate", tmp_path / "peft", "-o", file, "--rank", 1], "format kohya"),
        (["export", tmp_path / "lotr", "-o", out], "out.safetensors"),
        (["export", tmp_path / "lotr", "-o", out, "--format", "kohya"], "out.safetensors"),
        (["export", tmp_path / "lotr", "-o", out, "--format", "peft"], "out.safetensors"),
        (["export", tmp_path / "lotr", "-o", file, "--format", "peft"], "directory"),
        (["export", tmp_path / "lotr", "-o", file, "--pad"], "vLLM"),
        (["export", tmp_path / "other", "-o", file], "format kohya"),
    ):
        assert_refused(lotr(*command), command[3], word)
    assert snapshot(tmp_path) == before


def test_carried_tensors_are_not_lost_silently(tmp_path):
    rng = np.random.default_rng(0)
    pairs = {"down_blocks.0.q": (rng.normal(size=(6, 2)), rng.normal(size=(2, 5)))}
    extras = {"base_model.model.head.weight": np.ones((2, 2), "f4")}
    source = write_lora(tmp_path / "in", pairs, extras=extras, modules_to_save=["head"])
    document("convert", source, "-o", tmp_path / "lotr", "--rank", 2)
    out = tmp_path / "o.safetensors"
    found = lotr("export", tmp_path / "lotr", "-o", out, "--format", "kohya")
    assert_refused(found, "head.weight")
    assert not out.exists()


def test_a_file_is_replaced_by_force_alone_and_whole_or_not_at_all(tmp_path, monkeypatch):
    source = write(tmp_path / "in.safetensors", kohya_tensors())
    before = snapshot(tmp_path)
    assert_refused(lotr("truncate", source, "-o", source, "--rank", 1), source, "--force")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", nth_call(Path.replace, 1, OSError(28, "No space left")))
        found = lotr("truncate", source, "-o", source, "--rank", 1, "--force")
        assert_refused(found, source, "No space left")
    assert snapshot(tmp_path) == before
    assert lotr("truncate", source, "-o", source, "--rank", 1, "--force").code == 0
    assert {module.rank for module in lt.load(source).modules} == {1}
    assert list(snapshot(tmp_path)) == ["in.safetensors"]


def test_a_directory_is_never_replaced_by_a_file(tmp_path):
    source = write(tmp_path / "in.safetensors", kohya_tensors())
    (tmp_path / "out.safetensors").mkdir()
    found = lotr("truncate", source, "-o", tmp_path / "out.safetensors", "--rank", 1, "--force")
    assert_refused(found, "out.safetensors", "no file")


# --- against diffusers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    """A function that makes the same small U-Net each time."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    def make():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            norm_num_groups=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ).eval()

    return make


TARGETS = ["to_q", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj"]


def picture(model):
    import torch

    noise = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)
    with torch.no_grad():
        text = torch.linspace(-1, 1, 48).reshape(1, 3, 16)
        return model(noise, 3, encoder_hidden_states=text).sample.numpy()


@pytest.fixture(scope="module")
def trained(unet, tmp_path_factory):
    """A U-Net with a PEFT LoRA on linear layers and convolutions, and the file diffusers writes."""
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = unet()
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("diffusers")
    StableDiffusionPipeline.save_lora_weights(
        path,
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return model, path / "pytorch_lora_weights.safetensors"


def loaded(model, path):
    """The U-Net with the LoRA of a file, read by diffusers."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    state, alphas, metadata = Loader.lora_state_dict(
        path.parent, weight_name=path.name, return_lora_metadata=True
    )
    Loader.load_lora_into_unet(state, alphas, model, metadata=metadata)
    return model


def test_a_file_of_diffusers_holds_what_peft_computes(trained):
    from peft.tuners.lora import LoraLayer

    model, path = trained
    true = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default").detach().double().numpy()
            true[f"unet.{name}"] = delta.reshape(len(delta), -1)
    assert {delta.shape for delta in true.values()} >= {(16, 16), (16, 144)}
    assert_same_modules(dense(lt.load(path)), true, 1e-6)


@pytest.mark.parametrize("form", ["its own", "kohya"])
def test_diffusers_draws_the_same_picture_from_what_is_written(trained, unet, tmp_path, form):
    model, path = trained
    expected, plain = picture(model), picture(unet())
    assert np.abs(expected - plain).max() > 0.01
    document("convert", path, "-o", tmp_path / "lotr", "--tolerance", 1e-5)
    out = tmp_path / "out.safetensors"
    document(
        "export", tmp_path / "lotr", "-o", out, *(["--format", form] if form == "kohya" else [])
    )
    keys = safetensors.numpy.load_file(out).keys()
    assert all(key.startswith("lora_unet_" if form == "kohya" else "unet.") for key in keys)
    np.testing.assert_allclose(
        picture(loaded(unet(), out)), expected, atol=1e-3 * np.abs(expected).max()
    )


@pytest.mark.parametrize("form", ["its own", "kohya"])
def test_diffusers_and_we_agree_on_different_ranks(trained, unet, tmp_path, form):
    """Modules of unlike rank: diffusers scales each by its alpha, or all by 1."""
    _, path = trained
    small = lt.truncate(lt.load(path), budget="50%")
    assert len({module.rank for module in small.modules}) > 1
    out = tmp_path / "out.safetensors"
    small.save(out, file_format="kohya" if form == "kohya" else None)
    from peft.tuners.lora import LoraLayer

    model = loaded(unet(), out)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default_0").detach().double().numpy()
            found[f"unet.{name}"] = delta.reshape(len(delta), -1)
    assert_same_modules(found, dense(small), 1e-6)


def test_lotr_config_keeps_what_the_file_needs(tmp_path):
    source = write(tmp_path / "in.safetensors", kohya_tensors(), METADATA)
    document("convert", source, "-o", tmp_path / "lotr", "--rank", 2)
    layout = read_config(tmp_path / "lotr")["single_file"]
    assert layout["metadata"] == METADATA
    assert {tuple(kernel) for kernel in layout["kernels"].values()} == {(1, 1), (3, 3)}
    assert all(key.startswith("base_model.") for key in read_arrays(tmp_path / "lotr"))
