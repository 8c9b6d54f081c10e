"""Stacks of every kind: one protocol, one answer. What is read of whole slices, and how often."""

import gc
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import DataError, DenseStack, LazyStack, LowRankStack, ShapeError, tucker2
from tests import oracles
from tests.strategies import EVERYWHERE, STACKS, factors, lazy, make, orthogonal

every_stack = pytest.mark.parametrize("kind", list(STACKS))
everywhere = pytest.mark.parametrize(("xp", "kind"), EVERYWHERE, indirect=["xp"])
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])

EPS = {"float64": 1e-13, "float32": 1e-5}

CASE = make("generic", 5, 9, 7, [2, 3, 1, 2])
FRAMES = (orthogonal(np.random.default_rng(1), 9, 4), orthogonal(np.random.default_rng(2), 7, 3))


def build(xp, kind, case, dtype="float64"):
    """A stack of this kind whose slices are those of ``case``."""
    return STACKS[kind](case, lambda x: xp.array(x, dtype))


def close(xp, found, expected, eps):
    """Assert that ``found`` is an array of the library, of this shape and value."""
    assert xp.owns(found)
    assert tuple(found.shape) == expected.shape
    assert np.max(np.abs(xp.numpy(found) - expected)) <= eps * (1 + np.max(np.abs(expected)))


class Counted:
    """Reads slices of a tensor and counts how often each was asked for, in which order."""

    def __init__(self, tensor):
        self.tensor, self.asked = tensor, []

    def __call__(self, k):
        self.asked.append(k)
        return self.tensor[k].copy()

    @property
    def counts(self):
        return [self.asked.count(k) for k in range(len(self.tensor))]

    def stack(self):
        return LazyStack(self, self.tensor.shape, like=self.tensor)


def decaying(seed, slices, m, n, rate=0.8):
    """Dense slices whose unfoldings have geometric spectra."""
    rng = np.random.default_rng(seed)
    u, v = orthogonal(rng, m), orthogonal(rng, n)
    core = rng.standard_normal((slices, m, n))
    core *= np.sqrt(rate ** np.arange(m))[:, None] * np.sqrt(rate ** np.arange(n))
    return u @ core @ v.T


# ---------------------------------------------------------------- the protocol


@everywhere
def test_products_are_the_dense_ones(xp, kind):
    """Every product that an algorithm asks for, against its definition on the dense slices."""
    stack, naive, eps = build(xp, kind, CASE), oracles.DenseSlices(CASE.dense()), 1e-13
    left, right = (xp.array(x) for x in FRAMES)
    assert stack.shape == CASE.shape
    close(xp, stack.to_dense(), naive.tensor, eps)
    for k in range(4):
        close(xp, stack.slice(k), naive.tensor[k], eps)
    close(xp, stack.norms2(), naive.norms2(), eps)
    close(xp, stack.core(left, right), naive.core(*FRAMES), eps)
    close(xp, stack.residual_norms2(left, right), naive.residual_norms2(*FRAMES), eps)
    for found, expected in (
        (stack.left_factor(), naive.left_factor()),
        (stack.right_factor(), naive.right_factor()),
        (stack.left_factor(right), naive.left_factor(FRAMES[1])),
        (stack.right_factor(left), naive.right_factor(FRAMES[0])),
    ):
        close(xp, found @ found.T, expected @ expected.T, eps)


@everywhere
def test_one_pass_gives_all_products_of_a_sweep(xp, kind):
    """sweep: both Gram products, cores and norms; project: cores and residuals."""
    stack, naive, eps = build(xp, kind, CASE), oracles.DenseSlices(CASE.dense()), 1e-13
    (u, v), (left, right) = FRAMES, (xp.array(x) for x in FRAMES)
    sweep = stack.sweep(left, right)
    close(xp, sweep.left, sum((t @ v) @ (t @ v).T @ u for t in naive.tensor), eps)
    close(xp, sweep.right, sum((t.T @ u) @ (t.T @ u).T @ v for t in naive.tensor), eps)
    close(xp, sweep.core, naive.core(u, v), eps)
    close(xp, sweep.norms2, naive.norms2(), eps)
    core, residuals = stack.project(left, right)
    close(xp, core, naive.core(u, v), eps)
    close(xp, residuals, naive.residual_norms2(u, v), eps)


