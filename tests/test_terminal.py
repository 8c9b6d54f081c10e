"""What a terminal is sent, streams that are closed, and Ctrl-C from the first moment on."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import lotrtensor as lt
from lotrtensor.report.names import plain_console, shown_name
from tests.adapters_fixtures import assert_refused, document, lotr, write_lora

HOSTILE = "\x1b]0;PWNED\x07\x1b[2J\x9b31m\u202e\x00[red]:skull:"
FORBIDDEN = "\x1b\x9b\u202e\x00\x07"

posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


@pytest.fixture
def hostile(tmp_path):
    pairs = {f"layers.{k}.q{HOSTILE}": (np.ones((6, 2)), np.ones((2, 5))) for k in range(2)}
    extras = {f"base_model.model.h{HOSTILE}.weight": np.ones((2, 2), np.float32)}
    names = {"base_model_name_or_path": "base" + HOSTILE, "modules_to_save": ["h" + HOSTILE]}
    return write_lora(tmp_path / "x", pairs, extras=extras, **names)


def test_no_command_prints_a_control_character_of_a_file(hostile, tmp_path):
    out = tmp_path / "out\x1b[2J"
    commands = [
        ("inspect", hostile),
        ("verify", hostile, hostile),
        ("analyze", hostile),
        ("convert", hostile, "-o", f"{out}1", "--rank", 1),
        ("inspect", f"{out}1"),
        ("analyze", hostile, "-o", f"{out}.html"),
        ("export", f"{out}1", "-o", f"{out}2"),
        ("truncate", hostile, "-o", f"{out}3", "--rank", 1),
        ("truncate", f"{out}1", "-o", f"{out}4", "--rank", 1),
        ("compress", hostile, "-o", f"{out}5", "--tolerance", 0.3),
        ("inspect", f"{out}5"),
        ("convert", hostile, "-o", f"{out}1", "--rank", 1),  # refused: it exists
    ]
    for command in commands:
        found = lotr(*command)
        assert not set(FORBIDDEN) & set(found.out + found.err), command
        assert "Traceback" not in found.err


def test_a_name_forges_no_row(tmp_path):
    source = write_lora(tmp_path / "x", base_model_name_or_path="base\n  all   1.000")
    found = lotr("inspect", source)
    assert r"base model: base\n  all   1.000" in found.out
    assert not any(line.strip().startswith("all   1.000") for line in found.out.splitlines())


def test_a_document_still_holds_the_names_as_they_are(hostile):
    names = [row["name"] for row in document("inspect", hostile)["modules"]]
    assert names == [f"layers.{k}.q{HOSTILE}" for k in range(2)]


def test_markup_and_emoji_of_a_name_are_shown_as_they_are(capsys):
    console = plain_console(width=80)
    console.print(shown_name("[red]x[/] :skull: \x1b[2J"))
    console.print("y\x1b[2J\nz", markup=False)
    assert capsys.readouterr().out == "[red]x[/] :skull: \\x1b[2J\ny\\x1b[2J\nz\n"


def shell(command, **environment):
    """Run a shell command in which $LOTR is the command line of this package."""
    program = (
        "import sys; sys.argv[0] = 'lotr'; import lotrtensor.cli; sys.exit(lotrtensor.cli.main())"
    )
    run = {"LOTR": f'{sys.executable} -c "{program}"'} | environment
    return subprocess.run(
        ["/bin/sh", "-c", command.replace("$LOTR", run["LOTR"])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@posix
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_result(tmp_path, closed):
    source = write_lora(tmp_path / "x")
    found = shell(f"$LOTR convert {source} -o {tmp_path}/out --rank 2 {closed}")
    assert (found.returncode, found.stderr) == (0, "")
    assert lt.load(tmp_path / "out").groups
    for command, code in (("inspect", 0), ("inspect --json", 0), ("--help", 0), ("verify", 2)):
        found = shell(f"$LOTR {command} {source if 'help' not in command else ''} {closed}")
        assert found.returncode == code, command
        assert "Traceback" not in found.stderr
    found = shell(f"$LOTR inspect {tmp_path}/nosuch --json {closed}")
    assert (found.returncode, found.stdout) == (1, "")


START = """
import os, signal, sys
if os.environ["BACKGROUND"] == "True":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["lotr", *sys.argv[1:]]

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from lotrtensor.cli import main
main()
"""


@posix
@pytest.mark.parametrize(
    "at", ["lotrtensor.cli.app", "typer", "numpy", "lotrtensor.cli.demo", "rich.table"]
)
@pytest.mark.parametrize("background", [False, True])
def test_an_interrupt_while_loading_is_silent(at, background):
    child = subprocess.Popen(
        [sys.executable, "-c", START, "demo"],
        env=os.environ | {"AT": at, "BACKGROUND": str(background)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "")


def test_no_one_else_s_interrupts_are_touched():
    before = signal.getsignal(signal.SIGINT)
    program = "import signal, lotrtensor; print(signal.getsignal(signal.SIGINT))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "default_int_handler" in done.stdout
    assert signal.getsignal(signal.SIGINT) is before


@posix
def test_an_interrupt_at_work_leaves_nothing(tmp_path):
    rng = np.random.default_rng(0)
    pairs = {
        f"l.{k}.q": (rng.normal(size=(256, 16)), rng.normal(size=(16, 256))) for k in range(60)
    }
    source = write_lora(tmp_path / "x", pairs)
    program = "from lotrtensor.cli import main; main()"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            program,
            "convert",
            source,
            "-o",
            tmp_path / "out",
            "--tolerance",
            "0.1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(2.5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode in (0, 130)
    assert "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} <= {"x", "out"}
    if (tmp_path / "out").exists():
        assert lt.load(tmp_path / "out").groups


def test_a_path_that_is_no_utf_8_has_a_page(tmp_path):
    source = write_lora(tmp_path / os.fsdecode(b"n\xff"))
    found = lotr("analyze", source, "-o", tmp_path / "r.html")
    assert found.code == 0, found.err
    assert "<html" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert_refused(lotr("analyze", source, "-o", tmp_path / "r.html"), "--force")
