"""The command line: a table or one JSON document on stdout, exit codes that tell the truth."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import (
    PREFIX,
    bert_pairs,
    dense_lora,
    dense_lotr,
    distance,
    document,
    largest_distance,
    lotr,
    lotr_process,
    read_config,
    snapshot,
    write_lora,
)

COMMANDS = ("inspect", "convert", "export", "verify", "demo")
CONVERT_KEYS = {
    "relative_error",
    "lower_bound",
    "parameters",
    "source_parameters",
    "bytes",
    "source_bytes",
    "groups",
}
GROUP_KEYS = {
    "name",
    "modules",
    "shape",
    "ranks",
    "relative_error",
    "lower_bound",
    "parameters",
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA directory with a carried tensor."""
    extras = {f"{PREFIX}classifier.weight": np.ones((2, 3), dtype="float32")}
    path = tmp_path_factory.mktemp("cli") / "lora"
    return write_lora(path, extras=extras, modules_to_save=["classifier"])


@pytest.fixture(scope="module")
def native(lora):
    """The same as a LoTR of rank 4."""
    assert lotr("convert", lora, "-o", lora.parent / "lotr", "--rank", 4).code == 0
    return lora.parent / "lotr"


# --- convert --------------------------------------------------------------------------------------


def test_convert_json(lora, tmp_path):
    answer = document("convert", lora, "-o", tmp_path / "out", "--rank", 4)
    assert answer.keys() >= CONVERT_KEYS
    assert [group.keys() >= GROUP_KEYS for group in answer["groups"]] == [True] * 3
    true, found = dense_lora(lora, 2.0), dense_lotr(tmp_path / "out")
    assert answer["relative_error"] == pytest.approx(distance(found, true), rel=1e-6)
    assert 0 < answer["lower_bound"] <= answer["relative_error"]
    assert answer["parameters"] == sum(group["parameters"] for group in answer["groups"])
    assert (answer["bytes"], answer["source_bytes"]) == (
        4 * answer["parameters"],
        4 * answer["source_parameters"],
    )
    shapes = {tuple(group["shape"]) for group in answer["groups"]}
    assert shapes == {(12, 10), (20, 10)}
    names = [name for group in answer["groups"] for name in group["modules"]]
    assert sorted(names) == sorted(true)
    for group in answer["groups"]:
        assert group["ranks"] == [4, 4]
        error = distance(
            {name: found[name] for name in group["modules"]},
            {name: true[name] for name in group["modules"]},
        )
        assert group["relative_error"] == pytest.approx(error, rel=1e-6)


def test_convert_prints_a_table_and_is_quiet_on_stderr(lora, tmp_path):
    found = lotr("convert", lora, "-o", tmp_path / "out", "--rank", 4)
    assert (found.code, found.err) == (0, "")
    for part in ("query", "value", "intermediate.dense", "12 × 10", "20 × 10", "4, 4"):
        assert part in found.out
    answer = lt.load(tmp_path / "out")
    assert f"{answer.relative_error:.4g}" in found.out
    assert f"{answer.parameters:,}" in found.out
    assert str(tmp_path / "out") in found.out.replace("\n", "")


def test_convert_in_a_process_of_its_own(lora, tmp_path):
    found = lotr_process("convert", lora, "-o", tmp_path / "out", "--rank", 4, "--json")
    assert (found.code, found.err) == (0, "")
    assert json.loads(found.out).keys() >= CONVERT_KEYS
    assert lt.load(tmp_path / "out").groups


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_convert_dtype(lora, tmp_path, dtype):
    answer = document("convert", lora, "-o", tmp_path / "out", "--rank", 4, "--dtype", dtype)
    assert answer["dtype"] == lt.load(tmp_path / "out").dtype.name == dtype


@pytest.mark.parametrize(
    ("group_by", "names"),
    [
        ("type", {"query", "value", "intermediate.dense"}),
        ("shape", {"12x10", "20x10"}),
        ("qv=query|value", {"qv", "intermediate.dense"}),
        ("first=layer\\.[0-5]\\..*query,rest=query|value", {"first", "rest", "intermediate.dense"}),
    ],
)
def test_convert_group_by(lora, tmp_path, group_by, names):
    answer = document("convert", lora, "-o", tmp_path / "out", "--rank", 4, "--group-by", group_by)
    tails = {group["name"].rpartition("attention.self.")[2] for group in answer["groups"]}
    assert tails == names
    for group in answer["groups"]:
        layers = [int(name.split(".")[2]) for name in group["modules"]]
        assert layers == sorted(layers)