@everywhere
@dtypes
def test_the_small_problem_is_equal_and_wide(xp, kind, dtype):
    """reduce: ΔW_k = Q small_k Pᵀ with orthonormal Q and P, small in float64."""
    q, small, p = build(xp, kind, CASE, dtype).reduce()
    assert small.empty().dtype == xp.dtype("float64")
    rebuilt = xp.numpy(small.to_dense())
    for basis, side in ((q, 0), (p, 1)):
        if basis is None:
            continue
        basis = xp.numpy(basis)
        assert np.max(np.abs(basis.T @ basis - np.eye(basis.shape[1]))) <= EPS[dtype]
        rebuilt = basis @ rebuilt if side == 0 else rebuilt @ basis.T
    assert np.max(np.abs(rebuilt - CASE.dense())) <= 10 * EPS[dtype]


@everywhere
@dtypes
def test_type_and_ranks(xp, kind, dtype):
    """dtype is that of the slices, empty() is empty and of the working type, ranks suffice."""
    stack = build(xp, kind, CASE, dtype)
    assert stack.dtype == xp.dtype(dtype)
    assert stack.empty().dtype == xp.dtype(dtype)
    assert 0 in tuple(stack.empty().shape)
    assert xp.owns(stack.empty())
    p, q = stack.max_rank
    assert np.linalg.matrix_rank(np.hstack(list(CASE.dense()))) <= p <= 9
    assert np.linalg.matrix_rank(np.vstack(list(CASE.dense()))) <= q <= 7


@everywhere
def test_slice_weights_scale_the_slices(xp, kind):
    """scaled: w_k ΔW_k, and the stack itself is as before."""
    stack, weights = build(xp, kind, CASE), [0.5, 3.0, 1.0, 2e-3]
    expected = np.array(weights)[:, None, None] * CASE.dense()
    close(xp, stack.scaled(weights).to_dense(), expected, 1e-13)
    close(xp, stack.scaled(weights).norms2(), np.sum(expected**2, axis=(1, 2)), 1e-13)
    close(xp, stack.to_dense(), CASE.dense(), 1e-13)


@everywhere
@dtypes
def test_every_kind_has_the_same_fit(xp, kind, dtype):
    """Error, bound, slice errors and reconstruction do not depend on how the slices are held."""
    expected = tucker2(CASE.stack(), (4, 3))
    fit = tucker2(build(xp, kind, CASE, dtype), (4, 3), method="exact")
    eps = {"float64": 1e-6, "float32": 1e-4}[dtype]
    assert fit.method == "exact"
    assert fit.relative_error == pytest.approx(expected.relative_error, rel=eps)
    assert fit.lower_bound == pytest.approx(expected.lower_bound, rel=eps)
    found = xp.numpy(fit.tucker2.to_dense())
    assert oracles.relative_error(expected.tucker2.to_dense(), found) < 100 * eps
    assert fit.slice_errors == pytest.approx(expected.slice_errors, abs=100 * eps)
    for x in (fit.tucker2.left, fit.tucker2.core, fit.tucker2.right):
        assert xp.owns(x)
        assert x.dtype == xp.dtype(dtype)


@every_stack
def test_reported_error_is_that_of_the_dense_reconstruction(kind):
    """relative_error from residuals equals the one from the dense difference, by any method."""
    stack = STACKS[kind](CASE, np.array)
    for method in ("auto", "exact", "hosvd", "st-hosvd"):
        fit = tucker2(stack, (3, 4), method=method)
        expected = oracles.relative_error(CASE.dense(), fit.tucker2.to_dense())
        assert fit.relative_error == pytest.approx(expected, rel=1e-9), method
        assert fit.lower_bound <= fit.relative_error


