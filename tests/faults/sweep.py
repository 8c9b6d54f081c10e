"""One fault at a time: a system call of a command fails, or the process is killed in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.faults.jobs import Job

CALLS = ("write", "pwrite64", "fsync", "ftruncate", "mkdir", "rename", "renameat2", "unlink",
         "unlinkat", "rmdir", "flock", "copy_file_range", "sendfile")  # fmt: skip
"""System calls that writing consists of; what opens a file is followed by one of them."""

REMOVALS = ("rmdir", "unlink", "unlinkat")

FAULTS = {"killed": "signal=KILL", "EIO": "error=EIO", "disk full": "error=ENOSPC"}

INDEX, LOCK, BUILD = "lotr_pack.json", ".lotr_pack.lock", "building"
OUT = "out"
Files = dict[str, bytes]


class Point(NamedTuple):
    """The ``number``-th time that a process makes a call, and what becomes of it."""

    call: str
    number: int
    fault: str


class Ran(NamedTuple):
    """A command that came to an end: its exit code, what it said, and the calls that it made."""

    code: int
    said: str
    calls: Counter[str]


def run(job: Job, folder: Path, point: Point | None = None) -> Ran:
    """Run a command under strace, with one fault or none."""
    log = folder.parent / "calls.txt"
    inject = []
    if point is not None:
        what = f"{point.call}:{FAULTS[point.fault]}:when={point.number}"
        inject = ["-e", f"inject={what}"]
    words = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log),
             "-e", f"trace={','.join(CALLS)}", *inject,
             sys.executable, "-m", "tests.faults.lotr", *job.words]  # fmt: skip
    root = Path(__file__).parents[2]
    told = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        words, cwd=folder, env=os.environ | told, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    names = re.findall(r"^\d+ +(\w+)\(", log.read_text("utf-8", "replace"), re.MULTILINE)
    return Ran(found.returncode, found.stdout + found.stderr, Counter(names))


def points(calls: Counter[str]) -> Iterator[Point]:
    """Every fault of every call that a command makes."""
    for call in CALLS:
        for number in range(1, calls[call] + 1):
            for fault in FAULTS:
                yield Point(call, number, fault)


def prepared(job: Job, folder: Path) -> Path:
    """Make a folder with what a command reads, and with what stands at its output."""
    folder.mkdir(parents=True)
    job.prepare(folder)
    if job.old is not None:
        job.old(folder)
    return folder


def files(path: Path) -> Files | None:
    """All files of an output but the lock of a pack, by name; None where there is none."""
    if not path.exists():
        return None
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != LOCK
    }


def output(path: Path) -> Files | None:
    """What a reader finds: of a pack the files that its index names, none before it has one."""
    found = files(path)
    if found is None or path.is_file() or (not found and not any(path.iterdir())):
        return found
    if INDEX in found:
        index = json.loads(found[INDEX])
        names = [shard["file"] for shard in (*index["cells"], *index["shards"])]
        return {name: found[name] for name in (INDEX, *names) if name in found}
    unfinished = (path / BUILD).exists() or (path / LOCK).exists()
    return None if unfinished else found


def judge(job: Job, folder: Path, point: Point, old: Files | None, new: Files) -> str:
    """Run a command with a fault, then without; what is wrong, nothing if all is right."""
    before = {p.name for p in folder.iterdir()}
    ran = run(job, folder, point)
    found = output(folder / OUT)
    if found not in (old, new):
        return "the output is neither the old one nor the new"
    if point.fault != "killed":
        if "Traceback" in ran.said:
            return f"a traceback: {ran.said[-300:]}"
        if ran.code not in (0, 1):
            return f"exit code {ran.code}"
        if ran.code == 0 and found != new:
            return "exit code 0, and the old output"
        removes = point.call in REMOVALS  # what cannot be removed stays
        if not removes and not {p.name for p in folder.iterdir()} <= before | {OUT}:
            return f"left behind: {sorted({p.name for p in folder.iterdir()} - before)}"
    if found == new and old != new:
        return ""
    again = run(job, folder)
    if again.code != 0 or files(folder / OUT) != new:
        return f"the next run: exit code {again.code}: {again.said[-300:]}"
    left = {p.name for p in folder.iterdir()} - before - {OUT}
    return f"the next run leaves {sorted(left)}" if left else ""


def copied(template: Path, folder: Path) -> Path:
    """Make the folder of a command anew."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)
    return folder
