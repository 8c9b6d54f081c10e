"""Adapters of image models as people have them: convolutions, differences, names of encoders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from adapters_fixtures import (
    CONFIG,
    WEIGHTS,
    Peft,
    assert_refused,
    assert_same_modules,
    dense,
    document,
    lotr,
    quiet,
    read_arrays,
    read_config,
    write_lora,
)
from lotrtensor import FormatError, LotrWarning, UnsupportedAdapterError


@pytest.fixture(scope="module")
def peft():
    """The real thing."""
    return Peft()


# --- convolutions of PEFT directories -------------------------------------------------------------


def net(peft):
    """Convolutions of one to three dimensions, kernels of several sizes, and a linear layer."""
    nn = peft.torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in = nn.Conv2d(3, 8, 3, padding=1, stride=2)
            self.conv_shortcut = nn.Conv2d(8, 8, 1)
            self.wide = nn.Conv2d(8, 6, (1, 3))
            self.temporal = nn.Conv1d(6, 6, 3, padding=1)
            self.volume = nn.Conv3d(6, 4, 2)
            self.to_q = nn.Linear(4, 5)

        def forward(self, x):
            x = self.wide(self.conv_shortcut(self.conv_in(x)))
            x = self.temporal(x.flatten(2)).reshape(len(x), 6, 2, 2, -1)
            return self.to_q(self.volume(x).flatten(2).transpose(1, 2))

    peft.torch.manual_seed(0)
    return Net().eval()


NET = ["conv_in", "conv_shortcut", "wide", "temporal", "volume", "to_q"]


def output(peft, model):
    with peft.torch.no_grad():
        return model(peft.torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)).numpy()


def flat_deltas(peft, adapted):
    return {name: delta.reshape(len(delta), -1) for name, delta in peft.deltas(adapted).items()}


@quiet
def test_convolutions_are_the_matrices_of_their_kernels(peft, tmp_path):
    adapted = peft.adapt(
        net(peft), tmp_path / "a", target_modules=NET, rank_pattern={"wide": 2}, use_rslora=True
    )
    found = lt.load(tmp_path / "a")
    shapes = {module.name: module.shape for module in found.modules}
    assert shapes["conv_in"] == (8, 27)
    assert shapes["wide"] == (6, 24)
    assert shapes["volume"] == (4, 48)
    assert_same_modules(dense(found), flat_deltas(peft, adapted))


@quiet
def test_truncated_convolutions_keep_their_kernels_and_load_in_peft(peft, tmp_path):
    adapted = peft.adapt(net(peft), tmp_path / "a", target_modules=NET)
    stored = {key: x.shape for key, x in read_arrays(tmp_path / "a").items()}
    document("truncate", tmp_path / "a", "-o", tmp_path / "same", "--rank", 4)
    assert {key: x.shape for key, x in read_arrays(tmp_path / "same").items()} == stored
    assert "conv_kernels" not in read_config(tmp_path / "same")
    expected = output(peft, adapted)
    assert np.abs(expected - output(peft, net(peft))).max() > 0.1
    same = output(peft, peft.load(net(peft), tmp_path / "same"))
    np.testing.assert_allclose(same, expected, atol=1e-5 * np.abs(expected).max())
    document("truncate", tmp_path / "a", "-o", tmp_path / "low", "--rank", 2)
    low = peft.deltas(peft.load(net(peft), tmp_path / "low"))
    for name, delta in flat_deltas(peft, adapted).items():
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        np.testing.assert_allclose(low[name].reshape(best.shape), best, atol=1e-5 * s[0])


@quiet
@pytest.mark.parametrize("uniform", [True, False])
def test_convolutions_of_unlike_ranks(peft, tmp_path, uniform):
    adapted = peft.adapt(net(peft), tmp_path / "a", target_modules=NET)
    small = lt.truncate(lt.load(tmp_path / "a"), budget="60%")
    assert len({module.rank for module in small.modules}) > 1
    small.save(tmp_path / "o", uniform=uniform)
    found = flat_deltas(peft, peft.load(net(peft), tmp_path / "o"))
    assert_same_modules(found, dense(small), 1e-5)
    assert found.keys() == flat_deltas(peft, adapted).keys()


@quiet
def test_a_lotr_of_convolutions_is_refused_before_work_and_at_saving(peft, tmp_path):
    peft.adapt(net(peft), tmp_path / "a", target_modules=NET)
    document("inspect", tmp_path / "a")
    found = lotr("convert", tmp_path / "a", "-o", tmp_path / "o", "--rank", 2)
    assert_refused(found, tmp_path / "a", "conv_in", "convolution", "lotr truncate")
    with pytest.raises(UnsupportedAdapterError, match="conv_in is a convolution"):
        lt.convert(lt.load(tmp_path / "a"), rank=2).save(tmp_path / "o")
    assert not (tmp_path / "o").exists()
    whole = lt.convert(lt.load(tmp_path / "a"), tolerance=1e-6).to_lora()
    whole.save(tmp_path / "back")
    shapes = {key: x.shape for key, x in read_arrays(tmp_path / "a").items()}
    assert {key: x.shape for key, x in read_arrays(tmp_path / "back").items()} == shapes


@quiet
@pytest.mark.parametrize("form", ["lora", "lotr"])
def test_convolutions_are_merged_as_peft_does(peft, tmp_path, form):
    base = net(peft)
    weights = {key: x.numpy() for key, x in base.state_dict().items()}
    (tmp_path / "base").mkdir()
    safetensors.numpy.save_file(weights, tmp_path / "base" / "model.safetensors")
    adapted = peft.adapt(base, tmp_path / "a", target_modules=NET)
    adapter = lt.load(tmp_path / "a")
    if form == "lotr":
        adapter = lt.convert(adapter, tolerance=1e-6)
    changed = lt.merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert set(changed) == {f"{name}.weight" for name in NET}
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    for name, delta in peft.deltas(adapted).items():
        expected = weights[f"{name}.weight"] + delta
        np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stored", "a", "fits"),
    [
        ((8, 4, 3, 1), (2, 4, 3, 1), True),
        ((8, 4, 3, 1), (2, 4, 1, 3), False),  # as many numbers, in another order
        ((8, 4, 1, 1), (2, 4), False),
        ((8, 4, 3, 3), (2, 36), False),
        ((8, 4), (2, 4, 1, 1), True),
        ((8, 12), (2, 4, 3, 1), False),
    ],
)
def test_an_update_is_merged_into_a_kernel_of_its_own_shape_alone(tmp_path, stored, a, fits):
    rng = np.random.default_rng(0)
    weight, down, up = (rng.normal(size=s).astype("f4") for s in (stored, a, (8, 2)))
    (tmp_path / "base").mkdir()
    (tmp_path / "lora").mkdir()
    safetensors.numpy.save_file({"c.weight": weight}, tmp_path / "base" / "model.safetensors")
    tensors = {
        "base_model.model.c.lora_A.weight": down,
        "base_model.model.c.lora_B.weight": up.reshape(8, 2, *(1 for _ in a[2:])),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "lora" / WEIGHTS)
    (tmp_path / "lora" / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    adapter = lt.load(tmp_path / "lora")
    if not fits:
        with pytest.raises(FormatError, match=r"c\.weight.*belong to different models"):
            lt.merge(tmp_path / "base", adapter, tmp_path / "merged")
        return
    lt.merge(tmp_path / "base", adapter, tmp_path / "merged")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")["c.weight"]
    expected = weight + (up @ down.reshape(2, -1)).reshape(stored)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


@quiet
def test_convolutions_of_a_unet_become_kohyas(peft, tmp_path):
    a = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype("f4")
    b = np.random.default_rng(1).normal(size=(8, 2, 1, 1)).astype("f4")
    key = "down_blocks.0.resnets.0.conv1"
    source = write_lora(tmp_path / "a", {key: (b, a)}, r=2, lora_alpha=2)
    lt.load(source).save(tmp_path / "o.safetensors", file_format="kohya")
    found = safetensors.numpy.load_file(tmp_path / "o.safetensors")
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert found[f"{name}.lora_down.weight"].shape == (2, 3, 3, 3)
    np.testing.assert_allclose(
        found[f"{name}.lora_up.weight"][..., 0, 0]
        @ found[f"{name}.lora_down.weight"].reshape(2, -1),
        b[..., 0, 0] @ a.reshape(2, -1),
        rtol=1e-5,
    )


@quiet
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_convolution_in_groups_is_refused_by_name(peft, tmp_path):
    class Net(peft.torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = peft.torch.nn.Conv2d(8, 8, 3, groups=2)

    peft.adapt(Net(), tmp_path / "a", target_modules=["grouped"])
    with pytest.raises(UnsupportedAdapterError, match=r"grouped.*2 groups"):
        lt.load(tmp_path / "a")


# --- differences of whole weights beside factors --------------------------------------------------

Q = "diffusion_model.blocks.{}.self_attn.q"


def wan(extras):
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(2):
        tensors[Q.format(i) + ".lora_down.weight"] = rng.normal(size=(4, 32)).astype("f4")
        tensors[Q.format(i) + ".lora_up.weight"] = rng.normal(size=(32, 4)).astype("f4")
    return tensors | extras


DIFFERENCES = {
    Q.format(0) + ".diff_b": np.arange(32, dtype="f2"),
    "diffusion_model.blocks.0.diff_m": np.arange(192, dtype="f4").reshape(1, 6, 32),
    "diffusion_model.blocks.1.norm1.diff": np.arange(32, dtype="f4"),
    "lora_unet_norm.w_norm": np.arange(32, dtype="f4"),
    "lora_unet_norm.b_norm": np.arange(32, dtype="f4"),
}


@pytest.mark.parametrize("key", DIFFERENCES)
def test_differences_are_carried_from_file_to_file(tmp_path, key):
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file(wan({key: DIFFERENCES[key]}), source)
    assert document("inspect", source)["carried_tensors"] == [key]
    document("truncate", source, "-o", out, "--rank", 2)
    found = safetensors.numpy.load_file(out)
    assert found[key].dtype == DIFFERENCES[key].dtype
    np.testing.assert_array_equal(found[key], DIFFERENCES[key])
    assert found[Q.format(1) + ".lora_down.weight"].shape == (2, 32)
    back = tmp_path / "back.safetensors"
    lt.convert(lt.load(source), tolerance=1e-6).to_lora().save(back)
    np.testing.assert_array_equal(safetensors.numpy.load_file(back)[key], DIFFERENCES[key])


@pytest.mark.parametrize("key", DIFFERENCES)
def test_a_lotr_directory_has_no_place_for_differences(tmp_path, key):
    source = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(wan({key: DIFFERENCES[key]}), source)
    found = lotr("convert", source, "-o", tmp_path / "o", "--rank", 2)
    assert_refused(found, source, key, "lotr truncate")
    assert not (tmp_path / "o").exists()


def test_differences_alone_are_no_lora(tmp_path):
    source = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(DIFFERENCES, source)
    assert_refused(lotr("inspect", source), source, "no LoRA tensors")


def test_differences_have_no_names_in_another_form(tmp_path):
    source = tmp_path / "in.safetensors"
    key = Q.format(0) + ".diff_b"
    safetensors.numpy.save_file(wan({key: DIFFERENCES[key]}), source)
    with pytest.raises(UnsupportedAdapterError, match="diff_b"):
        lt.load(source).save(tmp_path / "o.safetensors", file_format="kohya")
    assert not (tmp_path / "o.safetensors").exists()


# --- single files: wrappers, and scales that nothing tells ----------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        *("transformer._orig_mod.", "_orig_mod.transformer.", "module."),
        *("transformer.module.", "module.transformer.module._orig_mod."),
    ],
)
def test_wrappers_come_off_the_names_of_single_files(tmp_path, rename):
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    prefix = rename if "transformer" in rename else rename + "transformer."
    name = "transformer_blocks.0.attn.to_q"
    tensors = {
        f"{prefix}{name}.lora_A.weight": np.ones((2, 8), "f4"),
        f"{prefix}{name}.lora_B.weight": np.ones((8, 2), "f4"),
    }
    safetensors.numpy.save_file(tensors, source)
    with pytest.warns(LotrWarning, match="wrappers"):
        found = lt.load(source)
    assert [m.name for m in found.modules] == ["transformer." + name]
    found.save(out)
    assert set(safetensors.numpy.load_file(out)) == {
        f"transformer.{name}.lora_{side}.weight" for side in "AB"
    }


def test_a_part_of_one_component_called_module_stays(tmp_path):
    tensors = {}
    for name in ("unet.module.q", "unet.out.q", "text_encoder.module.q"):
        tensors[f"{name}.lora_A.weight"] = np.ones((2, 8), "f4")
        tensors[f"{name}.lora_B.weight"] = np.ones((8, 2), "f4")
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
    with pytest.warns(LotrWarning, match=r"text_encoder\.module"):
        found = lt.load(tmp_path / "in.safetensors")
    names = {module.name for module in found.modules}
    assert names == {"unet.module.q", "unet.out.q", "text_encoder.q"}


@pytest.mark.parametrize("tail", ["", ".default"])
def test_what_the_message_on_a_missing_alpha_says_works(tmp_path, tail):
    """The config that the refusal spells out makes an adapter of the file, of scale 1."""
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(8, 3)).astype("f4"), rng.normal(size=(3, 8)).astype("f4")
    name = "blocks.0.self_attn.q"
    tensors = {f"{name}.lora_A{tail}.weight": a, f"{name}.lora_B{tail}.weight": b}
    source = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(tensors, source)
    with pytest.raises(FormatError, match="has no alpha") as caught:
        lt.load(source)
    text = str(caught.value)
    config = json.loads(text[text.index("{") : text.rindex("}") + 1])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "a" / WEIGHTS).write_bytes(source.read_bytes())
    assert_same_modules(dense(lt.load(tmp_path / "a")), {name: b.astype("f8") @ a}, 1e-6)


# --- kohya's names of CLIP text encoders ----------------------------------------------------------

LAYER = "encoder.layers.0.self_attn.q_proj"


def exported(source, tmp_path):
    """Module names of the kohya file that a source is exported to."""
    document("convert", source, "-o", tmp_path / "lotr", "--rank", 2)
    out = tmp_path / "out.safetensors"
    document("export", tmp_path / "lotr", "-o", out, "--format", "kohya")
    keys = safetensors.numpy.load_file(out)
    return sorted({key.partition(".")[0] for key in keys})


@pytest.mark.parametrize(
    ("names", "flat"),
    [
        ([f"text_encoder.{LAYER}"], ["lora_te_text_model_" + LAYER]),
        ([f"text_encoder.text_model.{LAYER}"], ["lora_te_text_model_" + LAYER]),
        (
            [f"text_encoder.{LAYER}", f"text_encoder_2.{LAYER}"],
            ["lora_te1_text_model_" + LAYER, "lora_te2_text_model_" + LAYER],
        ),
        (
            ["text_encoder.encoder.layers.1.mlp.fc1", "text_encoder_2.text_projection"],
            ["lora_te1_text_model_encoder_layers_1_mlp_fc1", "lora_te2_text_projection"],
        ),
        (
            ["text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"],
            ["lora_te3_encoder_block_0_layer_0_SelfAttention_q"],
        ),
    ],
)
def test_kohyas_names_have_the_text_model(tmp_path, names, flat):
    tensors = {}
    for name in names:
        tensors[name + ".lora_A.weight"] = np.ones((2, 8), "f4")
        tensors[name + ".lora_B.weight"] = np.ones((8, 2), "f4")
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
    found = exported(tmp_path / "in.safetensors", tmp_path)
    assert found == sorted(name.replace(".", "_") for name in flat)


@quiet
@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_an_encoder_trained_by_itself_gets_kohyas_names(peft, tmp_path, name):
    config = peft.transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
    )
    model = getattr(peft.transformers, name)(config)
    peft.adapt(model, tmp_path / "a", target_modules=["q_proj", "fc1"])
    assert exported(tmp_path / "a", tmp_path) == sorted(
        f"lora_te_text_model_encoder_layers_{layer}_{kind}"
        for layer in range(2)
        for kind in ("self_attn_q_proj", "mlp_fc1")
    )


@quiet
def test_an_encoder_of_unknown_class_is_not_guessed_at(peft, tmp_path):
    pairs = {LAYER: (np.ones((8, 2), "f4"), np.ones((2, 8), "f4"))}
    document("convert", write_lora(tmp_path / "a", pairs), "-o", tmp_path / "lotr", "--rank", 1)
    out = tmp_path / "out.safetensors"
    found = lotr("export", tmp_path / "lotr", "-o", out, "--format", "kohya")
    assert_refused(found, LAYER, "no module of an image model")
    assert not out.exists()


def test_differences_are_not_merged_and_the_message_names_a_way_out(tmp_path):
    (tmp_path / "base").mkdir()
    base = {f"blocks.{i}.self_attn.q.weight": np.eye(32, dtype="f4") for i in range(2)}
    safetensors.numpy.save_file(base, tmp_path / "base" / "model.safetensors")
    extras = {Q.format(0) + ".diff_b": np.ones(32, "f4")}
    safetensors.numpy.save_file(wan(extras), tmp_path / "wan.safetensors")
    with pytest.raises(FormatError, match=r"q\.diff_b.*difference of a whole tensor.*leave it out"):
        lt.merge(tmp_path / "base", lt.load(tmp_path / "wan.safetensors"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