@given(case=factors(), split=st.floats(0.1, 0.9))
def test_dense_lazy_and_low_rank_agree(case, split):
    """To rounding, on degenerate stacks too: norms, bounds and the error at any ranks."""
    _, m, n = case.shape
    p, q = (max(1, round(split * min(r, s))) for r, s in zip(case.max_rank, (m, n), strict=True))
    slices = len(case.B)
    p, q = min(p, slices * n), min(q, slices * m)
    fits = [
        tucker2(stack, (p, q), method="hosvd")
        for stack in (case.stack(), DenseStack(case.dense()), lazy(case.dense()))
    ]
    bounds = [fit.lower_bound for fit in fits]
    assert bounds == pytest.approx([oracles.lower_bound(case.dense(), (p, q))] * 3, abs=1e-12)
    for fit in fits:
        assert fit.relative_error <= np.sqrt(2) * bounds[0] + 1e-12


@every_stack
@pytest.mark.parametrize("tiny", [1e-6, 1e-10, 1e-12])
def test_a_tiny_direction_is_found_and_counted(kind, tiny):
    """A planted σ of 1e-10 beside 1: kept it gives an error of rounding, dropped its own size."""
    rng = np.random.default_rng(7)
    case = make("planted", 3, 12, 11, [2, 2, 2])
    u, v = orthogonal(rng, 12, 3), orthogonal(rng, 11, 3)
    sizes = np.array([1.0, 1.0, tiny])
    case = type(case)(tuple(u * sizes for _ in range(3)), tuple(v.T.copy() for _ in range(3)))
    # Halves that cancel would put rounding of size one into the sums.
    stack = STACKS[kind](case, np.array)
    kept, dropped = (tucker2(stack, r, method="exact") for r in (3, 2))
    assert kept.relative_error < 1e-14
    assert dropped.relative_error == pytest.approx(tiny / np.sqrt(2 + tiny**2), rel=2e-3)
    assert dropped.lower_bound == pytest.approx(dropped.relative_error, rel=2e-3)
    direction = kept.tucker2.left[:, 2]
    assert abs(abs(direction @ u[:, 2]) - 1) < 1e-3


# ---------------------------------------------------------------- arithmetic of stacks


@pytest.mark.parametrize("first", ["low-rank", "dense", "lazy"])
@pytest.mark.parametrize("second", ["low-rank", "dense", "lazy"])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_unlike_kinds(first, second, sign):
    """a + b and a − b hold for any two kinds, in either order."""
    other = make("generic", 6, 9, 7, [1, 2, 2, 3])
    a, b = STACKS[first](CASE, np.array), STACKS[second](other, np.array)
    found = a + b if sign == 1 else a - b
    assert found.to_dense() == pytest.approx(CASE.dense() + sign * other.dense(), abs=1e-12)


@every_stack
def test_stacks_of_unlike_shapes_have_no_sum(kind):
    """Sum and difference name both shapes."""
    stack = STACKS[kind](CASE, np.array)
    other = STACKS[kind](make("generic", 0, 9, 8, [1] * 4), np.array)
    for operation in (lambda: stack + other, lambda: stack - other):
        with pytest.raises(ShapeError, match=r"\(4, 9, 7\).*\(4, 9, 8\)"):
            operation()


def test_sums_of_unlike_precision(xp):
    """float32 and float64 stacks add up in float64, in every library."""
    exact = xp.array(CASE.dense())
    found = DenseStack(exact) + DenseStack(xp.array(CASE.dense(), "float32"))
    fit = tucker2(found, (9, 7), method="exact")
    assert fit.relative_error < 1e-6
    assert oracles.relative_error(2 * CASE.dense(), xp.numpy(fit.tucker2.to_dense())) < 1e-6


