"""Outputs survive kills, races and other people's files: what stood there, or the new, complete."""

import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import lotrtensor as lt
from lotrtensor.adapters.formats import publish
from lotrtensor.adapters.formats.directory import write_directory
from tests.adapters_fixtures import assert_refused, lotr, snapshot, write_lora
from tests.checkpoint_fixtures import full, model, pair, write

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_exchange = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's renameat2")

NEW = {"adapter_config.json": b"{}\n", "adapter_model.safetensors": bytes(range(256))}
OLD = {"adapter_config.json": b'{"old": 1}', "adapter_model.safetensors": b"old"}

BOUNDARIES = ("fsync", "open", "rename", "mkdir", "rmdir", "unlink", "write", "close")


def killed(number, call):
    """Run ``call`` in a process that is killed at its ``number``-th step; whether it was."""
    child = os.fork()
    if not child:
        seen = 0

        def step():
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        for name in BOUNDARIES:
            real = getattr(os, name)

            def stepped(*args, real=real, **kwargs):
                step()
                return real(*args, **kwargs)

            setattr(os, name, stepped)
        exchange = publish.renameat2

        def exchanged(*args):
            step()
            found = exchange(*args)
            step()
            return found

        publish.renameat2 = exchanged
        for method in ("rename", "mkdir", "replace"):
            plain = getattr(Path, method)

            def moved(self, *args, plain=plain, **kwargs):
                step()
                found = plain(self, *args, **kwargs)
                step()
                return found

            setattr(Path, method, moved)
        try:
            call()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replace"])