def test_force_replaces_the_output(lora, tmp_path):
    out = tmp_path / "out"
    assert lotr("convert", lora, "-o", out, "--rank", 2).code == 0
    assert lotr("convert", lora, "-o", out, "--rank", 3, "--force").code == 0
    assert {group.rank for group in lt.load(out).groups} == {(3, 3)}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_adapter_may_replace_itself(tmp_path):
    path = write_lora(tmp_path / "adapter", bert_pairs(layers=2))
    true = dense_lora(path, 2.0)
    assert lotr("convert", path, "-o", path, "--rank", 6, "--force").code == 0
    assert lotr("export", path, "-o", path, "--force").code == 0
    assert largest_distance(dense_lora(path, 1.0), true) < 1e-5


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_a_lora(lora):
    answer = document("inspect", lora)
    assert answer["type"] == "LORA"
    assert answer["base_model"] == "tiny/bert"
    assert answer["dtype"] == "float32"
    assert answer["carried_tensors"] == [f"{PREFIX}classifier.weight"]
    assert answer["parameters"] == 12 * 3 * (22 + 22 + 30)
    assert answer["bytes"] == 4 * answer["parameters"]
    assert {group["parameters"] for group in answer["groups"]} == {12 * 66, 12 * 90}
    true = dense_lora(lora, 2.0)
    norms = {row["name"]: row["norm"] for row in answer["modules"]}
    assert norms == pytest.approx({n: float(np.linalg.norm(d)) for n, d in true.items()}, rel=1e-5)


def test_inspect_a_lotr(native):
    answer = document("inspect", native)
    assert answer["type"] == "LOTR"
    assert answer.keys() >= CONVERT_KEYS
    true = dense_lotr(native)
    norms = {row["name"]: row["norm"] for row in answer["modules"]}
    assert norms == pytest.approx({n: float(np.linalg.norm(d)) for n, d in true.items()}, rel=1e-5)


def test_inspect_says_what_convert_said(lora, tmp_path):
    said = document("convert", lora, "-o", tmp_path / "out", "--rank", 4, "--dtype", "bfloat16")
    found = document("inspect", tmp_path / "out")
    for group in found["groups"]:
        assert group.pop("singular_values").keys() == {"left", "right"}
    assert {key: found[key] for key in said} == said


def test_inspect_tables(lora, native):
    for path, word in ((lora, "LoRA"), (native, "LoTR")):
        found = lotr("inspect", path)
        assert (found.code, found.err) == (0, "")
        for part in (word, "query", "12 × 10", "tiny/bert", "float32", "classifier.weight"):
            assert part in found.out


def test_inspect_by_shape(lora):
    answer = document("inspect", lora, "--group-by", "shape")
    assert {group["name"] for group in answer["groups"]} == {"12x10", "20x10"}


# --- verify ---------------------------------------------------------------------------------------


def test_verify_json(lora, native):
    answer = document("verify", lora, native)
    assert answer.keys() >= {"relative_error", "max_slice_error", "modules"}
    true, other = dense_lora(lora, 2.0), dense_lotr(native)
    assert answer["relative_error"] == pytest.approx(distance(other, true), rel=1e-5)
    assert answer["max_slice_error"] == max(row["relative_error"] for row in answer["modules"])
    assert {row["name"] for row in answer["modules"]} == set(true)
    assert all(row.keys() == {"name", "relative_error"} for row in answer["modules"])


def test_verify_with_itself_is_zero(lora, native):
    for path in (lora, native):
        answer = document("verify", path, path)
        assert (answer["relative_error"], answer["max_slice_error"]) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_agrees_with_convert(lora, tmp_path, dtype):
    said = document("convert", lora, "-o", tmp_path / "out", "--rank", 5, "--dtype", dtype)
    found = document("verify", lora, tmp_path / "out")
    assert found["relative_error"] == pytest.approx(said["relative_error"], rel=1e-6)


def test_verify_prints_the_worst_modules(lora, native):
    found = lotr("verify", lora, native)
    assert (found.code, found.err) == (0, "")
    rows = document("verify", lora, native)["modules"]
    worst = max(rows, key=lambda row: row["relative_error"])
    assert worst["name"] in found.out
    assert f"{worst['relative_error']:.4g}" in found.out


