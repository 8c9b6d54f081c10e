"""Single files of image models that are refused, and what is never lost or replaced."""

from __future__ import annotations

import os

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    CONFIG,
    assert_refused,
    document,
    edit_config,
    lotr,
    nth_call,
    snapshot,
    write_lora,
)
from kohya_fixtures import BLOCK, kohya_tensors, write

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
        patch.setattr(os, "fsync", nth_call(os.fsync, 1, OSError(28, "No space left")))
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
