"""Output appears whole or not at all: failures and Ctrl-C at every step of writing."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

import lotrtensor as lt
from adapters_fixtures import assert_refused, bert_pairs, lotr, nth_call, snapshot, write_lora
from lotrtensor import FormatError
from lotrtensor.adapters.formats import publish
from lotrtensor.adapters.formats.directory import check_output, write_directory

NEW = {"adapter_config.json": b"{}\n", "adapter_model.safetensors": bytes(range(256))}
OLD = {"adapter_config.json": b'{"old": 1}', "adapter_model.safetensors": b"old"}


def make_old(path):
    """An adapter directory that stands in the way."""
    path.mkdir()
    for name, content in OLD.items():
        (path / name).write_bytes(content)
    return path


def test_the_files_are_those_given(tmp_path):
    write_directory(tmp_path / "out", NEW)
    assert snapshot(tmp_path) == {"out": b"(directory)"} | {f"out/{n}": c for n, c in NEW.items()}


def test_parents_are_made_and_a_trailing_slash_is_fine(tmp_path):
    write_directory(Path(f"{tmp_path}/a/b/out/"), NEW)
    assert snapshot(tmp_path / "a" / "b" / "out") == NEW


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_directory(Path("out"), NEW)
    write_directory(Path("sub/../out2"), NEW)
    assert set(snapshot(tmp_path)) >= {"out/adapter_config.json", "out2/adapter_config.json"}


def test_everyone_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        write_directory(tmp_path / "out", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    for name in NEW:
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o644


def test_force_replaces_all_of_an_adapter(tmp_path):
    make_old(tmp_path / "out")
    write_directory(tmp_path / "out", NEW, force=True)
    assert snapshot(tmp_path / "out") == NEW
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_force_on_nothing_and_on_an_empty_directory(tmp_path):
    write_directory(tmp_path / "one", NEW, force=True)
    (tmp_path / "two").mkdir()
    write_directory(tmp_path / "two", NEW, force=True)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two") == NEW


def occupied(path, kind):
    """Something at ``path`` that is not to be replaced."""
    if kind == "adapter":
        make_old(path)
    elif kind == "file":
        path.write_text("precious")
    elif kind == "other directory":
        path.mkdir()
        (path / "thesis.tex").write_text("precious")
    elif kind == "config is a directory":
        (path / "adapter_config.json" / "x").mkdir(parents=True)
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "link to an adapter":
        path.symlink_to(make_old(path.parent / "real"))


@pytest.mark.parametrize("kind", ["adapter", "file", "other directory", "dangling link"])
def test_an_existing_output_is_refused(tmp_path, kind):
    occupied(tmp_path / "out", kind)
    before = snapshot(tmp_path)
    for function in (check_output, lambda path, force: write_directory(path, NEW, force=force)):
        with pytest.raises(FormatError, match=r"out exists.*--force"):
            function(tmp_path / "out", force=False)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "kind",
    ["file", "other directory", "config is a directory", "dangling link", "link to an adapter"],
)
def test_force_replaces_nothing_but_an_adapter(tmp_path, kind):
    occupied(tmp_path / "out", kind)
    before, link = snapshot(tmp_path), (tmp_path / "out").is_symlink()
    for function in (check_output, lambda path, force: write_directory(path, NEW, force=force)):
        with pytest.raises(FormatError, match=r"out exists and is not an adapter"):
            function(tmp_path / "out", force=True)
    assert snapshot(tmp_path) == before
    assert (tmp_path / "out").is_symlink() == link


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FormatError, match=r"file/out"):
        write_directory(tmp_path / "file" / "out", NEW)
    assert snapshot(tmp_path) == {"file": b"precious"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory nobody can write")
def test_a_parent_that_cannot_be_written():
    with pytest.raises(FormatError, match="/proc/lotr"):
        write_directory(Path("/proc/lotr-out"), NEW)


def test_a_name_that_no_file_system_takes(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "out"):
        with pytest.raises(FormatError, match="xxx"):
            write_directory(path, NEW)
        with pytest.raises(FormatError, match="xxx"):
            write_directory(path, NEW, force=True)
    assert snapshot(tmp_path) == {}


# --- failures at every step -----------------------------------------------------------------------


def disk_full():
    """What the operating system says."""
    return OSError(errno.ENOSPC, "No space left on device")


def attempt(path, *, force, error):
    """Write, expecting that it fails; return whether it did."""
    expected = FormatError if isinstance(error, OSError) else KeyboardInterrupt
    try:
        write_directory(path, NEW, force=force)
    except expected as caught:
        assert expected is KeyboardInterrupt or str(path) in str(caught)
        return True
    return False


STEPS = [
    *((os, "fsync", number) for number in (1, 2, 3, 4)),
    (os, "open", 1),
    (Path, "rename", 1),
    (Path, "rename", 2),
    (Path, "mkdir", 1),
    (Path, "mkdir", 2),
    (os, "mkdir", 1),
]
CTRL_C_ONLY = [(shutil, "rmtree", 1)]  # it is told to ignore the operating system's errors


def case(place, name, number, error, after):
    """One step at which one thing goes wrong."""
    kind = "full" if isinstance(error, OSError) else "ctrl-c"
    label = f"{place.__name__}.{name}-{number}-{kind}-{'after' if after else 'before'}"
    return pytest.param(place, name, number, error, after, id=label)


SYSTEMS = {"exchange": publish.renameat2, "two renames": lambda *_: False}
"""The kernel's own exchange, and a system that has none."""

