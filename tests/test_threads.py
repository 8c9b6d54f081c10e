"""Equal input is equal bytes, whatever the number of threads is."""

import os
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import threadpoolctl

import lotrtensor as lt
from lotrtensor.core.threads import on_one_thread, one_thread, side_by_side
from tests.adapters_fixtures import write_lora
from tests.checkpoint_fixtures import write

PROGRAM = """
import sys
from pathlib import Path
import lotrtensor as lt
bundled, wide, base, tuned, out = map(Path, sys.argv[1:])
for name, path in (("bundled", bundled), ("wide", wide)):
    adapter = lt.load(path)
    lotr = lt.convert(adapter, rank=16)
    lotr.save(out / f"{name}-convert")
    lotr.to_lora(3).save(out / f"{name}-export")
    lt.truncate(adapter, budget="30%").save(out / f"{name}-truncate")
    lt.truncate(lotr, rank=4).save(out / f"{name}-lower")
    lt.compress(adapter, budget="20%").save(out / f"{name}-compress")
for form in ("lotr", "lora"):
    lt.extract(base, tuned, rank=5, form=form).save(out / f"extract-{form}")
lt.merge(base, lt.load(out / "extract-lora"), out / "merged")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_files_are_equal_whatever_the_number_of_threads(tmp_path):
    rng = np.random.default_rng(0)
    pairs = {
        f"layers.{k}.{kind}": (rng.normal(size=(700, 24)), rng.normal(size=(24, 513)))
        for k in range(6)
        for kind in ("q", "v")
    }
    wide = write_lora(tmp_path / "wide", pairs)
    weights = {f"l.{k}.q.weight": rng.normal(size=(400, 300)).astype("f4") for k in range(3)}
    tuned = {key: x + rng.normal(size=x.shape).astype("f4") for key, x in weights.items()}
    inputs = [
        files("lotrtensor") / "data" / "amazon-sentiment",
        wide,
        write(tmp_path / "base", weights),
        write(tmp_path / "tuned", tuned),
    ]
    outputs = []
    for threads in ("1", "2", "3"):
        out = tmp_path / threads
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, (*inputs, out))],
            env=os.environ | dict.fromkeys(names, threads),
            check=True,
        )
        outputs.append(
            {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        )
    assert len(outputs[0]) > 20
    assert outputs[0] == outputs[1] == outputs[2]


def blas_threads():
    return {
        found["num_threads"]
        for found in threadpoolctl.threadpool_info()
        if found["user_api"] == "blas"
    }


def test_the_limit_ends_where_the_outermost_one_does():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        with one_thread():
            with one_thread():
                assert blas_threads() == {1}
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_the_limit_ends_with_a_failure():
    @on_one_thread
    def fails():
        assert blas_threads() == {1}
        raise ValueError

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        with pytest.raises(ValueError):
            fails()
        assert blas_threads() == {2}


def test_parts_come_back_in_their_order():
    assert side_by_side(lambda x: (x, sum(blas_threads())), [3, 1, 2])[0][0] == 3
    assert [x for x, _ in side_by_side(lambda x: (x, 0), list(range(50)))] == list(range(50))
    assert side_by_side(str, []) == []
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda x: 1 / x, [1, 0])


def test_progress_is_told_of_every_group_once(tmp_path):
    told = []
    adapter = lt.load(write_lora(tmp_path / "x"))
    lt.convert(adapter, rank=2, progress=lambda name, done, total: told.append((name, done, total)))
    assert sorted(done for _, done, _ in told) == [0, 1, 2]
    assert {total for *_, total in told} == {3}


def test_a_library_that_is_loaded_meanwhile_is_limited_too():
    program = """
import sys
import numpy as np, threadpoolctl
from lotrtensor.core.linalg import LARGE, orthonormal_basis
from lotrtensor.core.threads import one_thread
def blas():
    found = threadpoolctl.threadpool_info()
    return [lib["num_threads"] for lib in found if lib["user_api"] == "blas"]
before = blas()
with one_thread():
    assert "scipy.linalg" not in sys.modules
    orthonormal_basis(np.random.default_rng(0).normal(size=(LARGE, LARGE + 1)))
    assert "scipy.linalg" in sys.modules
    inside = blas()
assert inside and set(inside) == {1}, inside
assert set(before) == set(blas()) == {2}, (before, blas())
"""
    env = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)