def test_slices_of_unlike_precision(xp):
    """A reader may return float32 and float64 by turns."""
    tensor = CASE.dense()
    stack = LazyStack(
        lambda k: xp.array(tensor[k], "float32" if k % 2 else "float64"),
        tensor.shape,
        like=xp.array(np.zeros(1)),
    )
    for method in ("exact", "matrix-free"):
        fit = tucker2(stack, (9, 7), method=method)
        assert oracles.relative_error(tensor, xp.numpy(fit.tucker2.to_dense())) < 1e-6


# ---------------------------------------------------------------- DenseStack


def test_a_dense_stack_does_not_copy():
    """The array is held as it is, read-only or not, and its strides may be any."""
    tensor = np.asfortranarray(np.random.default_rng(0).standard_normal((3, 5, 4)))
    tensor.flags.writeable = False
    stack = DenseStack(tensor)
    assert np.shares_memory(stack.slice(1), tensor)
    before = tensor.copy()
    tucker2(stack, 2, weights="equal")
    assert np.array_equal(tensor, before)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("method", ["exact", "matrix-free"])
@pytest.mark.parametrize("form", ["dense", "lazy"])
def test_half_precision_slices(dtype, method, form):
    """Products are in float32 at the least; the result has the type that came in."""
    tensor = CASE.dense().astype(dtype)
    wide = tensor.astype(np.float64)
    stack = (
        DenseStack(tensor)
        if form == "dense"
        else LazyStack(lambda k: tensor[k], tensor.shape, like=tensor)
    )
    fit = tucker2(stack, (9, 7), method=method)
    for x in (fit.tucker2.left, fit.tucker2.core, fit.tucker2.right):
        assert x.dtype == dtype
    rebuilt = oracles.reconstruct(
        *(x.astype(np.float64) for x in (fit.tucker2.left, fit.tucker2.core, fit.tucker2.right))
    )
    assert fit.relative_error == pytest.approx(oracles.relative_error(wide, rebuilt), rel=1e-3)
    assert fit.relative_error < 8e-3
    exact = tucker2(stack, (9, 7), method=method, dtype=np.float64)
    assert exact.relative_error < 1e-6


def test_torch_half_precision_slices():
    """The same for PyTorch's types."""
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(CASE.dense(), dtype=torch.bfloat16)
    for stack in (DenseStack(tensor), LazyStack(lambda k: tensor[k], (4, 9, 7), like=tensor)):
        fit = tucker2(stack, (5, 4), method="matrix-free")
        assert fit.tucker2.core.dtype == torch.bfloat16
        expected = tucker2(DenseStack(tensor.double()), (5, 4)).relative_error
        assert fit.relative_error == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (3, 2), (3,), (2, 2, 2, 2)])
def test_a_dense_stack_refuses_shapes(xp, shape):
    """Empty, or not three-dimensional: the shape is named."""
    with pytest.raises(ShapeError, match="slices has shape"):
        DenseStack(xp.array(np.zeros(shape)))


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128"])
def test_a_dense_stack_refuses_types(dtype):
    """Integers, booleans and complex numbers are refused by name."""
    with pytest.raises(DataError, match=dtype):
        DenseStack(np.ones((2, 3, 2), dtype=dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_dense_stack_refuses_what_is_not_finite(xp, value):
    """The slice is named."""
    tensor = np.ones((3, 4, 2))
    tensor[2, 1, 0] = value
    with pytest.raises(DataError, match="slice 2"):
        DenseStack(xp.array(tensor))


@pytest.mark.parametrize(
    "slices", [[[[1.0]]], "abc", None, 3.0, [np.ones((2, 2)), np.ones((3, 2))]]
)
def test_a_dense_stack_refuses_what_is_no_array(slices):
    """Lists, ragged ones too, strings and numbers."""
    with pytest.raises(DataError, match="expected arrays"):
        DenseStack(slices)


# ---------------------------------------------------------------- LazyStack: what is read


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0, 1.0, 1.0]])
@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_every_slice_is_read_six_times_at_most(slow, weights):
    """Of a fit by rank; also where the spectrum is too slow for the iteration to converge."""
    tensor = decaying(0, 6, 40, 30, 0.99 if slow else 0.5)
    reader = Counted(tensor)
    fit = tucker2(reader.stack(), (4, 5), weights=weights)
    assert fit.method == "matrix-free"
    assert set(reader.counts) == {fit.passes + 1}
    assert max(reader.counts) <= 6
    assert reader.asked == list(range(6)) * (fit.passes + 1)


