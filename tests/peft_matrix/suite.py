"""PEFT's own tests: fetched with pip, unpacked, never committed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGE = "peft_suite"
"""Name of the package that the tests are unpacked as; ``tests`` is taken by our own."""


def cache() -> Path:
    """Folder that holds what is fetched and made, from one run to the next."""
    root = os.environ.get("XDG_CACHE_HOME", str(Path("~/.cache").expanduser()))
    return Path(os.environ.get("PEFT_MATRIX_CACHE", str(Path(root, "lotrtensor-peft-matrix"))))


def fetch() -> Path:
    """Return the folder with the tests of the PEFT that is installed, fetching it once.

    The source archive of the very release is taken, so that tests and package belong together.
    """
    release = version("peft")
    folder = cache() / f"peft-{release}" / PACKAGE
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        command = ["download", "-q", "--no-deps", "--no-binary", "peft", f"peft=={release}"]
        subprocess.run([sys.executable, "-m", "pip", *command, "-d", scratch], check=True)
        (archive,) = Path(scratch).glob("peft-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        (tests,) = Path(scratch).glob("peft-*/tests")
        (tests / "__init__.py").touch()  # its modules import one another as a package
        shutil.move(tests, folder)
    return folder