# --- export ---------------------------------------------------------------------------------------


def test_export_json(native, tmp_path):
    answer = document("export", native, "-o", tmp_path / "out", "--rank", 2)
    assert answer["type"] == "LORA"
    true, found = dense_lotr(native), dense_lora(tmp_path / "out", 1.0)
    assert answer["relative_error"] == pytest.approx(distance(found, true), rel=1e-5)
    assert answer["parameters"] == 12 * 2 * (22 + 22 + 30)
    assert {tuple(group["lora_ranks"]) for group in answer["groups"]} == {(2,)}


def test_export_pads(native, tmp_path):
    assert document("export", native, "-o", tmp_path / "out", "--pad")["relative_error"] < 1e-6
    config = read_config(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (8, 8)


def test_export_prints_a_table(native, tmp_path):
    found = lotr("export", native, "-o", tmp_path / "out")
    assert (found.code, found.err) == (0, "")
    assert "query" in found.out
    assert str(tmp_path / "out") in found.out.replace("\n", "")


def test_the_round_trip_of_the_readme(lora, tmp_path):
    assert lotr("convert", lora, "-o", tmp_path / "lotr", "--rank", 10).code == 0
    assert lotr("export", tmp_path / "lotr", "-o", tmp_path / "lora").code == 0
    answer = document("verify", tmp_path / "lotr", tmp_path / "lora")
    assert answer["max_slice_error"] < 2e-6
    assert snapshot(lora).keys() == {"adapter_config.json", "adapter_model.safetensors"}


# --- demo -----------------------------------------------------------------------------------------

BUNDLED = files("lotrtensor") / "data" / "amazon-sentiment"
bundled = pytest.mark.skipif(not BUNDLED.is_dir(), reason="the bundled adapter is not there yet")


@bundled
def test_demo_json():
    answer = document("demo")
    assert answer.keys() >= CONVERT_KEYS | {"export_difference", "round_trip_error"}
    assert 0 < answer["lower_bound"] <= answer["relative_error"] < 1
    # Both are stored in half precision, which rounds the export once more.
    assert answer["export_difference"] < 1e-2
    assert answer["round_trip_error"] == pytest.approx(answer["relative_error"], rel=1e-2)
    assert answer["bytes"] < answer["source_bytes"]
    modules = [name for group in answer["groups"] for name in group["modules"]]
    assert len(modules) == len(set(modules)) == 36


@bundled
def test_demo_prints_its_commands_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = lotr("demo")
    assert (found.code, found.err) == (0, "")
    for part in ("lotr convert", "lotr export", "lotr verify", "query"):
        assert part in found.out
    assert not list(tmp_path.iterdir())


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["convert"],
        ["convert", "LORA"],
        ["convert", "LORA", "-o"],
        ["convert", "LORA", "-o", "OUT", "--rank", "many"],
        ["convert", "LORA", "-o", "OUT", "--rank", "2.5"],
        ["convert", "LORA", "-o", "OUT", "--rank", "2", "--unknown"],
        ["convert", "LORA", "LORA", "-o", "OUT", "--rank", "2"],
        ["export"],
        ["export", "LORA"],
        ["export", "LORA", "-o", "OUT", "--rank", "x"],
        ["verify", "LORA"],
        ["inspect"],
        ["inspect", "LORA", "LORA"],
        ["demo", "LORA"],
        ["convrt"],
        ["--unknown"],
    ],
)
def test_usage_errors_exit_with_2(lora, tmp_path, args):
    places = {"LORA": lora, "OUT": tmp_path / "out"}
    found = lotr(*(places.get(arg, arg) for arg in args))
    assert (found.code, found.out) == (2, "")
    assert found.err
    assert "Traceback" not in found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    found = lotr(command, "--help")
    assert (found.code, found.err) == (0, "")
    assert f"lotr {command}" in re.sub(r"\s+", " ", found.out)
    assert lotr(command, "-h").out == found.out


def test_help_lists_the_commands():
    found = lotr("--help")
    assert found.code == 0
    for command in COMMANDS:
        assert command in found.out


def test_version():
    assert lotr("--version")[:2] == (0, f"lotr {lt.__version__}\n")


def test_no_arguments_show_the_help():
    found = lotr_process()
    assert found.code in (0, 2)
    assert "convert" in found.out + found.err
    assert "Traceback" not in found.err