CASES = [case(*step, disk_full(), False) for step in STEPS]
CASES += [
    case(*step, KeyboardInterrupt(), after)
    for step in STEPS + CTRL_C_ONLY
    for after in (False, True)
]


@pytest.mark.parametrize(("place", "name", "number", "error", "after"), CASES)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replace"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_failure_leaves_the_old_or_the_new_and_nothing_else(
    tmp_path, monkeypatch, place, name, number, error, after, exists, system
):
    monkeypatch.setattr(publish, "renameat2", SYSTEMS[system])
    out = tmp_path / "out"
    old = snapshot(make_old(out)) if exists else None
    broken = nth_call(getattr(place, name), number, error, after=after)
    with monkeypatch.context() as patched:
        patched.setattr(place, name, broken)
        failed = attempt(out, force=exists, error=error)
    # Left behind would be temporary files, or the old output under another name.
    assert {entry.name for entry in tmp_path.iterdir()} <= {"out"}
    found = snapshot(out) if out.exists() else None
    assert found in (old, NEW)
    if not failed:
        assert found == NEW
    if failed and isinstance(error, OSError):
        assert found == old, "refused, but the output has changed"


@pytest.mark.parametrize("error", [disk_full(), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_adapters_are_saved_atomically(tmp_path, monkeypatch, error):
    lora = lt.load(write_lora(tmp_path / "lora", bert_pairs(layers=2)))
    lotr = lt.convert(lora, rank=2)
    for adapter, name in ((lotr, "lotr-out"), (lora, "lora-out")):
        adapter.save(tmp_path / name)
        before = snapshot(tmp_path)
        for number in (1, 2, 3):
            with monkeypatch.context() as patched:
                patched.setattr(os, "fsync", nth_call(os.fsync, number, error))
                with pytest.raises(FormatError if isinstance(error, OSError) else type(error)):
                    adapter.save(tmp_path / name, force=True)
                assert snapshot(tmp_path) == before


def test_files_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, publish.renameat2
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(
        publish, "renameat2", lambda *args: (events.append("rename"), rename(*args))[1]
    )
    write_directory(tmp_path / "out", NEW)
    assert events == ["sync", "sync", "sync", "rename", "sync"]


@pytest.mark.parametrize("command", ["convert", "truncate", "export"])
def test_an_output_that_holds_the_input_is_refused(tmp_path, command):
    """--force would delete what is read; onto the input itself it is a change in place."""
    outer = write_lora(tmp_path / "outer", bert_pairs(2))
    inner = write_lora(outer / "inner", bert_pairs(2))
    if command == "export":
        lt.convert(lt.load(inner), rank=2).save(inner, force=True)
    before = snapshot(outer)
    goal = [] if command == "export" else ["--rank", 1]
    found = lotr(command, inner, "-o", outer, *goal, "--force")
    assert_refused(found, str(inner), "would delete")
    assert snapshot(outer) == before
    assert lotr(command, inner, "-o", inner, *goal, "--force").code == 0
    assert lt.load(inner).parameters
