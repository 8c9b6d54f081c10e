"""From a tolerance, an energy or a budget to ranks: never exceeded, and nothing wasted."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import (
    LazyStack,
    LoraAdapter,
    RankError,
    convert,
    rate_distortion,
    truncate,
    tucker2,
)
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.analysis.representations import by_type, reduce_group
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import Reduction
from lotrtensor.core.ranks.curve import (
    outside2,
    pair_at,
    tucker2_parameters,
)
from tests import oracles
from tests.strategies import (
    EVERYWHERE,
    NONZERO,
    STACKS,
    UNTIED,
    factors,
    fits,
    make,
    noisy,
    seeds,
)

everywhere = pytest.mark.parametrize(("xp", "kind"), EVERYWHERE, indirect=["xp"])
unconverged = pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
tolerances = st.sampled_from([0.5, 0.3, 0.1, 0.03, 1e-3, 1e-6])

CASE = noisy(1, 12, 10, 4, (3, 4), 0.05)


# ---------------------------------------------------------------- tolerance and energy


@given(case=fits(), tolerance=tolerances)
@unconverged
def test_a_tolerance_is_never_exceeded(case, tolerance):
    """Held against the dense reconstruction; the bound stays below."""
    case, _ = case
    for stack in (case.stack(), STACKS["dense"](case, np.array)):
        fit = tucker2(stack, tolerance=tolerance)
        truth = oracles.relative_error(case.dense(), fit.tucker2.to_dense())
        assert truth <= tolerance * (1 + 1e-9)
        assert fit.relative_error <= tolerance
        assert fit.lower_bound <= fit.relative_error


@given(case=factors(NONZERO), tolerance=st.sampled_from([0.5, 0.1, 0.01, 1e-4]))
@unconverged
def test_a_tolerance_is_never_exceeded_in_single_precision(case, tolerance):
    """Of what is returned: float32 factors, measured in float64."""
    stack = STACKS["low-rank"](case, np.float32)
    exact = np.stack(
        [
            b.astype(np.float32).astype(float) @ a.astype(np.float32).astype(float)
            for b, a in zip(case.B, case.A, strict=True)
        ]
    )
    fit = tucker2(stack, tolerance=tolerance)
    found = oracles.reconstruct(
        *(x.astype(np.float64) for x in (fit.tucker2.left, fit.tucker2.core, fit.tucker2.right))
    )
    assert fit.tucker2.core.dtype == np.float32
    assert oracles.relative_error(exact, found) <= tolerance * (1 + 1e-5)
    assert fit.relative_error <= tolerance


@everywhere
@pytest.mark.parametrize("goal", [{"tolerance": 0.08}, {"energy": 0.97}, {"parameters": 170}])
@unconverged
def test_goals_hold_for_every_kind_of_stack(xp, kind, goal):
    """The error of the dense reconstruction, in every library; type and library are kept."""
    stack = STACKS[kind](CASE, lambda x: xp.array(x, "float32"))
    fit = tucker2(stack, **goal)
    truth = oracles.relative_error(CASE.dense(), xp.numpy(fit.tucker2.to_dense()))
    if "parameters" in goal:
        assert fit.tucker2.parameters <= goal["parameters"]
    else:
        assert truth <= goal.get("tolerance", np.sqrt(1 - goal.get("energy", 0))) * (1 + 1e-5)
    assert fit.relative_error == pytest.approx(truth, rel=1e-3)
    for x in (fit.tucker2.left, fit.tucker2.core, fit.tucker2.right):
        assert xp.owns(x)
        assert x.dtype == xp.dtype("float32")


@given(case=factors(NONZERO), energy=st.sampled_from([0.5, 0.9, 0.99, 0.9999]))
def test_an_energy_is_kept(case, energy):
    """1 − error² is at least the energy asked for, the cores hold it."""
    fit = tucker2(case.stack(), energy=energy)
    norm2 = float(np.sum(case.dense() ** 2))
    lost2 = float(np.sum((case.dense() - fit.tucker2.to_dense()) ** 2))
    assert 1 - lost2 / norm2 >= energy - 1e-12
    assert float(np.sum(fit.tucker2.core**2)) >= (energy - 1e-12) * norm2


@given(case=factors(NONZERO), tolerance=tolerances)
def test_no_cheaper_truncation_of_the_hosvd_would_do(case, tolerance):
    """The parameters are at most those of the cheapest pair whose dense HOSVD holds."""
    fit = tucker2(case.stack(), tolerance=tolerance)
    slices, m, n = case.shape
    cheapest = min(
        m * p + n * q + slices * p * q
        for p in range(1, case.max_rank[0] + 1)
        for q in range(1, case.max_rank[1] + 1)
        if oracles.hosvd_error(case.dense(), (p, q)) <= tolerance * (1 - 1e-9)
        or (p, q) == case.max_rank
    )
    assert fit.tucker2.parameters <= cheapest


def test_ranks_shrink_where_refinement_makes_room():
    """HOOI holds a tolerance that the HOSVD of the same ranks misses."""
    shrunk = 0
    for seed in range(12):
        case = make("generic", seed, 10, 9, [3, 3, 3, 3])
        for rank in ((3, 3), (5, 4)):
            refined = tucker2(case.stack(), rank)
            plain = tucker2(case.stack(), rank, method="hosvd")
            if plain.relative_error < refined.relative_error * 1.001:
                continue
            between = (plain.relative_error + refined.relative_error) / 2
            fit = tucker2(case.stack(), tolerance=between)
            alone = tucker2(case.stack(), tolerance=between, method="hosvd")
            assert fit.relative_error <= between
            assert fit.tucker2.parameters <= alone.tucker2.parameters
            shrunk += fit.tucker2.parameters < alone.tucker2.parameters
    assert shrunk >= 3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("seed", range(2))
def test_a_tolerance_that_full_ranks_meet_is_met(dtype, seed):
    """Rounding to a half-precision type takes its share, and ranks make room for it."""
    case = make("repeated", seed, 60, 60, [60])
    tail = {np.float16: 0.0005, ml_dtypes.bfloat16: 0.004}[dtype]
    sizes = np.concatenate([np.ones(20), np.full(40, tail)])
    stack = type(case)((case.B[0] * sizes,), case.A).stack()
    # Rounding is most of it; how it falls at tied singular values is not the same everywhere.
    tolerance = 1.15 * max(tucker2(stack, r, dtype=dtype).relative_error for r in (58, 60))
    fit = tucker2(stack, tolerance=tolerance, dtype=dtype)
    assert fit.relative_error <= tolerance
    unrounded = tucker2(stack, tolerance=tolerance, dtype=np.float64)
    assert max(fit.tucker2.rank) > max(unrounded.tucker2.rank)


def test_a_tolerance_below_the_rounding_of_the_type_is_refused():
    """The type is named, and what to do."""
    with pytest.raises(RankError, match=r"bfloat16.*wider dtype or a larger tolerance"):
        tucker2(CASE.stack(), tolerance=1e-5, dtype=ml_dtypes.bfloat16)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-5])
@pytest.mark.parametrize("seed", range(5))
@unconverged
def test_small_tolerances_of_lazy_single_precision(tolerance, seed):
    """What is left out is a difference of energies there, and yet it holds."""
    case = noisy(seed, 14, 12, 4, (3, 3), 1e-7)
    tensor = case.dense().astype(np.float32)
    stack = LazyStack(lambda k: tensor[k], tensor.shape, like=tensor)
    fit = tucker2(stack, tolerance=tolerance)
    assert fit.relative_error <= tolerance
    assert fit.tucker2.rank == (3, 3)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-9, 1e-11])
@unconverged
def test_small_tolerances_of_lazy_double_precision(tolerance):
    """The same, four hundred million times smaller."""
    tensor = noisy(0, 14, 12, 4, (3, 3), 1e-13).dense()
    stack = LazyStack(lambda k: tensor[k], tensor.shape, like=tensor)
    fit = tucker2(stack, tolerance=tolerance)
    assert fit.relative_error <= tolerance
    assert fit.tucker2.rank == (3, 3)


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_small_tolerances_of_exact_stacks(kind):
    """1e-12 is held where the noise is 1e-13, at the planted ranks."""
    case = noisy(0, 14, 12, 4, (3, 3), 1e-14)
    fit = tucker2(STACKS[kind](case, np.array), tolerance=1e-12)
    assert fit.tucker2.rank == (3, 3)
    assert 1e-16 < fit.relative_error < 1e-12


def test_a_stack_of_zeros_needs_next_to_nothing():
    """Any tolerance, energy or budget: ranks (1, 1) and no error."""
    stack = make("all_zero", 0, 6, 5, [2, 2]).stack()
    for goal in ({"tolerance": 0.1}, {"energy": 0.9}, {"parameters": 100}):
        fit = tucker2(stack, **goal)
        assert fit.tucker2.rank == (1, 1)
        assert fit.relative_error == 0.0


# ---------------------------------------------------------------- budget


@given(case=fits(), share=st.floats(0, 1))
@unconverged
def test_a_budget_is_never_exceeded(case, share):
    """Between the smallest and the largest decomposition, and beyond."""
    case, _ = case
    slices, m, n = case.shape
    p, q = case.max_rank
    smallest, largest = m + n + slices, m * p + n * q + slices * p * q
    budget = round(smallest + share * (largest + 5 - smallest))
    for stack in (case.stack(), STACKS["dense"](case, np.array)):
        fit = tucker2(stack, parameters=budget)
        found = fit.tucker2
        assert found.parameters == found.left.size + found.core.size + found.right.size <= budget


@given(case=factors(), below=st.integers(1, 5))
def test_a_budget_below_the_smallest_names_the_smallest(case, below):
    """m + n + K numbers: ranks (1, 1)."""
    slices, m, n = case.shape
    smallest = m + n + slices
    for fit in (
        lambda budget: tucker2(case.stack(), parameters=budget),
        lambda budget: truncate(tucker2(case.stack(), 1).tucker2, budget=f"{budget}p"),
    ):
        with pytest.raises(RankError, match=rf"\b{smallest}\b"):
            fit(smallest - below)
        fit(smallest)


@given(case=factors(UNTIED))
def test_a_budget_buys_the_best_truncation(case):
    """No pair within it has a smaller HOSVD error, by brute force on the dense slices.

    Where singular values tie, the leading vectors and with them that error are anyone's choice.
    """
    slices, m, n = case.shape
    fit = tucker2(case.stack(), parameters=2 * (m + n) + 4 * slices, method="hosvd")
    best = min(
        oracles.hosvd_error(case.dense(), (p, q))
        for p in range(1, case.max_rank[0] + 1)
        for q in range(1, case.max_rank[1] + 1)
        if m * p + n * q + slices * p * q <= 2 * (m + n) + 4 * slices
    )
    assert fit.relative_error <= best * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("kind", ["generic", "decaying", "planted", "uneven"])
def test_more_budget_is_never_more_error(kind):
    """Over every budget. The HOSVD picks the ranks, and HOOI is no worse than it at any of them."""
    stack = make(kind, 3, 6, 7, [2, 2, 1]).stack()
    p, q = stack.max_rank
    budgets = range(6 * p + 7 * q + 3 * p * q, 15, -1)
    plain, refined = (
        np.array([tucker2(stack, parameters=b, method=method).relative_error for b in budgets])
        for method in ("hosvd", "exact")
    )
    assert plain[0] < 1e-12
    assert np.all(np.diff(plain) >= -1e-9)
    # So that refined, no smaller budget's HOSVD is better; two refined ones may differ either way.
    assert np.all(refined <= plain * (1 + 1e-9) + 1e-12)


# ---------------------------------------------------------------- one pass for every rank


@given(shape=st.tuples(*[st.integers(1, 6)] * 3), seed=seeds)
def test_truncation_errors_are_the_naive_ones(shape, seed):
    """Σ_k of the entries outside the corner, for every pair, without cancellation."""
    rng = np.random.default_rng(seed)
    core = rng.standard_normal(shape) * 10.0 ** rng.uniform(-12, 0, shape[1:])
    found = outside2(np.sum(core**2, axis=0))
    assert found.shape == shape[1:]
    for p in range(1, shape[1] + 1):
        for q in range(1, shape[2] + 1):
            outside = core.copy()
            outside[:, :p, :q] = 0
            assert found[p - 1, q - 1] == pytest.approx(np.sum(outside**2), rel=1e-12, abs=0)
    assert found[-1, -1] == 0


@given(case=factors(), compact=st.booleans())
def test_the_frontier_is_complete_and_nothing_on_it_is_beaten(case, compact):
    """Against all pairs, by the dense HOSVD's own definition of the error."""
    stack = case.stack()
    ranks = case.ranks if compact else None
    itself = Reduction("exact", None, stack, None, stack.norms2())
    reduced = ReducedStack(stack, itself, slice_ranks=ranks)
    found, full = reduced.curve, reduced.hosvd
    slices, m, n = case.shape
    pairs = {}
    for p in range(1, case.max_rank[0] + 1):
        for q in range(1, case.max_rank[1] + 1):
            cores = sum(min(p * q, r * (p + q)) for r in case.ranks) if compact else slices * p * q
            projected = oracles.projected(case.dense(), full.left[:, :p], full.right[:, :q])
            pairs[p, q] = m * p + n * q + cores, float(np.sum((case.dense() - projected) ** 2))
    scale = 1e-12 * float(np.sum(case.dense() ** 2))
    assert np.all(np.diff(found.parameters) > 0)
    assert np.all(np.diff(found.error2) < 0)
    assert found.norm2 == pytest.approx(float(np.sum(case.dense() ** 2)), rel=1e-12)
    for i in range(len(found.parameters)):
        parameters, error2 = pairs[pair_at(found, i)]
        assert found.parameters[i] == parameters
        assert found.error2[i] == pytest.approx(error2, rel=1e-6, abs=scale)
    for parameters, error2 in pairs.values():
        below = found.error2[found.parameters <= parameters]
        assert below.size
        assert below[-1] <= error2 + scale


