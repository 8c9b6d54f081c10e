"""A build on a Dask cluster: two processes, the same bytes, one of them killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

import lotrtensor as lt
from adapters_fixtures import lotr, write_lora
from pack_fixtures import contents

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as found:
        yield found


@pytest.fixture
def paths(tmp_path):
    return [write_lora(tmp_path / name) for name in ("a", "b", "c")]


def test_the_same_bytes_with_a_worker_killed(cluster, paths, tmp_path):
    lt.pack(paths, tmp_path / "one", tolerance=0.3, executor=ThreadPoolExecutor(1))
    with distributed.Client(cluster) as client:
        first, killed = min(client.run(os.getpid).values()), []

        def progress(what, done, total):
            if what == "sharing" and not killed:
                os.kill(first, signal.SIGKILL)
                killed.append(first)

        lt.pack(paths, tmp_path / "two", tolerance=0.3, executor=client.get_executor(retries=3),
                progress=progress)  # fmt: skip
        assert killed
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_command_line_takes_an_address(cluster, paths, tmp_path):
    address = cluster.scheduler_address
    found = lotr("pack", *paths, "-o", tmp_path / "pack", "--tolerance", 0.3, "--dask", address,
                 "--json")  # fmt: skip
    assert (found.code, found.err) == (0, "")
    assert [row["name"] for row in json.loads(found.out)["adapters"]] == ["a", "b", "c"]
    shutil.copytree(tmp_path / "pack", tmp_path / "same")
    found = lotr("add", tmp_path / "pack", f"d={paths[0]}", f"e={paths[1]}", "--dask", address)
    assert (found.code, found.err) == (0, "")
    lotr("add", tmp_path / "same", f"d={paths[0]}", f"e={paths[1]}", "--threads", 1)
    assert contents(tmp_path / "pack") == contents(tmp_path / "same")
