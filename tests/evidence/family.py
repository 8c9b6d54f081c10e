"""Train an adapter for each of eight tasks: a family of no common origin but the encoder.

``python -m tests.evidence.family FOLDER`` writes ``FOLDER/task-NAME``, as `tests.bench.families`
takes them; those that `tests.evidence` has trained are taken from its cache.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from tests.evidence.__main__ import CACHE
from tests.evidence.after import original
from tests.evidence.tasks import READERS, load_task


def main() -> None:
    """Train what has not been trained, and copy all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the order of float additions depends on it
    for name in READERS:
        source = original(load_task(name, options.cache), options.cache)
        shutil.copytree(source, options.folder / f"task-{name}", dirs_exist_ok=True)
        print(options.folder / f"task-{name}", flush=True)


if __name__ == "__main__":
    main()
