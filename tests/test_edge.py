"""The search for a step: the last one inside, whatever jumps the function has."""

import bisect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor.verbs._edge import CLOSE, NEAREST, edge, over

MARKS = [2.0 ** (-i / 3) for i in range(40)]


@given(
    places=st.lists(st.floats(0.0, 13.0), max_size=6),
    sizes=st.lists(st.floats(1e-3, 2.0), min_size=6, max_size=6),
    slope=st.floats(1e-3, 3.0),
    target=st.floats(-1.0, 40.0),
    rising=st.booleans(),
)
def test_it_ends_beside_the_crossing_of_a_function_with_jumps(places, sizes, slope, target, rising):
    marks = MARKS[::-1] if rising else MARKS
    jumps = sorted(places)

    def function(step):
        along = abs(math.log2(step / marks[0]))
        return slope * along + sum(sizes[: bisect.bisect(jumps, along)]) - target

    found = edge(function, marks)
    if function(marks[0]) > 0.0:
        assert found == marks[0]
    elif function(marks[-1]) <= 0.0:
        assert found == marks[-1]
    else:
        beyond = found * (1 + 2 * NEAREST) ** (1 if rising else -1)
        assert function(found) <= 0.0
        assert function(found) >= -CLOSE or function(beyond) > 0.0


def test_a_smooth_function_takes_few_values_beside_those_of_the_marks():
    asked = []

    def function(step):
        asked.append(step)
        return over(1e7 / (1 + step * 1e3) ** 1.5, 3e4)

    found = edge(function, MARKS)
    assert -CLOSE <= function(found) <= 0.0
    assert len([step for step in asked if step not in MARKS]) <= 6


@pytest.mark.parametrize(
    "value, limit, sign", [(0.0, 1.0, -1), (0.0, 0.0, -1), (1.0, 0.0, 1), (2.0, 1.0, 1)]
)
def test_how_far_above_has_the_right_sign_where_something_is_zero(value, limit, sign):
    assert np.sign(over(value, limit)) == sign
