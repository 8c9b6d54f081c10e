"""A size or a tolerance over several groups: shared out so that nothing better is in reach."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import (
    RankError,
)
from lotrtensor.core.ranks.allocation import allocate_error, allocate_parameters
from lotrtensor.core.ranks.curve import (
    Frontier,
)
from tests.strategies import (
    seeds,
)


def random_curve(rng, points=6):
    """A frontier of any shape: rising parameters, falling errors, not convex."""
    parameters = np.cumsum(rng.integers(1, 9, points))
    error2 = np.sort(rng.random(points))[::-1].copy()
    if rng.random() < 0.5:
        error2[-1] = 0.0
    ranks = np.stack([np.arange(1, points + 1)] * 2, axis=1)
    return Frontier(ranks, parameters, error2, float(error2[0] * (1 + rng.random())))


def total(curves, chosen, field):
    """Σ over the groups of a field at the chosen points."""
    return sum(getattr(c, field)[i] for c, i in zip(curves, chosen, strict=True))


def everything(curves):
    """Every choice of one point a curve."""
    return itertools.product(*(range(len(c.parameters)) for c in curves))


def on_hull(curve):
    """Indices of the points that no chord between two others is below."""
    x, y = curve.parameters.astype(float), curve.error2
    return [
        i
        for i in range(len(x))
        if not any(
            y[a] + (y[b] - y[a]) * (x[i] - x[a]) / (x[b] - x[a]) <= y[i]
            for a in range(i)
            for b in range(i + 1, len(x))
        )
    ]


@given(seed=seeds, groups=st.integers(1, 4))
def test_allocated_budgets_are_optimal(seed, groups):
    """Of every size, on the hulls or off them, by trying all choices."""
    rng = np.random.default_rng(seed)
    curves = [random_curve(rng) for _ in range(groups)]
    smallest = int(total(curves, [0] * groups, "parameters"))
    largest = int(total(curves, [-1] * groups, "parameters"))
    choices = [
        (total(curves, c, "parameters"), total(curves, c, "error2")) for c in everything(curves)
    ]
    sizes = range(smallest, largest + 2)
    for budget in rng.choice(sizes, min(len(sizes), 12), replace=False):
        chosen = allocate_parameters(curves, int(budget))
        assert total(curves, chosen, "parameters") <= budget
        best = min(error2 for spent, error2 in choices if spent <= budget)
        assert total(curves, chosen, "error2") == pytest.approx(best, rel=1e-12, abs=1e-15)


@given(seed=seeds, groups=st.integers(1, 4))
def test_allocated_tolerances_are_optimal(seed, groups):
    """They are met, with the fewest parameters, by trying all choices."""
    rng = np.random.default_rng(seed)
    curves = [random_curve(rng) for _ in range(groups)]
    norm2 = sum(c.norm2 for c in curves)
    reachable = total(curves, [-1] * groups, "error2") / norm2
    choices = [
        (total(curves, c, "parameters"), total(curves, c, "error2")) for c in everything(curves)
    ]
    for tolerance in np.sqrt(np.linspace(reachable + 1e-9, 0.999, 7)):
        chosen = allocate_error(curves, float(tolerance**2 * norm2))
        target = tolerance**2 * norm2
        assert total(curves, chosen, "error2") <= target * (1 + 1e-12)
        best = min(spent for spent, error2 in choices if error2 <= target)
        assert total(curves, chosen, "parameters") == best


@given(seed=seeds)
def test_many_groups_are_within_a_step_of_the_relaxed_optimum(seed):
    """Too many to try: the walk over the hulls bounds what any choice can reach."""
    rng = np.random.default_rng(seed)
    curves = [random_curve(rng, int(rng.integers(2, 30))) for _ in range(40)]
    smallest, largest = (int(total(curves, [i] * 40, "parameters")) for i in (0, -1))
    budget = int(rng.integers(smallest, largest))
    chosen = allocate_parameters(curves, budget)
    assert total(curves, chosen, "parameters") <= budget
    # The continuous relaxation: steps of all hulls by falling gain per parameter, the last in part.
    steps = sorted(
        (
            (
                (c.error2[b] - c.error2[a]) / (c.parameters[b] - c.parameters[a]),
                c.parameters[b] - c.parameters[a],
            )
            for c in curves
            for a, b in itertools.pairwise(on_hull(c))
        )
    )
    left, bound, step = budget - smallest, total(curves, [0] * 40, "error2"), 0.0
    for slope, size in steps:
        bound += slope * min(size, left)
        left -= min(size, left)
        if not left:
            step = -slope * size
            break
    error2 = total(curves, chosen, "error2")
    assert bound - 1e-9 <= error2 <= bound + step + 1e-9


def test_allocation_of_one_group_is_a_lookup():
    """Nothing to share: the best point of the curve, the cheapest one, by scanning."""
    for seed in range(9):
        rng = np.random.default_rng(seed)
        curve = random_curve(rng, 9)
        for budget in range(int(curve.parameters[0]), int(curve.parameters[-1]) + 1):
            fitting = [i for i, size in enumerate(curve.parameters) if size <= budget]
            assert allocate_parameters([curve], budget) == fitting[-1:]
        for limit2 in rng.uniform(float(curve.error2[-1]), curve.norm2, 9):
            within = [i for i, error2 in enumerate(curve.error2) if error2 <= limit2]
            assert allocate_error([curve], float(limit2)) == within[:1]


@given(seed=seeds)
def test_allocations_out_of_reach_are_refused(seed):
    """The smallest budget of all groups together is named, the smallest error too."""
    rng = np.random.default_rng(seed)
    curves = [random_curve(rng) for _ in range(3)]
    smallest = int(total(curves, [0] * 3, "parameters"))
    with pytest.raises(RankError, match=rf"3 groups needs {smallest}$"):
        allocate_parameters(curves, smallest - 1)
    assert allocate_parameters(curves, smallest) == [0, 0, 0]
    reached2 = float(total(curves, [-1] * 3, "error2"))
    if reached2 > 1e-3:
        with pytest.raises(RankError, match="smallest error in reach"):
            allocate_error(curves, 0.9 * reached2)


def test_more_to_share_is_never_more_error():
    """Over every budget, of groups with curves of many shapes."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        curves = [random_curve(rng) for _ in range(3)]
        sizes = range(
            int(total(curves, [0] * 3, "parameters")), int(total(curves, [-1] * 3, "parameters"))
        )
        errors = [total(curves, allocate_parameters(curves, size), "error2") for size in sizes]
        assert np.all(np.diff(errors) <= 1e-12), seed
