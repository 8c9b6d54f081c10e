"""Metrics on columns and rounding under them, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import cholesky

from lotrtensor.core.bits.feedback import Feedback
from lotrtensor.core.bits.grid import round_to_grid
from lotrtensor.core.bits.metric import Metric


def a_metric(rng, d, n, spread=1.0):
    return Metric(rng.normal(size=(d, n)) * np.exp(spread * rng.normal(size=(d, 1))), 0.3)


def dense(metric):
    return metric.factor.T @ metric.factor + metric.floor * np.eye(metric.size)


def rounded_by_a_dense_loop(matrix, x, step):
    """GPTQ as its paper has it: a Cholesky factor of the whole inverse, entry by entry."""
    upper = cholesky(np.linalg.inv(matrix))
    left, codes = x.copy(), np.zeros_like(x)
    for i in range(len(x)):
        codes[i] = round_to_grid(left[i], step)
        left[i + 1 :] -= np.outer(upper[i, i + 1 :], (left[i] - step * codes[i]) / upper[i, i])
    return codes, float(np.mean(1 / np.diag(upper) ** 2))


@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 150), st.integers(1, 3))
def test_products_and_rounding_are_those_of_the_dense_metric(seed, d, n, columns):
    rng = np.random.default_rng(seed)
    metric, x = a_metric(rng, d, n), rng.normal(size=(n, columns))
    matrix = dense(metric)
    np.testing.assert_allclose(metric.times(x), matrix @ x, rtol=1e-9, atol=1e-9)
    root = metric.root(x)
    np.testing.assert_allclose(root.T @ root, x.T @ matrix @ x, rtol=1e-8, atol=1e-8)
    codes, gain = rounded_by_a_dense_loop(matrix, x, 0.5)
    np.testing.assert_array_equal(Feedback([metric]).round([x], 0.5)[0], codes)
    assert Feedback([metric]).gains[0] == pytest.approx(gain, rel=1e-6)


def test_feedback_loses_less_where_entries_hang_together():
    rng = np.random.default_rng(0)
    metric, x = a_metric(rng, 30, 200), rng.normal(size=(200, 4))

    def lost(codes):
        error = 0.5 * codes - x
        return float(np.sum(error * metric.times(error)))

    assert lost(Feedback([metric]).round([x], 0.5)[0]) < 0.5 * lost(round_to_grid(x, 0.5))


def test_without_directions_it_is_plain_rounding():
    metric = Metric(np.zeros((1, 70)), 2.0)
    x = np.random.default_rng(0).normal(size=(70, 2))
    np.testing.assert_array_equal(Feedback([metric]).round([x], 0.3)[0], round_to_grid(x, 0.3))
    assert Feedback([metric]).gains == pytest.approx(2.0)


def test_slices_side_by_side_are_rounded_as_each_alone():
    """Of as many directions and columns as each has, none at all too."""
    rng = np.random.default_rng(0)
    metrics = [a_metric(rng, d, 150) for d in (3, 20, 1, 70)]
    columns = [rng.normal(size=(150, count)) for count in (2, 0, 5, 1)]
    together = Feedback(metrics)
    found = together.round(columns, 0.5)
    for k, (metric, x) in enumerate(zip(metrics, columns, strict=True)):
        alone = Feedback([metric])
        assert together.gains[k] == pytest.approx(alone.gains[0], rel=1e-12)
        np.testing.assert_array_equal(found[k], alone.round([x], 0.5)[0])
    assert [x.shape for x in together.round([x[:, :0] for x in columns], 0.5)] == [(150, 0)] * 4
