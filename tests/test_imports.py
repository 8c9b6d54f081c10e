"""The base package needs no framework, and its public face is one list."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lotrtensor as lt
from adapters_fixtures import lotr_process, write_lora

FRAMEWORKS = ("torch", "peft", "tensorly", "transformers", "accelerate", "jax", "jaxlib")
TERMINAL = ("typer", "click", "rich", "plotly")

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FRAMEWORKS!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
"""

PUBLIC = {
    "DataError",
    "FormatError",
    "LoraAdapter",
    "LotrAdapter",
    "LotrError",
    "LotrWarning",
    "LowRankStack",
    "RankError",
    "ShapeError",
    "SliceStack",
    "Tucker2",
    "Tucker2Fit",
    "UnsupportedAdapterError",
    "compare",
    "convert",
    "load",
    "tucker2",
}


def imported(program, *args):
    """Top-level modules that a program has imported when it ends."""
    tail = "\nimport json, sys\nprint(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + tail, *map(str, args)], capture_output=True, check=True
    )
    return set(json.loads(done.stdout.decode().splitlines()[-1]))


def test_the_check_sees_an_import():
    assert "colorsys" in imported("import colorsys")
    assert "colorsys" not in imported("import lotrtensor")


def test_import_lotrtensor_needs_no_framework_and_no_terminal():
    found = imported("import lotrtensor")
    assert "lotrtensor" in found
    assert not found & {*FRAMEWORKS, *TERMINAL}


HEAVY = {
    "import lotrtensor": ("numpy", "scipy", "ml_dtypes", "safetensors"),
    "lotr --help": ("numpy", "scipy", "ml_dtypes", "safetensors", "lotrtensor.adapters"),
    "lotr inspect": (
        "scipy",
        "array_api_compat.numpy",
        "lotrtensor.analysis",
        "lotrtensor.torch",
        "lotrtensor.verbs._compress",
        "lotrtensor.verbs._extract",
        "concurrent.futures",
        "numpy.f2py",
        "numpy.ma",
        "numpy.testing",
    ),
}
"""What takes long to import, and is not needed: a person waits for it at every call."""


@pytest.mark.parametrize("what", HEAVY)
def test_nothing_heavy_is_imported_before_it_is_needed(what, tmp_path):
    command = {"lotr --help": ["--help"], "lotr inspect": ["inspect", "lora"]}.get(what)
    program = "import lotrtensor"
    if command:
        program = f"""
import sys
sys.argv = ["lotr", *{command!r}]
from lotrtensor.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    write_lora(tmp_path / "lora", dtype="bfloat16")
    tail = "\nprint(*sys.modules)" if command else "\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program + tail], capture_output=True, check=True, cwd=tmp_path
    )
    found = set(done.stdout.decode().splitlines()[-1].split())
    assert "lotrtensor" in found
    assert not found & {*HEAVY[what], *FRAMEWORKS}


def test_the_list_of_commands_says_what_they_say_themselves():
    from typer.main import get_command

    from lotrtensor.cli.app import app
    from lotrtensor.cli.commands import COMMANDS

    group = get_command(app)
    for name, (_, summary) in COMMANDS.items():
        command = group.get_command(None, name)
        assert command.name == name
        assert command.help.split("\n\n")[0].replace("\n", " ") == summary


def test_the_whole_main_job_imports_no_framework(tmp_path):
    program = """
import contextlib, io, sys
from unittest import mock
from lotrtensor.cli import main

def lotr(*args):
    with mock.patch.object(sys, "argv", ["lotr", *args]), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, (args, stop.code)

lora, out = sys.argv[1:]
lotr("convert", lora, "-o", out + "/lotr", "--rank", "2", "--dtype", "bfloat16")
lotr("inspect", out + "/lotr")
lotr("export", out + "/lotr", "-o", out + "/lora")
lotr("verify", lora, out + "/lora", "--json")
"""
    found = imported(program, write_lora(tmp_path / "in", dtype="bfloat16"), tmp_path)
    assert "typer" in found
    assert not found & set(FRAMEWORKS)
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_the_main_job_runs_where_no_framework_can_be_imported(tmp_path):
    lora = write_lora(tmp_path / "in", dtype="bfloat16")
    out = tmp_path / "out"
    found = lotr_process("convert", lora, "-o", out, "--rank", 2, "--json", prelude=BLOCK)
    assert (found.code, found.err) == (0, "")
    found = lotr_process("export", out, "-o", tmp_path / "back", prelude=BLOCK)
    assert found.code == 0
    assert found.err == ""


def test_the_block_blocks():
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + "import torch"], capture_output=True, check=False
    )
    assert b"torch is blocked" in done.stderr


def test_the_public_list_is_what_there_is():
    import lotrtensor.core as core

    for package in (lt, core):
        written = ast.parse(Path(package.__file__).read_text())
        (typed,) = (node for node in written.body if isinstance(node, ast.If))
        typed_names = {
            (node.module, alias.name)
            for node in typed.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        # What a type checker sees is what there is.
        assert {name for _, name in typed_names} == set(package.__all__)
        for module, name in typed_names:
            assert getattr(package, name) is getattr(importlib.import_module(module), name)
    assert set(lt.__all__) <= set(dir(lt))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lt.nonsense
    assert list(lt.__all__) == sorted(set(lt.__all__))
    assert set(lt.__all__) >= PUBLIC


def test_a_star_import_gives_the_public_list():
    program = "from lotrtensor import *\nassert 'convert' in dir() and 'np' not in dir()"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", lt.__all__)
def test_everything_public_is_documented(name):
    thing = getattr(lt, name)
    assert thing.__doc__
    if inspect.isclass(thing):
        assert thing.__doc__ != (thing.__mro__[1].__doc__ or "")
        for key, member in vars(thing).items():
            if not key.startswith("_") and (callable(member) or isinstance(member, property)):
                assert getattr(member, "__doc__", None), f"{name}.{key}"


@pytest.mark.parametrize("name", [n for n in lt.__all__ if n.endswith("Error")])
def test_every_error_is_a_lotr_error(name):
    assert issubclass(getattr(lt, name), lt.LotrError)


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert lt.__version__ == version("lotrtensor")
