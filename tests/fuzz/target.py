"""What is done with changed files, and what must come of it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import lotrtensor as lt
from lotrtensor.adapters.formats.checkpoint import open_checkpoint
from lotrtensor.adapters.integrity import check_files
from lotrtensor.report.documents import dumps, inspect_document
from tests.fuzz.mutate import mutate
from tests.fuzz.seeds import Files

SECONDS = 5
MEMORY = 2 * 2**30


class Seeded:
    """Choices of a seeded generator."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, count: int) -> int:
        return self._random.randrange(count)


class Failure(Exception):
    """An outcome that is neither a result nor a `LotrError`."""


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder in memory, where there is one, and limits of memory for the whole process."""
    shm = Path("/dev/shm")
    place = shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    with Path("/proc/self/statm").open() as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, before[1]))
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            yield Path(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_long(*_: object) -> None:
    raise Failure(f"it takes more than {SECONDS} s")


def attempt(files: Files, folder: Path, *, use: bool) -> bool:
    """Write files, read them, and use what was read; whether there was a result.

    Raises
    ------
    Failure
        If anything else than a result or a `LotrError` comes of it, or it takes too long.
    """
    path = folder / "x"
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    single = next((n for n in files if len(files) == 1 and n.endswith(".safetensors")), None)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            _read(path / single if single else path, folder / "out", use=use)
        return True
    except lt.LotrError:
        return False
    except Failure:
        raise
    except BaseException as error:
        raise Failure(f"{type(error).__name__}: {str(error)[:200]}") from error
    finally:
        signal.alarm(0)
        shutil.rmtree(path)
        shutil.rmtree(folder / "out", ignore_errors=True)


def _read(path: Path, out: Path, *, use: bool) -> None:
    if (path / "model.safetensors").is_file():
        source = open_checkpoint(path)
        for name in source.tensors:
            source.read(name)
        return
    adapter = lt.load(path)
    check_files(path)
    if not use:
        return
    dumps(inspect_document(adapter))
    lt.compare(adapter, adapter)
    lora = adapter.to_lora()
    lt.convert(lora, rank=1).save(out)
    again = lt.load(out)
    assert abs((again.relative_error or 0.0) - lt.compare(lora, again).relative_error) < 0.1


def one(number: int, seeds: dict[str, Files], folder: Path, *, use: bool) -> bool:
    """Run the case of a number: the same files every time."""
    choices = Seeded(number)
    names = sorted(seeds)
    files = mutate(seeds[names[choices.below(len(names))]], choices)
    return attempt(files, folder, use=use)
