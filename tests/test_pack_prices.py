"""What prices decide: no more bytes for a larger error, nor thrice the bytes for twice as many."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import lotrtensor as lt
from lotrtensor.packs.prices import Prices, crossing
from lotrtensor.packs.tasks import STEPS, Priced


def family(count, side=192):
    """A mean, a shared part, and a little of each adapter's own: bases pay from some step on."""
    rng = np.random.default_rng(0)

    def matrix(rows, columns, over):
        return rng.normal(size=(rows, columns)) / np.sqrt(over)

    mean = matrix(side, 8, side), matrix(8, side, side)
    left, right = matrix(side, 12, side), rng.normal(size=(12, side))
    found = {}
    for k in range(count):
        own = 0.3 * matrix(side, 2, side), matrix(2, side, side)
        b = np.hstack([mean[0], left @ (0.1 * rng.normal(size=(12, 12))), own[0]])
        a = np.vstack([mean[1], right, own[1]])
        module = lt.LoraModule("layers.0.q", b.astype("f4"), a.astype("f4"))
        found[f"user-{k:03}"] = lt.LoraAdapter((module,), {}, np.dtype("float32"))
    return found


def packed(adapters, path, tolerance):
    with ThreadPoolExecutor(1) as executor:
        options = {"share": "adapters", "executor": executor}
        pack = lt.pack(adapters, path, tolerance=tolerance, **options)
    assert max(row.relative_error for row in pack.rows) <= tolerance * (1 + 1e-5)  # rounded up
    return pack.bytes


def test_a_larger_error_takes_no_more_bytes(tmp_path):
    adapters = family(40)
    sizes = [packed(adapters, tmp_path / f"{t}", t) for t in (0.35, 0.3, 0.25, 0.2)]
    for smaller, larger in pairwise(sizes):
        assert smaller <= 1.03 * larger, sizes


def test_bytes_grow_no_faster_than_adapters(tmp_path):
    few, many = (packed(family(k), tmp_path / f"{k}", 0.3) for k in (30, 60))
    assert many <= 2.1 * few


@pytest.mark.parametrize("target", [0.5, 0.11, 1e-3])
def test_a_crossing_lies_where_the_values_come_down_to_the_target(target):
    values = np.array(STEPS) ** 2
    assert crossing(values, target) == pytest.approx(min(np.sqrt(target), STEPS[0]))


def priced(lost2):
    """Prices of one cell of one adapter, whose best basis leaves so much at each step."""
    rows = [[0.0, 1.0, 0.0, float(value), 0.0, 1.0, 1.0] for value in lost2]
    cell = SimpleNamespace(scope="adapters", kind="q", members=[(0, "q")])
    return Prices([cell], [Priced(rows, [0.0])], {0: 1.0}, "adapters")


def test_a_step_is_between_two_prices_where_the_error_falls_with_it():
    prices = priced(np.array(STEPS) ** 1.5)
    wanted = 0.5 * (STEPS[5] ** 1.5 + STEPS[6] ** 1.5)
    assert STEPS[6] < prices.step_for(np.sqrt(wanted)) < STEPS[5]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_step_is_the_finer_one_where_bases_come_in_between(share):
    lost2 = np.where(np.arange(len(STEPS)) < 6, 0.17, 0.05)
    tolerance = np.sqrt(0.05 + share * 0.12)
    assert priced(lost2).step_for(tolerance) == STEPS[6]