@given(sizes=st.tuples(*[st.integers(1, 9)] * 5))
def test_parameters_count_the_arrays(sizes):
    """m p + n q + K p q; with slice ranks, what a core costs as a product where that is less."""
    slices, m, n, p, q = sizes
    assert tucker2_parameters((slices, m, n), p, q) == m * p + n * q + slices * p * q
    ranks = [1 + k % 3 for k in range(slices)]
    expected = m * p + n * q + sum(min(p * q, r * (p + q)) for r in ranks)
    assert tucker2_parameters((slices, m, n), p, q, ranks) == expected


# ---------------------------------------------------------------- one answer for one question


def adapter_of(case):
    """A LoRA of one module a slice, all of one kind."""
    modules = tuple(
        LoraModule(f"layers.{k}.proj", b, a)
        for k, (b, a) in enumerate(zip(case.B, case.A, strict=True))
    )
    return LoraAdapter(modules, {}, np.dtype(np.float64))


@pytest.mark.parametrize("tolerance", [0.7, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_one_question_has_one_answer(seed, tolerance):
    """A stack, its Tucker-2 and an adapter of one group get the same ranks.

    An analysis tells what truncated HOSVDs reach, which the fit does not exceed.
    """
    # Slices of full rank: cores are kept dense in files too, and all pay the same for a pair.
    case = make("generic", seed, 9, 8, [8] * 4)
    stack, adapter = case.stack(), adapter_of(case)
    fit = tucker2(stack, tolerance=tolerance)
    full = tucker2(stack, stack.max_rank).tucker2
    rounded = truncate(full, tolerance=tolerance)
    converted = convert(adapter, tolerance=tolerance)
    again = truncate(convert(adapter, rank=9), tolerance=tolerance)
    types = by_type([adapter.modules], [reduce_group(adapter.modules)], adapter.dtype)
    point = types.reaching(tolerance)
    assert fit.tucker2.rank == rounded.rank
    assert converted.summary[0].ranks == again.summary[0].ranks == fit.tucker2.rank
    assert converted.parameters == fit.tucker2.parameters <= point.parameters
    errors = [fit.relative_error, converted.relative_error, again.relative_error]
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)
    dense, found = case.dense(), rounded.to_dense()
    assert oracles.relative_error(dense, found) <= tolerance
    assert max(*errors, point.relative_error) <= tolerance


@pytest.mark.parametrize("seed", range(4))
def test_one_size_has_one_answer(seed):
    """The same for a number of parameters."""
    case = make("generic", seed, 9, 8, [8] * 4)
    stack, adapter = case.stack(), adapter_of(case)
    for size in (40, 90, 150, 300):
        fit = tucker2(stack, parameters=size)
        rounded = truncate(tucker2(stack, stack.max_rank).tucker2, budget=f"{size}p")
        converted = convert(adapter, budget=f"{size}p")
        types = by_type([adapter.modules], [reduce_group(adapter.modules)], adapter.dtype)
        assert fit.tucker2.rank == rounded.rank == converted.summary[0].ranks
        assert types.within(8 * size).parameters == fit.tucker2.parameters <= size


@pytest.mark.parametrize("seed", range(6))
def test_no_smaller_pair_holds_a_tolerance(seed):
    """Against HOOI at every smaller pair of the curve, tried one by one."""
    case = make("generic", seed, 10, 9, [3, 2, 3])
    stack = case.stack()
    for tolerance in (0.3, 0.5):
        fit = tucker2(stack, tolerance=tolerance)
        rows = [row for row in rate_distortion(stack) if row.parameters < fit.tucker2.parameters]
        assert rows
        for row in rows:
            assert tucker2(stack, (row.p, row.q)).relative_error > tolerance


def test_groups_share_a_tolerance_no_worse_than_one_by_one():
    """Together they need no more than where each meets the tolerance by itself."""
    rng = np.random.default_rng(0)
    modules = tuple(
        LoraModule(f"layers.{k}.{kind}", size * rng.standard_normal((12, 4)), decay * a)
        for kind, size in (("q", 1.0), ("k", 3.0))
        for k in range(4)
        for a, decay in [(rng.standard_normal((4, 10)), 0.5 ** np.arange(4.0)[:, None])]
    )
    adapter = LoraAdapter(modules, {}, np.dtype(np.float64))
    for tolerance in (0.1, 0.3, 0.5):
        found = convert(adapter, tolerance=tolerance)
        alone = [
            convert(LoraAdapter(modules[i : i + 4], {}, adapter.dtype), tolerance=tolerance)
            for i in (0, 4)
        ]
        assert found.relative_error <= tolerance
        assert found.parameters <= sum(one.parameters for one in alone)