@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_equal_weights_take_one_more_pass():
    """The one that measures the slices."""
    reader = Counted(decaying(0, 6, 40, 30, 0.99))
    fit = tucker2(reader.stack(), (4, 5), weights="equal")
    assert set(reader.counts) == {fit.passes + 2}
    assert max(reader.counts) <= 7


@pytest.mark.parametrize("product", ["norms2", "left_factor", "right_factor", "to_dense"])
def test_products_without_arguments_are_one_pass(product):
    """Each slice once, in order."""
    reader = Counted(CASE.dense())
    getattr(reader.stack(), product)()
    assert reader.asked == [0, 1, 2, 3]


@pytest.mark.parametrize("product", ["sweep", "project", "core", "residual_norms2"])
def test_products_with_two_blocks_are_one_pass(product):
    """Each slice once, in order."""
    reader = Counted(CASE.dense())
    getattr(reader.stack(), product)(*FRAMES)
    assert reader.asked == [0, 1, 2, 3]


def test_nothing_is_read_before_it_is_needed():
    """Neither building, scaling nor adding reads a slice."""
    reader = Counted(CASE.dense())
    stack = reader.stack() * 2.0 + reader.stack() - reader.stack().scaled([1, 2, 3, 4])
    assert stack.shape == CASE.shape
    assert reader.asked == []


@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_one_slice_is_alive_at_a_time():
    """When a slice is asked for, the one before has been let go."""
    tensor, alive, most = decaying(0, 5, 30, 20), [], []

    class Slice(np.ndarray):
        pass

    def read(k):
        most.append(sum(ref() is not None for ref in alive))
        found = tensor[k].copy().view(Slice)
        alive.append(weakref.ref(found))
        return found

    gc.collect()
    tucker2(LazyStack(read, tensor.shape, like=tensor), 4)
    assert len(most) > 5
    assert max(most) == 0


@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_memory_holds_few_slices(dtype):
    """A fit of nine slices peaks below six of them, work space included."""
    size = 1024
    whole = np.random.default_rng(0).standard_normal((size, size), dtype)
    stack = LazyStack(lambda k: whole * (k + 1), (9, size, size), like=whole)
    tracemalloc.start()
    tucker2(stack, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 6 * size * size * np.dtype(dtype).itemsize


@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_lazy_and_dense_agree():
    """The exact method to rounding; the iteration, which stops earlier, to the per mille."""
    tensor = decaying(3, 5, 20, 25)
    one, other = (
        tucker2(stack, (6, 7), method="matrix-free", max_passes=5, seed=4)
        for stack in (DenseStack(tensor), lazy(tensor))
    )
    assert one.relative_error == pytest.approx(other.relative_error, rel=1e-3)
    exact = tucker2(DenseStack(tensor), (6, 7))
    lazily = tucker2(lazy(tensor), (6, 7), method="exact")
    assert lazily.relative_error == pytest.approx(exact.relative_error, rel=1e-12)
    assert lazily.tucker2.to_dense() == pytest.approx(exact.tucker2.to_dense(), abs=1e-12)


# ---------------------------------------------------------------- LazyStack: what is refused


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.ones((7, 9)), ShapeError, r"slice 2 is \(7, 9\).*\(9, 7\)"),
        (np.ones(9), ShapeError, "slice 2"),
        (np.ones((1, 9, 7)), ShapeError, "slice 2"),
        (np.full((9, 7), np.nan), DataError, "slice 2"),
        (np.full((9, 7), np.inf, np.float16), DataError, "slice 2"),
        (np.full((9, 7), np.inf).astype(ml_dtypes.bfloat16), DataError, "slice 2"),
        (np.ones((9, 7), np.int32), DataError, "slice 2 has dtype int32"),
        (np.ones((9, 7), bool), DataError, "slice 2 has dtype bool"),
        (np.ones((9, 7), complex), DataError, "slice 2 has dtype complex128"),
        ([[1.0] * 7] * 9, DataError, "slice 2"),
        (None, DataError, "slice 2"),
    ],
)
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_bad_slices_are_refused_when_they_are_read(bad, error, message, method):
    """By number; nothing is refused before."""
    tensor = CASE.dense()
    stack = LazyStack(lambda k: bad if k == 2 else tensor[k], tensor.shape, like=tensor)
    with pytest.raises(error, match=message):
        tucker2(stack, 2, method=method)