# --- what people call things ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["[bold]x[/bold]", "[/oops]", "[red]", "a b", "ünï", "-x", "x" * 80]
)
def test_any_output_name_is_printed_as_it_is(lora, tmp_path, name):
    out = tmp_path / name
    for command in (["convert", lora, "-o", out, "--rank", 2], ["export", out, "-o", f"{out}2"]):
        found = lotr(*command)
        assert (found.code, found.err) == (0, "")
        assert name in found.out.replace("\n", "")


@pytest.mark.parametrize("name", ["[/oops]", "[bold]x", "org/model[v2]"])
def test_any_base_model_is_printed_as_it_is(tmp_path, name):
    path = write_lora(tmp_path / "lora", bert_pairs(layers=1), base_model_name_or_path=name)
    found = lotr("inspect", path)
    assert (found.code, found.err) == (0, "")
    assert name in found.out


@pytest.mark.parametrize("name", ["[/oops]", "[bold]", "qv[a]"])
def test_any_group_and_module_name_is_printed_as_it_is(tmp_path, name):
    pairs = {f"layers.{i}.{name}": pair for i, pair in enumerate(bert_pairs(layers=1).values())}
    pairs = {key: pair for key, pair in pairs.items() if pair[0].shape == (12, 3)}
    path = write_lora(tmp_path / "lora", pairs)
    for command in (
        ["inspect", path],
        ["convert", path, "-o", tmp_path / "out", "--rank", 2],
        ["verify", path, tmp_path / "out"],
    ):
        found = lotr(*command)
        assert (found.code, found.err) == (0, "")
        assert name in found.out


def test_a_home_directory(lora, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lotr("convert", lora, "-o", "~/out", "--rank", 2).code == 0
    assert lotr("inspect", "~/out").code == 0
    assert lotr("export", "~/out", "-o", "~/back").code == 0
    assert lotr("truncate", "~/back", "-o", "~/small", "--rank", 1).code == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"out", "back", "small"}
    found = lotr("convert", lora, "-o", "~/out", "--rank", 2)
    assert found.code == 1
    assert "exists" in found.err


def test_a_reader_that_goes_away(lora):
    """``lotr inspect … | head -1`` ends without a traceback."""
    program = "from lotrtensor.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "inspect", str(lora), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        error = process.stderr.read().decode()
        process.wait(60)
    assert "Traceback" not in error


# --- interrupted --------------------------------------------------------------------------------

INTERRUPT = """
import os, signal
import lotrtensor.cli.convert as cli
real = cli.convert_adapter
def interrupted(source, *, progress, **options):
    def between_groups(*args):
        os.kill(os.getpid(), signal.SIGINT)
        progress(*args)
    return real(source, progress=between_groups, **options)
cli.convert_adapter = interrupted
"""


@contextlib.contextmanager
def interrupts(disposition):
    """Let the processes that are started here inherit what an interrupt does to them.

    A shell's background job ignores interrupts, and so do its tests and all that they start.
    """
    before = signal.signal(signal.SIGINT, disposition)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="signals of Windows differ")
