"""What a caller may ask for: one goal, in range, or a clear refusal."""

import math

import numpy as np
import pytest

from lotrtensor import LotrError, RankError, rate_distortion, truncate, tucker2
from lotrtensor.adapters.sizes import budget_parameters
from lotrtensor.core.fit.truncate import truncate_tucker2
from lotrtensor.core.ranks.goal import Goal, check_rank, make_goal
from tests.strategies import STACKS, make

CASE = make("generic", 2, 9, 7, [2, 3, 1])
LARGEST = CASE.max_rank

GOALS = {"rank": 2, "tolerance": 0.1, "energy": 0.9, "parameters": 200}

WRONG = [
    {"rank": 0},
    {"rank": -1},
    {"rank": 10},
    {"rank": (1, 8)},
    {"rank": (0, 1)},
    {"rank": (1, 2, 3)},
    {"rank": (1,)},
    {"rank": ()},
    {"rank": 1.0},
    {"rank": True},
    {"rank": (2, 1.5)},
    {"rank": "2"},
    {"rank": np.array([2, 2])},
    {"tolerance": 0.0},
    {"tolerance": 1.0},
    {"tolerance": -0.1},
    {"tolerance": 1.1},
    {"tolerance": math.nan},
    {"tolerance": math.inf},
    {"energy": 0.0},
    {"energy": 1.0},
    {"energy": 90},
    {"energy": math.nan},
    {"parameters": 0},
    {"parameters": -5},
    {"parameters": math.nan},
    {"parameters": "25%"},
]


@pytest.mark.parametrize("kind", ["low-rank", "dense", "lazy"])
@pytest.mark.parametrize("goal", WRONG, ids=str)
def test_goals_out_of_range_are_refused(kind, goal):
    """By name and with a RankError, by a fit of any stack and by rounding alike."""
    (name,) = goal
    with pytest.raises(RankError, match=name):
        tucker2(STACKS[kind](CASE, np.array), **goal)


@pytest.mark.parametrize("goal", WRONG, ids=str)
def test_rounding_refuses_the_same_goals(goal):
    """Rounding a decomposition checks as tucker2 does."""
    (name,) = goal
    with pytest.raises(RankError, match=name):
        truncate_tucker2(tucker2(CASE.stack(), LARGEST).tucker2, **goal)


@pytest.mark.parametrize("one", list(GOALS))
@pytest.mark.parametrize("other", list(GOALS))
def test_one_goal_at_a_time(one, other):
    """Two of them are refused, both by name."""
    if one == other:
        return
    with pytest.raises(RankError, match=rf"({one} and {other}|{other} and {one}) given"):
        tucker2(CASE.stack(), **{one: GOALS[one], other: GOALS[other]})


def test_no_goal_is_refused():
    """What could be given is listed."""
    found = tucker2(CASE.stack(), 2).tucker2
    with pytest.raises(RankError, match="rank, tolerance, energy, parameters"):
        tucker2(CASE.stack())
    with pytest.raises(RankError, match="rank, tolerance, energy, budget"):
        truncate(found)


def test_goals_in_range_are_taken():
    """A rank becomes a pair; an energy a tolerance of √(1 − energy)."""
    assert make_goal(3, largest=(9, 7)) == Goal(rank=(3, 3))
    assert make_goal((3, 2), largest=(9, 7)) == Goal(rank=(3, 2))
    assert make_goal([3, 2], largest=(9, 7)) == Goal(rank=(3, 2))
    assert make_goal(tolerance=0.25) == Goal(tolerance=0.25)
    assert make_goal(energy=0.99).tolerance == pytest.approx(0.1)
    assert make_goal(parameters=77) == Goal(parameters=77)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_ranks(integer):
    """And come back as Python's."""
    found = check_rank((integer(3), integer(2)), (9, 7))
    assert found == (3, 2)
    assert [type(r) for r in found] == [int, int]


def test_the_largest_rank_is_told():
    """A rank beyond it names what the stack has."""
    with pytest.raises(RankError, match=r"\(6, 6\)"):
        tucker2(CASE.stack(), 7)
    assert LARGEST == (6, 6)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, math.nan])
def test_rate_distortion_has_a_tolerance_of_its_own(tolerance):
    """Which only the matrix-free method reads; it must end all the same."""
    try:
        rows = rate_distortion(CASE.stack(), tolerance=tolerance, method="matrix-free")
    except LotrError:
        return
    assert rows[-1].relative_error < 1e-6


# ---------------------------------------------------------------- budgets as people write them


@pytest.mark.parametrize(
    ("budget", "itemsize", "expected"),
    [
        (1000, 4, 250),
        ("1000", 4, 250),
        ("1000B", 2, 500),
        ("2KB", 4, 500),
        ("2kb", 4, 500),
        ("2 KB", 4, 500),
        ("1.5KiB", 2, 768),
        ("1MB", 8, 125_000),
        ("1MiB", 2, 524_288),
        ("1GB", 4, 250_000_000),
        ("25%", 2, 1024),
        ("100%", 4, 2048),
        ("12.5%", 4, 256),
        ("300p", 8, 300),
        ("300P", 2, 300),
        (999, 4, 249),
    ],
)
def test_budgets(budget, itemsize, expected):
    """Bytes, shares of 8192 bytes, parameters; rounded down."""
    assert budget_parameters(budget, itemsize, 8192) == expected


@pytest.mark.parametrize(
    "budget",
    [
        "",
        "KB",
        "-1",
        "-5KB",
        "1TB",
        "five",
        "1e3",
        "25%%",
        "nan",
        "inf",
        "%",
        "0",
        "0%",
        0,
        -3,
        "1B",
    ],
)
def test_what_is_no_budget(budget):
    """Refused with the text in question."""
    with pytest.raises(RankError, match="budget is"):
        budget_parameters(budget, 4, 8192)