def test_slices_of_another_library_are_refused():
    """``like`` says which library; a reader of another one is no raw TypeError."""
    torch = pytest.importorskip("torch")
    stack = LazyStack(lambda k: torch.ones(4, 3), (2, 4, 3))
    with pytest.raises(DataError):
        tucker2(stack, 1)


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (2, 3, 0), (3, 2), (1, 2, 3, 4), ()])
def test_a_lazy_stack_refuses_shapes(shape):
    """Empty, or not (K, m, n)."""
    with pytest.raises(ShapeError, match="expected"):
        LazyStack(lambda k: np.ones((3, 2)), shape)


@pytest.mark.parametrize("like", [np.empty(0, int), np.empty(0, complex), [1.0]])
def test_a_lazy_stack_refuses_types(like):
    """At once, where ``like`` tells."""
    with pytest.raises(DataError):
        LazyStack(lambda k: np.ones((3, 2)), (2, 3, 2), like=like)


def test_what_a_reader_raises_comes_through():
    """An error of the reader's own is not turned into another."""

    def read(k):
        raise FileNotFoundError("shard 3")

    with pytest.raises(FileNotFoundError, match="shard 3"):
        tucker2(LazyStack(read, (2, 3, 3)), 1)


@pytest.mark.parametrize("slices", [[], ()])
def test_an_empty_stack_is_refused(slices):
    """No slice, no decomposition."""
    with pytest.raises(ShapeError):
        LowRankStack(slices, slices)


def test_ragged_slices_are_refused():
    """Slices of one stack have one shape; the slice is named."""
    with pytest.raises(ShapeError, match="slice 1"):
        LowRankStack([np.ones((3, 1)), np.ones((4, 1))], [np.ones((1, 2))] * 2)


# ---------------------------------------------------------------- many slices


@pytest.mark.parametrize("kind", ["low-rank", "dense", "lazy"])
@pytest.mark.parametrize("goal", [{"rank": (2, 2)}, {"tolerance": 0.3}, {"parameters": 12100}])
@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_three_thousand_tiny_slices(kind, goal):
    """Thousands of experts or adapters are as right as four."""
    case = make("generic", 0, 5, 4, [1] * 3000)
    case = type(case)(
        tuple(np.diag([3, 2, 0.3, 0.1, 0.1]) @ b for b in case.B),
        tuple(a * np.array([2, 1, 0.1, 0.1]) for a in case.A),
    )
    stack = STACKS[kind](case, np.array)
    fit = tucker2(stack, **goal)
    expected = oracles.relative_error(case.dense(), fit.tucker2.to_dense())
    assert fit.relative_error == pytest.approx(expected, rel=1e-9)
    assert fit.slice_errors.shape == (3000,)