@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN], ids=["front", "back"])
def test_an_interrupt_ends_with_130_and_leaves_nothing(lora, tmp_path, disposition):
    """Also where a shell has started it in the background, and told it to ignore interrupts."""
    with interrupts(disposition):
        found = lotr_process("convert", lora, "-o", tmp_path / "o", "--rank", 2, prelude=INTERRUPT)
    assert (found.code, found.out, found.err) == (130, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("args", [[], ["--json"]])
def test_output_that_cannot_be_printed(lora, args):
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from lotrtensor.cli import main; main()",
                "inspect",
                lora,
                *args,
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.decode().startswith("lotr: error: the output cannot be printed: No space")
    assert len(done.stderr.splitlines()) == 1


def test_a_terminal_without_greek_letters(lora, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    found = lotr_process("inspect", lora)
    assert (found.code, found.err) == (0, "")
    assert "query" in found.out


# --- terminal -------------------------------------------------------------------------------------

SLOW = """
import time
from types import SimpleNamespace
import lotrtensor.cli.common as common
import lotrtensor.cli.convert as cli
class Timer:  # whose second is over when the third of five groups begins, however busy the machine
    ident, started = None, []
    def __init__(self, seconds, act):
        assert seconds == 1.0
        self.act = act
    def start(self):
        self.started.append(self)
    def cancel(self):
        pass
common.threading = SimpleNamespace(Timer=Timer)
real = cli.convert_adapter
def slow(source, *, progress, **options):
    for done in range(5):
        progress(f"group-{done}", done, 5)
        if done == 2:
            for timer in Timer.started:
                timer.act()
        if done >= 2 and Timer.started:
            time.sleep(0.5)
    return real(source, progress=progress, **options)
cli.convert_adapter = slow
"""


def in_a_terminal(*args, prelude="", columns=100, **env):
    """Run ``lotr`` in a pseudo-terminal; return exit code and everything it showed."""
    pty = pytest.importorskip("pty")
    program = f"{prelude}\nfrom lotrtensor.cli import main\nmain()"
    size = {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color"}
    base = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    master, slave = pty.openpty()
    command = [sys.executable, "-c", program, *map(str, args)]
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=base | size | env
    ) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(master, 65536):
                shown += part
    os.close(master)
    return process.returncode, shown.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|9[0-7]|38;5;\d+)m")


def test_spectra_are_drawn_in_colour_in_a_terminal_and_plain_elsewhere(lora):
    code, shown = in_a_terminal("inspect", lora)
    assert code == 0
    assert "▇" in shown or "█" in shown
    assert COLOUR.search(shown)
    _, plain = in_a_terminal("inspect", lora, NO_COLOR="1")
    assert "query" in plain
    assert not COLOUR.search(plain)
    assert "\x1b" not in lotr_process("inspect", lora).out


def test_names_are_whole_in_a_narrow_terminal(tmp_path):
    pairs = {k: pair for k, pair in bert_pairs(layers=2).items() if "query" in k or "value" in k}
    path = write_lora(tmp_path / "lora", pairs)
    assert lotr("convert", path, "-o", tmp_path / "lotr", "--rank", 2).code == 0
    _, shown = in_a_terminal("inspect", tmp_path / "lotr", columns=60)
    letters = re.sub(r"\x1b\[[0-9;]*m|\s", "", shown)
    assert "…" not in letters
    assert "2,2" in letters


def test_a_progress_bar_shows_rate_and_time_left_after_a_second(lora, tmp_path):
    args = ["convert", lora, "-o", tmp_path / "out", "--rank", 2]
    code, shown = in_a_terminal(*args, prelude=SLOW)
    assert code == 0
    assert re.search(r"group-[34].*[34]/5.*(/s|s each).*left.*\d:\d\d", shown)
    assert "group-0" not in shown
    assert "reading" not in shown


def test_no_progress_where_nobody_watches(lora, tmp_path):
    args = ["convert", lora, "-o", tmp_path / "out", "--rank", 2]
    for extra in ([], ["--force", "--json"]):
        found = lotr_process(*args, *extra, prelude=SLOW)
        assert (found.code, found.err) == (0, "")


def test_spectra_in_json(lora, native):
    true = dense_lora(lora, 2.0)
    for path, deltas in ((lora, true), (native, dense_lotr(native))):
        for group in document("inspect", path)["groups"]:
            stack = np.stack([deltas[name] for name in group["modules"]])
            for side, axis in (("left", 1), ("right", 2)):
                unfolded = np.moveaxis(stack, axis, 0).reshape(stack.shape[axis], -1)
                expected = np.linalg.svd(unfolded, compute_uv=False)
                found = np.array(group["singular_values"][side])
                assert np.linalg.norm(expected[len(found) :]) < 1e-5 * expected[0]
                np.testing.assert_allclose(found, expected[: len(found)], atol=1e-5 * expected[0])


def test_spectra_that_take_long_are_left_out_unless_asked_for(lora, monkeypatch):
    from lotrtensor.report import spectra

    told = "singular values are left out"
    assert "the faster they fall" not in lotr("inspect", lora, "--no-spectra").out
    assert told not in lotr("inspect", lora, "--no-spectra").out
    monkeypatch.setattr(spectra, "SECONDS_OF_WORK", 0.0)
    found = lotr("inspect", lora)
    assert found.code == 0 and told in found.out and "the faster they fall" not in found.out
    groups = document("inspect", lora)["groups"]
    assert [group["singular_values"] for group in groups] == [None] * len(groups)
    found = lotr("inspect", lora, "--spectra")
    assert told not in found.out and "the faster they fall" in found.out