@pytest.mark.parametrize("system", ["exchange", "two renames"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path, monkeypatch, exists, system):
    if system == "two renames":
        monkeypatch.setattr(publish, "renameat2", lambda *_: False)
    out = tmp_path / "out"
    for number in range(1, 100):
        if exists:
            write_directory(out, OLD, force=True)
        was_killed = killed(number, lambda: write_directory(out, NEW, force=exists))
        found = snapshot(out) if out.exists() else None
        if system == "exchange" or not was_killed:
            assert found in ((OLD, NEW) if exists else (None, NEW)), number
        else:  # between two renames the old one is in the hidden folder, and comes back
            assert found in (OLD, NEW, None), number
            with publish.scratch(out):
                pass
            assert (snapshot(out) if out.exists() else None) in (
                (OLD, NEW) if exists else (None, NEW)
            )
        write_directory(out, NEW, force=True)  # the next run succeeds, and leaves nothing else
        assert snapshot(out) == NEW
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        if not exists:
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        if not was_killed:
            assert number > 10
            return
    raise AssertionError("the writer never came to an end")


@needs_fork
@needs_exchange
def test_a_kill_while_merging_leaves_the_old_or_the_new(tmp_path):
    base, _, _, _ = pair(tmp_path, rank=2, shards=2)
    adapter = full(tmp_path)
    out = write(tmp_path / "merged", model(seed=9))
    old = snapshot(out)
    lt.merge(base, adapter, tmp_path / "reference")
    new = snapshot(tmp_path / "reference")
    for number in range(1, 400, 3):
        was_killed = killed(number, lambda: lt.merge(base, adapter, out, force=True))
        assert snapshot(out) in (old, new), number
        if not was_killed:
            break
    else:
        raise AssertionError("the merge never came to an end")
    lt.merge(base, adapter, out, force=True)
    assert snapshot(out) == new
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_folder_of_a_living_writer_is_left_alone(tmp_path):
    with publish.scratch(tmp_path / "out") as first:
        (first / "x").write_text("half")
        with publish.scratch(tmp_path / "out") as second:
            assert first != second
            assert (first / "x").read_text() == "half"
        assert (first / "x").exists()
        assert not second.exists()
    assert snapshot(tmp_path) == {}


def test_a_long_name_leaves_room_for_that_of_the_folder(tmp_path):
    name = "é" * 127
    write_directory(tmp_path / name, NEW)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def appear(monkeypatch, make):
    """Let something appear at the output just before it is put in its place."""
    real = publish.publish

    def late(fresh, path, check, *, force):
        make(path)
        return real(fresh, path, check, force=force)

    for module in ("directory", "checkpoint_writer"):
        monkeypatch.setattr(f"lotrtensor.adapters.formats.{module}.publish", late)


def a_directory(path):
    path.mkdir()
    (path / "thesis.txt").write_text("precious")


def a_file(path):
    path.write_text("precious")


@pytest.mark.parametrize("system", ["exchange", "two renames"])
@pytest.mark.parametrize("make", [a_directory, a_file])
@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_untouched(tmp_path, monkeypatch, make, system, force):
    if system == "two renames":
        monkeypatch.setattr(publish, "renameat2", lambda *_: False)
    adapter = lt.load(write_lora(tmp_path / "lora"))
    image = lt.LoraAdapter(
        (lt.LoraModule("lora_unet_x", np.ones((4, 1)), np.ones((1, 4))),), {}, np.dtype("float32")
    )
    base, _, _, _ = pair(tmp_path, rank=2)
    merged = full(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    appear(monkeypatch, make)
    for out, call in (
        ("a", lambda path: adapter.save(path, force=force)),
        ("b", lambda path: lt.merge(base, merged, path, force=force)),
        ("c.safetensors", lambda path: image.save(path, file_format="kohya", force=force)),
    ):
        with pytest.raises(lt.FormatError):
            call(tmp_path / out)
        found = tmp_path / out
        assert (found if found.is_file() else found / "thesis.txt").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == before | {"a", "b", "c.safetensors"}


def test_of_two_writers_one_wins_and_the_other_says_so(tmp_path):
    adapter, outcomes = lt.load(write_lora(tmp_path / "lora")), []

    def run():
        try:
            adapter.save(tmp_path / "out")
            outcomes.append("written")
        except lt.FormatError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("written") == 1
    refused = [text for text in outcomes if text != "written"]
    assert all(("out" in text and "exist" in text) or "appeared" in text for text in refused), (
        refused
    )
    assert lt.compare(adapter, lt.load(tmp_path / "out")).relative_error == 0.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora", "out"]


def test_force_keeps_what_is_no_part_of_an_adapter(tmp_path):
    adapter = lt.load(write_lora(tmp_path / "lora"))
    out = write_lora(tmp_path / "out")
    for name in ("notes.txt", "checkpoint-500/optimizer.pt", ".git/config", "README.md"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
        before = snapshot(out)
        with pytest.raises(lt.FormatError, match="would be deleted"):
            adapter.save(out, force=True)
        assert_refused(lotr("convert", tmp_path / "lora", "-o", out, "--rank", 1, "--force"), "out")
        assert snapshot(out) == before
        (out / name).unlink()
        if "/" in name:
            (out / name).parent.rmdir()
    adapter.save(out, force=True)


def test_force_keeps_what_is_no_part_of_a_merged_checkpoint(tmp_path):
    base, _, _, _ = pair(tmp_path, rank=2)
    adapter = full(tmp_path)
    lt.merge(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "run").mkdir()
    (tmp_path / "out" / "run" / "log.txt").write_text("precious")
    with pytest.raises(lt.FormatError, match=r"run/log\.txt, which would be deleted"):
        lt.merge(base, adapter, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "run" / "log.txt").read_text() == "precious"


def test_force_replaces_no_file_but_a_lora(tmp_path):
    import safetensors.numpy

    image = lt.LoraAdapter(
        (lt.LoraModule("lora_unet_x", np.ones((4, 1)), np.ones((1, 4))),), {}, np.dtype("float32")
    )
    for name, content in (
        ("base", safetensors.numpy.save({"w": np.ones((4, 4))})),
        ("text", b"precious"),
        ("mixed", safetensors.numpy.save({"w": np.ones(4), "x.lora_down.weight": np.ones(4)})),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(lt.FormatError, match="not replaced"):
            image.save(path, file_format="kohya", force=True)
        assert path.read_bytes() == content
    image.save(tmp_path / "lora.safetensors", file_format="kohya")
    image.save(tmp_path / "lora.safetensors", file_format="kohya", force=True)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 300 + "/y"])
def test_output_paths_that_no_file_system_takes(tmp_path, path):
    adapter = lt.load(write_lora(tmp_path / "lora"))
    base, _, _, _ = pair(tmp_path, rank=2)
    before = snapshot(tmp_path)
    for call in (
        lambda: adapter.save(f"{tmp_path}/{path}"),
        lambda: lt.convert(adapter, rank=1).save(f"{tmp_path}/{path}"),
        lambda: lt.merge(base, full(tmp_path / "m"), f"{tmp_path}/{path}"),
    ):
        with pytest.raises(lt.LotrError):
            call()
    assert snapshot(tmp_path).items() >= before.items()


@needs_fork
def test_parents_that_were_made_go_with_a_failure(tmp_path, monkeypatch):
    adapter = lt.load(write_lora(tmp_path / "lora"))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(lt.FormatError, match="No space left"):
            adapter.save(tmp_path / "a" / "b" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
    adapter.save(tmp_path / "a" / "b" / "out")


def test_a_result_that_cannot_be_read_is_not_put_in_place(tmp_path, monkeypatch):
    lt.convert(lt.load(write_lora(tmp_path / "lora")), rank=2).save(tmp_path / "lotr")
    before = snapshot(tmp_path)

    def unreadable(_):
        raise lt.FormatError("it cannot be read")

    from lotrtensor.cli import export, truncate

    real = lt.load
    for module, command in ((export, ["export"]), (truncate, ["truncate", "--rank", 1])):

        def load(path):
            return unreadable(path) if ".lotr-unfinished" in str(path) else real(path)

        monkeypatch.setattr(module, "load", load)
        found = lotr(command[0], tmp_path / "lotr", "-o", tmp_path / "out", *command[1:])
        assert_refused(found, "cannot be read")
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["file", "directory"])
def test_merge_gives_nothing_away_that_links_lead_to(tmp_path, target):
    base, _, _, _ = pair(tmp_path, rank=2)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("SECRET")
    if target == "file":
        (base / "notes.txt").symlink_to(tmp_path / "secret" / "key")
    else:
        (base / "1_Pooling").symlink_to(tmp_path / "secret")
        (base / "modules.json").write_text('[{"path": "1_Pooling"}]')
    with pytest.raises(lt.FormatError, match="is a link out of"):
        lt.merge(base, full(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["snapshots/0", "model"])
def test_links_inside_a_checkpoint_and_into_a_hub_s_cache_are_followed(tmp_path, place):
    base, _, _, _ = pair(tmp_path, rank=2)
    adapter = full(tmp_path)
    hub = tmp_path / "hub" / "models--a--b"
    snapshot_ = hub / place
    snapshot_.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, path in enumerate(base.iterdir()):
        (hub / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot_ / path.name).symlink_to(hub / "blobs" / str(number))
    (snapshot_ / "inner.txt").symlink_to("config.json")
    lt.merge(snapshot_, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "inner.txt").is_file()


def test_a_shard_that_shrinks_while_it_is_copied_is_refused(tmp_path, monkeypatch):
    import shutil

    base, _, _, _ = pair(tmp_path, rank=2)
    adapter = full(tmp_path)
    real = shutil.copyfileobj

    def short(source, target, *args):
        if getattr(source, "name", None) is not None and os.fstat(source.fileno()).st_size > 2000:
            target.write(source.read(1000))
            return None
        return real(source, target, *args)

    monkeypatch.setattr(shutil, "copyfileobj", short)
    with pytest.raises(lt.FormatError, match="has become shorter"):
        lt.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["..", ".", "a/../b", "a\\..\\b"])
def test_an_address_does_not_lead_out_of_its_repository(part):
    with pytest.raises(lt.FormatError, match=r"leads out|no address"):
        lt.load(f"hf://owner/name/x/{part}/y")
