"""The life of a pack: added to, removed from, fitted anew, stopped at any instant, misused."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from adapters_fixtures import WEIGHTS, lotr, write_lora
from lotrtensor.adapters.formats import publish
from lotrtensor.packs import files, tasks
from memory import peak_of
from pack_fixtures import contents, dense_error, family


@pytest.fixture
def pack(tmp_path):
    return lt.pack(family(4), tmp_path / "pack", tolerance=0.15, share="adapters")


def test_adding_rewrites_no_shard(pack):
    before, one = contents(pack.path), family(5)["user-4"]
    row = pack.add("new", one)
    after = contents(pack.path)
    assert {n: x for n, x in after.items() if n in before and n != files.INDEX} == {
        n: x for n, x in before.items() if n != files.INDEX
    }
    assert len(after) == len(before) + 1
    assert row == lt.Pack(pack.path).rows[-1]
    assert row.relative_error <= 0.15 and row.mean_error is None
    assert dense_error(pack.member("new").updates(), one) <= 0.15


def test_another_tolerance_for_one_that_is_added(pack):
    one = family(5)["user-4"]
    assert pack.add("new", one, tolerance=0.03).relative_error <= 0.03
    with pytest.raises(lt.RankError):
        pack.add("other", one, tolerance=2.0)
    assert "other" not in lt.Pack(pack.path).names


def test_what_was_removed_is_gone_and_its_number_is_not_used_again(pack):
    pack.add("new", family(5)["user-4"])
    numbers = {entry.number for entry in pack._index.adapters.values()}
    alone = pack._index.adapters["new"].shard
    pack.remove("new")
    assert not (pack.path / alone).exists()
    pack.remove("user-1")
    assert pack.names == ("user-0", "user-2", "user-3")
    pack.add("new", family(5)["user-4"])
    assert pack._index.adapters["new"].number not in numbers
    pack.check()
    with pytest.raises(lt.FormatError, match="holds no adapter 'user-1'; it has user-0, user-2"):
        pack.remove("user-1")


def test_all_may_be_removed_and_others_added(pack):
    for name in pack.names:
        pack.remove(name)
    assert pack.names == () and not any(f.startswith("adapters") for f in pack.files)
    pack.add("a", family(1)["user-0"])
    assert lt.Pack(pack.path).names == ("a",)


def test_refit_with_originals_is_a_pack_of_them(pack, tmp_path):
    adapters = family(4) | {f"other-{i}": a for i, a in enumerate(family(4, seed=5).values())}
    for name in list(adapters)[4:]:
        pack.add(name, adapters[name])
    before = pack.bytes
    found = lt.refit(pack, adapters)
    assert found.bytes < before
    assert list(found.names) == list(adapters)
    for row in found.rows:
        error = dense_error(found.member(row.name).updates(), adapters[row.name])
        assert error == pytest.approx(row.relative_error, rel=1e-4) and error <= 0.15


def test_refit_without_originals_states_what_is_lost_twice(pack):
    adapters = family(4)
    found = lt.refit(pack, {"user-0": adapters["user-0"]})
    for row in found.rows:
        error = dense_error(found.member(row.name).updates(), adapters[row.name])
        assert error <= row.relative_error * (1 + 1e-6)
        assert (row.relative_error <= 0.15) == (row.name == "user-0")


def test_a_pack_made_for_a_size(tmp_path):
    found = lt.pack(family(4), tmp_path / "pack", budget=20_000)
    row = found.add("new", family(5)["user-4"])
    assert row.relative_error < 2 * max(r.relative_error for r in found.rows[:-1]) + 0.01
    with pytest.raises(lt.RankError, match="was made for a size; give the tolerance"):
        lt.refit(found)
    assert lt.refit(found, family(4), tolerance=0.2).goal == {"tolerance": 0.2}


def test_one_that_the_bases_do_not_suit_is_refused(tmp_path):
    found = lt.pack(family(6), tmp_path / "pack", share="adapters", rank=4)
    least = min(1 - row.relative_error**2 for row in found.rows)
    akin, other = family(7)["user-6"], family(1, seed=9)["user-0"]
    before = contents(found.path)
    with pytest.raises(
        lt.RankError, match=r"other: other would have .*; without max_error it is at most 0.7"
    ):
        found.add_all({"akin": akin, "other": other})
    assert contents(found.path) == before  # none of them
    assert 1 - found.add("akin", akin).relative_error ** 2 >= 0.5 * least
    assert found.add("private", other, tolerance=0.1).relative_error <= 0.1
    row = found.add("other", other, max_error=1.0)
    assert 1 - row.relative_error**2 < 0.5 * least
    assert dense_error(found.member("other").updates(), other) <= row.relative_error
    assert found.names[-3:] == ("akin", "private", "other")
    with pytest.raises(lt.RankError, match="without max_error"):  # what was let in is no measure
        found.add("another", family(1, seed=10)["user-0"])


def test_a_largest_error_of_what_is_added(tmp_path):
    found, one = lt.pack(family(4), tmp_path / "pack", budget=20_000), family(5)["user-4"]
    before = contents(found.path)
    with pytest.raises(lt.RankError, match="max_error is 1e-06"):
        found.add("new", one, max_error=1e-6)
    for bad in (-1, float("nan"), "much", True):
        with pytest.raises(lt.OptionError, match="max_error"):
            found.add("new", one, max_error=bad)
    assert contents(found.path) == before
    assert found.add("new", one, max_error=0.9).relative_error < 0.9


def test_several_are_added_at_once_or_none(pack, tmp_path):
    for name in pack.names:
        pack.remove(name)
    before = contents(pack.path)
    narrow = family(1, kinds={"query": (24, 24)})["user-0"]
    with pytest.raises(lt.FormatError, match="different base models"):
        pack.add_all({"a": family(1)["user-0"], "b": narrow})
    assert contents(pack.path) == before
    for bad in (["a"], "a", family(1)["user-0"], None):
        with pytest.raises(lt.OptionError, match="expected adapters by their names"):
            pack.add_all(bad)
    with pytest.raises(lt.OptionError, match="max_error"):
        pack.add_all({}, max_error="much")
    with pytest.raises(lt.RankError, match="user-0: tolerance is 1e-07"):
        pack.add_all(family(2), tolerance=1e-7)
    assert contents(pack.path) == before and pack.add_all({}) == ()
    seen = []
    rows = pack.add_all(family(3), progress=lambda *step: seen.append(step))
    assert [row.name for row in rows] == list(pack.names) == ["user-0", "user-1", "user-2"]
    assert seen == [(f"user-{i}", i, 3) for i in range(3)]
    pack.check()


def test_adding_on_any_executor_writes_the_same_bytes(tmp_path):
    made = lt.pack(family(4), tmp_path / "0", tolerance=0.15, share="adapters")
    paths = {}
    for name, adapter in list(family(8).items())[4:]:
        adapter.save(tmp_path / name)
        paths[name] = tmp_path / name
    shutil.copytree(made.path, tmp_path / "1")
    shutil.copytree(made.path, tmp_path / "2")
    spawned = multiprocessing.get_context("spawn")
    found = []
    for i, executor in enumerate(
        (ThreadPoolExecutor(1), ThreadPoolExecutor(3), ProcessPoolExecutor(1, spawned))
    ):
        with executor:
            lt.Pack(tmp_path / str(i)).add_all(paths, executor=executor)
        found.append(contents(tmp_path / str(i)))
    assert found[0] == found[1] == found[2]
    with pytest.raises(lt.OptionError, match="executor is a str"):
        made.add_all(paths, executor="threads")


def test_added_adapters_must_be_of_one_model_with_each_other(pack):
    """Of modules that the pack does not know."""
    two = {}
    for name, side in (("a", 24), ("b", 30)):
        two[name] = family(1, kinds={"new": (side, side)})["user-0"]
    before = contents(pack.path)
    with pytest.raises(
        lt.FormatError,
        match=r"^b: layers.0.new is 24 × 24 in an adapter that is added with it and 30 × 30 in b",
    ):
        pack.add_all(two)
    assert contents(pack.path) == before


def test_where_one_is_refused_no_file_is_left(pack, tmp_path):
    """Though others were encoded, and written, before it or beside it."""
    before = contents(pack.path)
    several = dict(list(family(8).items())[4:])
    with pytest.raises(lt.FormatError, match="bad: "):
        pack.add_all(several | {"bad": tmp_path / "missing"})
    assert contents(pack.path) == before


class GivenUp(Executor):
    """Pieces that can be cancelled while they run, and then run on, as those of Dask do."""

    def __init__(self):
        self.late = []

    def submit(self, work, *args):
        piece = Future()

        def run():
            with contextlib.suppress(lt.LotrError):
                return work(*args)

        if args[2] == "bad":
            piece.set_exception(lt.FormatError("bad: is bad"))
        else:
            self.late.append(run)
        return piece


def test_what_a_worker_writes_too_late_harms_nothing(pack, tmp_path):
    """Into a pack that has gone on, and under numbers that others have by then."""
    executor, others = GivenUp(), dict(list(family(8).items())[4:])
    with pytest.raises(lt.FormatError, match="is bad"):
        pack.add_all({"bad": tmp_path} | others, executor=executor)
    pack.add_all({"x": family(9)["user-8"], "y": family(10)["user-9"]})
    after = contents(pack.path)
    for run in executor.late:
        run()
    assert len(executor.late) == 4 and contents(pack.path) == after
    pack.check()
    pack.remove("x")
    assert not list(pack.path.glob(".adding-*"))


@pytest.mark.parametrize("words", [["pack", "-o", "new", "--tolerance", 0.3], ["add"], ["refit"]])
def test_threads_that_are_none_are_refused(pack, words, monkeypatch):
    monkeypatch.chdir(pack.path.parent)
    before = contents(pack.path)
    path = [] if words[0] == "pack" else [pack.path]
    found = lotr(words[0], *path, write_lora(Path("one")), *words[1:], "--threads", 0)
    assert found.code == 2 and "--threads" in found.err and "Traceback" not in found.err
    assert contents(pack.path) == before and not Path("new").exists()


def test_an_executor_that_takes_no_work(pack):
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    before = contents(pack.path)
    with pytest.raises(lt.OptionError, match="the executor takes no work"):
        pack.add_all({"new": family(1)["user-0"]}, executor=closed)
    with pytest.raises(lt.FormatError, match="an adapter has the name 3"):
        pack.add_all({3: family(1)["user-0"]})
    assert contents(pack.path) == before


def test_memory_does_not_grow_with_the_number_of_adapters(tmp_path, monkeypatch):
    """Neither of a build, once cells are made of a sample, nor of what is added."""
    monkeypatch.setattr(tasks, "ENTRIES", 1)
    monkeypatch.setattr(tasks, "FEWEST", 8)
    kinds = {"query": (400, 400)}
    paths = []
    for name, adapter in family(24, kinds=kinds, layers=1).items():
        adapter.save(tmp_path / name)
        paths.append(tmp_path / name)
    how = {"share": "adapters", "tolerance": 0.4, "executor": ThreadPoolExecutor(1)}
    lt.pack(paths[:2], tmp_path / "first", **how)  # modules are loaded

    def build(count):
        return peak_of(lambda: lt.pack(paths[:count], tmp_path / f"{count}", **how))

    few, many = build(9), build(24)
    assert many < 1.25 * few
    names = {path.name: path for path in paths}

    def add(count):
        found = lt.pack(paths[:8], tmp_path / f"to-{count}", **how)
        added = dict(list(names.items())[8 : 8 + count])
        return peak_of(lambda: found.add_all(added, executor=how["executor"]))

    few, many = add(4), add(16)
    assert many < 1.25 * few


# --- stopped at any instant -----------------------------------------------------------------------


@contextlib.contextmanager
def stopped_at(monkeypatch, count):
    """The process ends just before the file system is changed for the n-th time."""
    left = [count]

    def counted(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(publish, "renameat2", counted(publish.renameat2))
        yield left


@pytest.mark.parametrize("verb", ["add", "remove", "force"])
def test_stopped_at_any_instant_the_old_pack_or_the_new_one_stands(tmp_path, monkeypatch, verb):
    adapters = family(3)
    made = lt.pack(adapters, tmp_path / "pack", tolerance=0.3, executor=ThreadPoolExecutor(1))
    act = {
        "add": lambda: lt.Pack(made.path).add("new", family(4)["user-3"]),
        "remove": lambda: lt.Pack(made.path).remove("user-1"),
        "force": lambda: lt.pack({"x": adapters["user-0"]}, made.path, tolerance=0.3, force=True,
                                 executor=ThreadPoolExecutor(1)),
    }[verb]  # fmt: skip
    new = {"add": (*made.names, "new"), "remove": ("user-0", "user-2"), "force": ("x",)}[verb]
    seen = set()
    for count in range(60):
        with stopped_at(monkeypatch, count) as left:
            with contextlib.suppress(KeyboardInterrupt):
                act()
            finished = left[0] >= 0
        found = lt.Pack(made.path)
        found.check()
        assert found.names in (made.names, new)
        seen.add(found.names)
        if finished or found.names == new:
            break
    assert new in seen
    if verb == "add":
        assert made.names in seen
        found.remove("new")
    assert lt.Pack(made.path).names


class Broken(Executor):
    """Runs some pieces of work, then its workers are gone."""

    def __init__(self, count):
        self.count = count

    def submit(self, work, *args):
        self.count -= 1
        found = Future()
        if self.count < 0:
            found.set_exception(BrokenExecutor("a worker was killed"))
        else:
            found.set_result(work(*args))
        return found


@pytest.mark.parametrize("count", [0, 2, 6, 12, 17, 25])
def test_a_build_that_was_stopped_goes_on(tmp_path, count):
    paths = [write_lora(tmp_path / name) for name in ("a", "b", "c")]
    lt.pack(paths, tmp_path / "straight", tolerance=0.3, executor=ThreadPoolExecutor(1))
    with pytest.raises(lt.FormatError, match="run the same command again"):
        lt.pack(paths, tmp_path / "pack", tolerance=0.3, executor=Broken(count))
    with pytest.raises(lt.FormatError, match="not finished; run the command"):
        lt.Pack(tmp_path / "pack")
    done = [p for p in (tmp_path / "pack" / "building").rglob("*") if p.is_file()]
    calls = []

    class Watching(ThreadPoolExecutor):
        def submit(self, work, *args):
            calls.append(work)
            return super().submit(work, *args)

    lt.pack(paths, tmp_path / "pack", tolerance=0.3, executor=Watching(1))
    assert contents(tmp_path / "pack") == contents(tmp_path / "straight")
    assert bool(done) == (count > 0) and calls
    assert not (tmp_path / "pack" / "building").exists()


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    paths = [write_lora(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(lt.FormatError):
        lt.pack(paths, tmp_path / "pack", tolerance=0.3, executor=Broken(9))
    monkeypatch.setattr("lotrtensor.packs.spool.load", None)  # adapters are not read again
    lt.pack(paths, tmp_path / "pack", tolerance=0.3)


def test_another_question_starts_afresh(tmp_path):
    paths = [write_lora(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(lt.FormatError):
        lt.pack(paths, tmp_path / "pack", tolerance=0.3, executor=Broken(9))
    found = lt.pack(paths, tmp_path / "pack", tolerance=0.1)
    assert max(row.relative_error for row in found.rows) <= 0.1


def test_a_process_that_is_killed_leaves_the_lock_free(tmp_path):
    paths = [str(write_lora(tmp_path / f"a{i}")) for i in range(3)]
    program = (
        "import os, signal, sys, lotrtensor as lt, lotrtensor.packs.tasks as t\n"
        "work = t.encode\n"
        "def stop(*a):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.encode = stop\n"
        "lt.pack(sys.argv[2:], sys.argv[1], tolerance=0.3)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "pack"), *paths]
    run = subprocess.run(command, check=False)
    assert run.returncode == -signal.SIGKILL
    assert lt.pack(paths, tmp_path / "pack", tolerance=0.3).names == ("a0", "a1", "a2")


# --- misuse ---------------------------------------------------------------------------------------


def test_a_second_writer_is_locked_out(pack):
    one, before = family(5)["user-4"], contents(pack.path)
    with files.locked(pack.path):
        for act in (
            lambda: pack.add("new", one),
            lambda: pack.remove("user-0"),
            lambda: lt.refit(pack, {}),
            lambda: lt.pack({"x": one}, pack.path, tolerance=0.3, force=True),
        ):
            with pytest.raises(lt.FormatError, match="is being written by another process"):
                act()
        assert lt.Pack(pack.path).member("user-0")  # who reads needs no lock
    assert contents(pack.path) == before
    pack.add("new", one)


def test_one_name_twice(pack, tmp_path):
    a, b = write_lora(tmp_path / "x" / "same"), write_lora(tmp_path / "y" / "same")
    with pytest.raises(lt.FormatError, match="two adapters have the name 'same'"):
        lt.pack([a, b], tmp_path / "out", tolerance=0.3)
    with pytest.raises(lt.FormatError, match="two adapters have the name 'user-0'"):
        pack.add("user-0", a)
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_base_model(pack, tmp_path):
    wide = family(1, kinds={"query": (100, 120), "dense": (240, 160)})["user-0"]
    says = "layers.0.query is 160 × 120 in .* and 100 × 120 in .*different base models"
    with pytest.raises(lt.FormatError, match=says):
        lt.pack(family(2) | {"wide": wide}, tmp_path / "out", tolerance=0.3)
    before = contents(pack.path)
    with pytest.raises(lt.FormatError, match=says):
        pack.add("wide", wide)
    assert contents(pack.path) == before and not (tmp_path / "out").exists()


def test_a_corrupt_adapter_among_many(tmp_path):
    paths = [write_lora(tmp_path / name) for name in ("a", "b", "c")]
    weights = paths[1] / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(lt.FormatError, match=r"b.adapter_model.safetensors cannot be read"):
        lt.pack(paths, tmp_path / "pack", tolerance=0.3)
    assert not (tmp_path / "pack").exists()
    with pytest.warns(lt.LotrWarning, match="b is left out: .*cannot be read"):
        found = lt.pack(paths, tmp_path / "pack", tolerance=0.3, skip_bad=True)
    assert found.names == ("a", "c")


def test_all_are_corrupt(tmp_path):
    path = write_lora(tmp_path / "a")
    (path / WEIGHTS).write_bytes(b"no weights")
    with pytest.warns(lt.LotrWarning), pytest.raises(lt.FormatError, match="no adapter is left"):
        lt.pack([path], tmp_path / "pack", tolerance=0.3, skip_bad=True)
    assert not (tmp_path / "pack").exists()


def test_an_adapter_that_diverged(tmp_path):
    tensors = safetensors.numpy.load_file(write_lora(tmp_path / "a") / WEIGHTS)
    key = next(iter(tensors))
    tensors[key] = np.full_like(tensors[key], np.nan)
    safetensors.numpy.save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(lt.DataError, match=r"a: .*NaN"):
        lt.pack([tmp_path / "a"], tmp_path / "pack", tolerance=0.3)


def test_what_stands_there_is_not_replaced(pack, tmp_path):
    adapters = family(1)
    with pytest.raises(lt.FormatError, match="exists; choose another output, add --force"):
        lt.pack(adapters, pack.path, tolerance=0.3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(lt.FormatError, match="exists and is no pack"):
        lt.pack(adapters, tmp_path / "other", tolerance=0.3, force=True)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    assert lt.pack(adapters, pack.path, tolerance=0.3, force=True).names == ("user-0",)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, lt.RankError, "tolerance"),
        ({"tolerance": 0.1, "budget": 9000}, lt.RankError, "budget"),
        ({"tolerance": 1.5}, lt.RankError, "tolerance is 1.5"),
        ({"budget": "many"}, lt.RankError, "budget is 'many'"),
        ({"tolerance": 0.1, "share": "all"}, lt.OptionError, "share is 'all'"),
        ({"tolerance": 0.1, "executor": 3}, lt.OptionError, "executor is a int"),
    ],
)
def test_options_that_have_no_meaning(tmp_path, options, error, says):
    with pytest.raises(error, match=says):
        lt.pack(family(2), tmp_path / "pack", **options)
    assert not (tmp_path / "pack").exists()


def test_a_file_or_a_folder_of_others_is_no_pack(tmp_path):
    with pytest.raises(lt.FormatError, match=r"has no lotr_pack\.json"):
        lt.Pack(write_lora(tmp_path / "lora"))
    with pytest.raises(lt.FormatError, match="does not exist"):
        lt.Pack(tmp_path / "nothing")


def test_a_read_only_directory(pack):
    if os.geteuid() == 0:
        pytest.skip("who is root may write anywhere")
    pack.path.chmod(0o500)
    with pytest.raises(lt.FormatError, match="cannot be written"):
        pack.remove("user-0")


def test_a_new_reader_sees_what_an_old_one_does_not(pack):
    other = lt.Pack(pack.path)
    pack.add("new", family(5)["user-4"])
    assert "new" not in other.names and "new" in lt.Pack(pack.path).names
    other.add("newer", family(6)["user-5"])  # the index is read again under the lock
    assert lt.Pack(pack.path).names[-2:] == ("new", "newer")
