"""A build on MPI, the same bytes; skipped where there is no mpiexec or no mpi4py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lotrtensor as lt
from adapters_fixtures import write_lora
from pack_fixtures import contents

pytest.importorskip("mpi4py")
# That of a wheel, mpich, is beside the interpreter, and need not be on the path.
PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
MPIEXEC = shutil.which("mpiexec", path=PLACES)
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec")

PROGRAM = """
import sys
import lotrtensor as lt
from mpi4py.futures import MPIPoolExecutor

if __name__ == "__main__":
    with MPIPoolExecutor() as executor:
        lt.pack(sys.argv[2:], sys.argv[1], tolerance=0.3, executor=executor)
"""


def test_the_same_bytes_on_three_processes(tmp_path: Path) -> None:
    paths = [write_lora(tmp_path / name) for name in ("a", "b", "c")]
    lt.pack(paths, tmp_path / "one", tolerance=0.3, executor=ThreadPoolExecutor(1))
    program = tmp_path / "build.py"
    program.write_text(PROGRAM)
    root = {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE")
            for end in ("", "_CONFIRM")}  # fmt: skip
    words = [MPIEXEC, "-n", "3", sys.executable, "-m", "mpi4py.futures", str(program)]
    found = subprocess.run(
        [*words, str(tmp_path / "two"), *map(str, paths)],
        env=os.environ | root | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
