"""The commands that write, each with what it reads and where its output goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import lotrtensor as lt
from tests.adapters_fixtures import write_lora
from tests.checkpoint_fixtures import full, pair
from tests.pack_fixtures import family
from tests.tiny_encoder import encoder_lora, write_encoder, write_texts


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


def _unpacked(folder: Path) -> None:
    """Another LoRA at the output."""
    write_lora(folder / "out")


def _extracted(folder: Path) -> None:
    full(folder).save(folder / "out")


def _model(folder: Path) -> None:
    """A tiny encoder, a LoRA for it, and texts."""
    write_encoder(folder / "base")
    encoder_lora().save(folder / "lora")
    write_texts(folder / "texts.txt", 40)


def _measured(folder: Path) -> None:
    """What lotr calibrate writes, of random numbers."""
    _model(folder)
    rng = np.random.default_rng(0)
    modules = {}
    for module in encoder_lora().modules:
        m, n = module.shape
        sides = (lt.Moment(rng.standard_normal((8, side), np.float32), 10.0 * side)
                 for side in (n, m))  # fmt: skip
        modules[module.name] = lt.ModuleMoments(*sides, norm=1.0)
    lt.Calibration(modules, places=400).save(folder / "measured")


def _compressed(folder: Path) -> None:
    _model(folder)
    lt.compress(lt.load(folder / "lora"), tolerance=0.5).save(folder / "small")


MEMBERS = ("user-0", "user-1")
MODEL = ("--base", "base", "--text", "texts.txt")
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
    "compress --calibration": Job(
        ("compress", "lora", "-o", "out", "--budget", "30%", "--calibration", "measured"),
        _measured,
    ),
    "truncate": Job(("truncate", "lora", "-o", "out", "--rank", "1"), _lora),
    "truncate --force": Job(
        ("truncate", "lora", "-o", "out", "--rank", "1", "--force"), _lora, _other
    ),
    "export": Job(("export", "lotr", "-o", "out"), _lotr),
    "export --force": Job(("export", "lotr", "-o", "out", "--force"), _lotr, _other),
    "extract": Job(
        ("extract", "--base", "base", "--tuned", "tuned", "-o", "out", "--rank", "2"), _checkpoints
    ),
    "extract --force": Job(
        ("extract", "--base", "base", "--tuned", "tuned", "-o", "out", "--rank", "2", "--force"),
        _checkpoints,
        _extracted,
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
    "unpack --force": Job(("unpack", "pack", "user-0", "-o", "out", "--force"), _packed, _unpacked),
    "calibrate": Job(("calibrate", "lora", *MODEL, "-o", "out", "--rank", "4"), _model),
    "heal": Job(("heal", "small", "lora", *MODEL, "-o", "out", "--batch", "1"), _compressed),
}
