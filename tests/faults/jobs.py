"""The commands that write, each with what it reads and where its output goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import lotrtensor as lt
from tests.adapters_fixtures import write_lora
from tests.checkpoint_fixtures import full, pair
from tests.pack_fixtures import family


class Job(NamedTuple):
    """A command line in a folder of its inputs; what it writes is ``out``.

    ``old`` makes what stands at the output before, nothing if it is None.
    """

    words: tuple[str, ...]
    prepare: Callable[[Path], None]
    old: Callable[[Path], None] | None = None


def _lora(folder: Path) -> None:
    write_lora(folder / "lora")


def _lotr(folder: Path) -> None:
    _lora(folder)
    lt.convert(lt.load(folder / "lora"), rank=2).save(folder / "lotr")


def _other(folder: Path) -> None:
    """Another adapter at the output."""
    lt.convert(lt.load(folder / "lora"), rank=1).save(folder / "out")


def _checkpoints(folder: Path) -> None:
    pair(folder, rank=2, shards=2)
    full(folder).save(folder / "adapter")


def _merged(folder: Path) -> None:
    other = lt.truncate(lt.load(folder / "adapter"), rank=1)
    lt.merge(folder / "base", other, folder / "out")


def _family(folder: Path) -> None:
    for name, adapter in family(3, layers=1).items():
        adapter.save(folder / name)


def _pack(folder: Path, count: int = 2) -> None:
    names = [f"user-{i}" for i in range(count)]
    lt.pack([folder / name for name in names], folder / "out", tolerance=0.2)


def _packed(folder: Path) -> None:
    _family(folder)
    _pack(folder)
    (folder / "out").rename(folder / "pack")


MEMBERS = ("user-0", "user-1")
PACKED = ("pack", *MEMBERS, "-o", "out", "--tolerance", "0.3", "--threads", "1")

JOBS: Mapping[str, Job] = {
    "convert": Job(("convert", "lora", "-o", "out", "--rank", "2"), _lora),
    "convert --force": Job(
        ("convert", "lora", "-o", "out", "--rank", "2", "--force"), _lora, _other
    ),
    "compress": Job(("compress", "lora", "-o", "out", "--tolerance", "0.2"), _lora),
    "compress --force": Job(
        ("compress", "lora", "-o", "out", "--tolerance", "0.2", "--force"), _lora, _other
    ),
    "truncate --force": Job(
        ("truncate", "lora", "-o", "out", "--rank", "1", "--force"), _lora, _other
    ),
    "export": Job(("export", "lotr", "-o", "out"), _lotr),
    "export --force": Job(("export", "lotr", "-o", "out", "--force"), _lotr, _other),
    "extract": Job(
        ("extract", "--base", "base", "--tuned", "tuned", "-o", "out", "--rank", "2"), _checkpoints
    ),
    "merge": Job(("merge", "adapter", "--base", "base", "-o", "out"), _checkpoints),
    "merge --force": Job(
        ("merge", "adapter", "--base", "base", "-o", "out", "--force"), _checkpoints, _merged
    ),
    "pack": Job(PACKED, _family),
    "pack --force": Job((*PACKED, "--force"), _family, _pack),
    "add": Job(("add", "out", "user-2"), _family, _pack),
    "remove": Job(("remove", "out", "user-0"), _family, _pack),
    "refit": Job(("refit", "out", *MEMBERS, "--threads", "1"), _family, _pack),
    "unpack": Job(("unpack", "pack", "user-0", "-o", "out"), _packed),
}
