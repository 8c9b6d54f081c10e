"""Help, its examples, completion, and what is said of what is no adapter."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from adapters_fixtures import (
    assert_refused,
    dense_lora,
    lotr,
    lotr_process,
    write_lora,
)
from lotrtensor.cli.commands import COMMANDS

# --- help -----------------------------------------------------------------------------------------

ALL_COMMANDS = list(COMMANDS)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A directory with what the examples in the help are about."""
    path = tmp_path_factory.mktemp("workshop")
    rng = np.random.default_rng(0)
    names = [f"layers.{k}.{kind}_proj" for k in range(3) for kind in "qv"]
    pairs = {name: (rng.normal(size=(40, 8)), rng.normal(size=(8, 40))) for name in names}
    source = write_lora(path / "my-lora", pairs)
    write_lora(path / "my-adapter", pairs)
    image = {}
    for layer in range(3):
        stem = f"lora_unet_down_blocks_{layer}_attn1_to_q"
        image[f"{stem}.lora_down.weight"] = rng.normal(size=(2, 8)).astype("float32")
        image[f"{stem}.lora_up.weight"] = rng.normal(size=(8, 2)).astype("float32")
    safetensors.numpy.save_file(image, path / "image.safetensors")
    lt.convert(lt.load(source), rank=3).save(path / "my-lotr")
    tuned_names = ("tuned-1", "tuned-2", "tuned-3", "my-tuned")
    for name in tuned_names:
        own = {k: (b + 0.1 * rng.normal(size=b.shape), a) for k, (b, a) in pairs.items()}
        write_lora(path / name, own)
    lt.pack([path / name for name in tuned_names[:3]], path / "a-pack", tolerance=0.3)
    lt.convert(lt.load(path / "image.safetensors"), rank=3).save(path / "image-lotr")
    names = [f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(3)]
    pairs = [(rng.normal(size=(8, 2)), rng.normal(size=(2, 6))) for _ in names]
    experts = tuple(lt.LoraModule(n, *pair) for n, pair in zip(names, pairs, strict=True))
    moe = lt.LoraAdapter(experts, {"target_parameters": ["experts.down_proj"]}, np.dtype("f4"))
    lt.convert(moe, rank=4).save(path / "moe-lotr")
    base, tuned = {}, {}
    for name, delta in dense_lora(source, 2.0).items():
        base[f"{name}.weight"] = rng.normal(size=delta.shape).astype("float32")
        tuned[f"{name}.weight"] = (base[f"{name}.weight"] + delta).astype("float32")
    for name, weights in (("base-model", base), ("tuned-model", tuned)):
        (path / name).mkdir()
        safetensors.numpy.save_file(weights, path / name / "model.safetensors")
    return path


def put_model(path):
    """A base model that runs, and an adapter of it, in the place of those that are only files."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.tiny_encoder import encoder_lora, write_encoder, write_texts

    for name in ("base-model", "my-lora"):
        shutil.rmtree(path / name)
    write_encoder(path / "base-model")
    encoder_lora().save(path / "my-lora")
    lt.compress(lt.load(path / "my-lora"), budget="40%", form="lora").save(path / "small")
    write_texts(path / "texts.txt")


def examples(command, monkeypatch):
    """The commands that ``lotr COMMAND --help`` shows as examples."""
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    found = lotr_process(command, "--help")
    assert (found.code, found.err) == (0, "")
    return re.findall(r"Example: (lotr .+?)\s*$", found.out, re.MULTILINE)


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_the_examples_in_the_help_run(command, workshop, tmp_path, monkeypatch):
    found = examples(command, monkeypatch)
    assert found
    shutil.copytree(workshop, tmp_path / "here")
    if command in ("calibrate", "heal"):
        put_model(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for line in found:
        name, *args = shlex.split(line)
        assert (name, args[0]) == ("lotr", command)
        output = Path(args[args.index("-o") + 1]) if "-o" in args else None
        if output and output.exists():
            shutil.rmtree(output)  # what another command's example starts from
        outcome = lotr(*args)
        assert (outcome.code, outcome.err) == (0, ""), line
        assert output is None or output.exists()


def test_no_arguments_point_to_the_demo():
    assert "lotr demo" in re.sub(r"\s+", " ", lotr().out + lotr().err)


@pytest.mark.parametrize(
    ("args", "right"),
    [
        (["convrt", "x"], "convert"),
        (["Inspect", "x"], "inspect"),
        (["inspect", "x", "--gruop-by", "shape"], "--group-by"),
        (["convert", "x", "-o", "y", "--tolerence", "0.1"], "--tolerance"),
    ],
)
def test_a_typo_is_answered_with_the_right_word(args, right):
    found = lotr(*args)
    assert (found.code, found.out) == (2, "")
    assert right in found.err.replace(args[0] if args[0] != right else "", "")


def test_completion():
    def complete(line, word):
        env = {"_LOTR_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
        with mock.patch.dict(os.environ, env):
            return lotr_process().out.split()

    assert complete("lotr in", 1) == ["inspect"]
    assert "--tolerance" in complete("lotr convert --to", 2)
    assert complete("lotr export my-lotr --format ", 4) == ["peft", "kohya"]
    # Nothing for a path: bash then completes file names.
    assert complete("lotr inspect my", 2) == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_is_shown_and_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    program = "from lotrtensor.cli import main; main()"
    for option in ("--show-completion", "--install-completion"):
        line = shlex.join([sys.executable, "-c", program, option]) + "; exit $?"
        done = subprocess.run(["bash", "-c", line], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        if option == "--show-completion":
            assert b"_LOTR_COMPLETE=complete_bash" in done.stdout
    assert "_LOTR_COMPLETE" in (tmp_path / ".bash_completions" / "lotr.sh").read_text()


def test_what_is_no_adapter_is_told_apart(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    (workshop / "base-model" / "config.json").write_text("{}")
    for path, words in (
        ("nowhere", ["does not exist"]),
        ("my-lora/adapter_config.json", ["is a file", "directory"]),
        ("my-lora/adapter_model.safetensors", ["part of the adapter my-lora"]),
        ("base-model", ["checkpoint of a whole model", "lotr extract"]),
        ("base-model/model.safetensors", ["no LoRA tensors", "lotr extract"]),
        (".", ["no adapter_config.json", "image.safetensors"]),
    ):
        assert_refused(lotr("inspect", path), path, *words)
