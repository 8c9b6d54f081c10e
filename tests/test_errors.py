"""What a user can get wrong: which error it is, and that its message names the culprit."""

import inspect

import numpy as np
import pytest

from lotrtensor import (
    DataError,
    DenseStack,
    LazyStack,
    LotrError,
    LotrWarning,
    LowRankStack,
    MissingPackageError,
    OptionError,
    RankError,
    ShapeError,
    Tucker2,
    cluster,
    errors,
    rate_distortion,
    subspace_overlap,
    tucker2,
)
from lotrtensor.core.fit.truncate import truncate_tucker2
from tests.strategies import make


def arrays(seed=0, m=5, n=4, ranks=(2, 3, 2)):
    """Fresh lists of B_k and A_k."""
    case = make("generic", seed, m, n, list(ranks))
    return [b.copy() for b in case.B], [a.copy() for a in case.A]


def kinds():
    """Every class of the errors module that is an error of the library."""
    found = [x for _, x in inspect.getmembers(errors, inspect.isclass)]
    return [x for x in found if issubclass(x, LotrError) and x is not LotrError]


def test_there_are_kinds():
    """The public errors are among those that the next test looks at."""
    names = {kind.__name__ for kind in kinds()}
    assert names >= {
        "DataError",
        "FormatError",
        "RankError",
        "ShapeError",
        "UnsupportedAdapterError",
    }


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_is_a_lotr_error_and_a_value_error(kind):
    """One except clause catches all; code that knows only Python's errors works too."""
    builtin = ImportError if kind is MissingPackageError else ValueError
    for caught in (LotrError, builtin, kind):
        with pytest.raises(caught, match="why"):
            raise kind("why")


def test_the_warning_is_no_error():
    """LotrWarning is a UserWarning, caught by no handler of errors."""
    assert issubclass(LotrWarning, UserWarning)
    assert not issubclass(LotrWarning, LotrError)


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("rank", [0, -1, (0, 2), (2, 0), (-3, 2), (2, -1)])
def test_a_rank_below_one_is_refused(rank):
    """The message holds the rank and the least that is possible."""
    with pytest.raises(RankError, match="at least 1") as caught:
        tucker2(LowRankStack(*arrays()), rank)
    assert str(rank) in str(caught.value)


@pytest.mark.parametrize("rank", [6, 5, (6, 4), (5, 5), (1, 5), (6, 1), 10**9])
def test_a_rank_above_the_largest_is_refused(rank):
    """The message holds the rank and the largest possible (5, 4)."""
    with pytest.raises(RankError, match=r"\(5, 4\)") as caught:
        tucker2(LowRankStack(*arrays()), rank)
    assert str(rank if isinstance(rank, int) else rank[0]) in str(caught.value)


def test_the_largest_rank_follows_the_factors():
    """Where ρ = Σ r_k is below m and n, it is ρ that limits, and ρ itself is accepted."""
    stack = LowRankStack(*arrays(m=9, n=8, ranks=(1, 2)))
    with pytest.raises(RankError, match=r"\(3, 3\)"):
        tucker2(stack, 4)
    assert tucker2(stack, 3).tucker2.rank == (3, 3)


@pytest.mark.parametrize(
    "rank", [2.0, 2.5, np.float64(2), float("nan"), (2.0, 2), (2, 2.5), "2", "ab", None, (None, 2)]
)
def test_a_rank_that_is_no_integer_is_refused(rank):
    """A float is refused also where it is whole: 2.0 is more likely a tolerance gone astray."""
    with pytest.raises(RankError, match="rank"):
        tucker2(LowRankStack(*arrays()), rank)


@pytest.mark.parametrize("rank", [(), (2,), (2, 2, 2), [1, 2, 3]])
def test_ranks_of_the_wrong_number_are_refused(rank):
    """The message asks for an integer or a pair."""
    with pytest.raises(RankError, match="pair"):
        tucker2(LowRankStack(*arrays()), rank)


# ---------------------------------------------------------------- shapes


def test_an_empty_stack_is_refused():
    """No slices is no stack, as lists or as arrays."""
    for b, a in (([], []), (np.zeros((0, 5, 2)), np.zeros((0, 2, 4)))):
        with pytest.raises(ShapeError, match="at least one slice"):
            LowRankStack(b, a)


def test_factors_that_are_no_pairs_are_refused():
    """The message holds both counts."""
    b, a = arrays()
    with pytest.raises(ShapeError, match=r"3 .*2 "):
        LowRankStack(b, a[:2])
    with pytest.raises(ShapeError):
        LowRankStack([], a)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_an_inner_rank_that_does_not_match_is_refused(k):
    """B_k (m × r) beside A_k (r' × n): the message names the slice and holds both shapes."""
    b, a = arrays()
    a[k] = a[k][:1, :]
    with pytest.raises(ShapeError, match=f"slice {k}") as caught:
        LowRankStack(b, a)
    assert str(b[k].shape) in str(caught.value)
    assert str(a[k].shape) in str(caught.value)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("side", ["m", "n"])
def test_slices_of_unlike_shapes_are_refused(k, side):
    """The message names the slice that differs from the first."""
    b, a = arrays()
    if side == "m":
        b[k] = b[k][:-1, :]
    else:
        a[k] = a[k][:, :-1]
    with pytest.raises(ShapeError, match=f"slice {k}"):
        LowRankStack(b, a)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("shape", [(5,), (5, 2, 1), (5, 0), (0, 2), ()])
def test_a_factor_that_is_no_matrix_is_refused(k, shape):
    """Vectors, blocks and empty matrices: the message names the slice."""
    b, a = arrays()
    b[k] = np.zeros(shape)
    with pytest.raises(ShapeError, match=f"slice {k}"):
        LowRankStack(b, a)


def test_one_pair_that_is_not_in_a_list_is_refused():
    """B and A of a single slice, not wrapped in lists, are not taken for K vectors."""
    b, a = arrays()
    with pytest.raises(ShapeError):
        LowRankStack(b[0], a[0])
    with pytest.raises(ShapeError):
        LowRankStack(np.ones((3, 3)), np.ones((3, 3)))


def test_devices_that_differ_are_refused():
    """The message names the slice that is elsewhere."""
    strict = pytest.importorskip("array_api_strict")
    b, a = ([strict.asarray(x) for x in xs] for xs in arrays())
    a[1] = strict.asarray(arrays()[1][1], device=strict.Device("device1"))
    with pytest.raises(ShapeError, match="A of slice 1"):
        LowRankStack(b, a)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_infinity_are_refused(xp, bad, name, k, dtype):
    """The message names the factor and the slice."""
    b, a = arrays()
    (a if name == "A" else b)[k][1, 0] = bad
    with pytest.raises(DataError, match=f"{name} of slice {k}"):
        LowRankStack([xp.array(x, dtype) for x in b], [xp.array(x, dtype) for x in a])


def test_nan_in_half_precision_is_refused():
    """NaN in bfloat16, which many array functions do not know."""
    torch = pytest.importorskip("torch")
    b, a = ([torch.tensor(x, dtype=torch.bfloat16) for x in xs] for xs in arrays())
    a[1][0, 0] = float("nan")
    with pytest.raises(DataError, match="A of slice 1"):
        LowRankStack(b, a)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool", "complex64", "complex128"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_types_that_are_not_real_floating_are_refused(dtype, name):
    """Integers, booleans and complex numbers: the message names the factor and the type."""
    torch = pytest.importorskip("torch")
    for build in (lambda x: x.astype(dtype), lambda x: torch.tensor(x).to(getattr(torch, dtype))):
        b, a = arrays()
        keep = (lambda x: x) if isinstance(build(b[0]), np.ndarray) else torch.tensor
        b, a = [keep(x) for x in b], [keep(x) for x in a]
        which = a if name == "A" else b
        which[1] = build(arrays()[1 if name == "A" else 0][1])
        with pytest.raises(DataError, match=f"{name} of slice 1") as caught:
            LowRankStack(b, a)
        assert dtype in str(caught.value)


def test_objects_and_strings_are_refused():
    """NumPy arrays that hold no numbers."""
    b, a = arrays()
    for dtype in (object, str):
        with pytest.raises(DataError, match="slice 0"):
            LowRankStack([x.astype(dtype) for x in b], [x.astype(dtype) for x in a])


def test_arrays_of_two_libraries_are_refused():
    """Across B and A, or across slices: the message holds both types."""
    torch = pytest.importorskip("torch")
    b, a = arrays()
    for lefts, rights in (
        (b, [torch.tensor(x) for x in a]),
        ([b[0], torch.tensor(b[1]), b[2]], a),
    ):
        with pytest.raises(DataError, match=r"numpy\.ndarray.*torch\.Tensor"):
            LowRankStack(lefts, rights)


def test_what_is_no_array_is_refused():
    """Nested lists, which have no type to keep."""
    b, a = arrays()
    with pytest.raises(DataError, match="list"):
        LowRankStack([x.tolist() for x in b], [x.tolist() for x in a])


@pytest.mark.parametrize("name", ["left", "core", "right"])
@pytest.mark.parametrize("fault", ["nan", "inf", "int", "complex", "library", "list"])
def test_tucker2_refuses_the_same(name, fault):
    """NaN, infinity, integers, complex numbers, another library, lists: one kind of error."""
    torch = pytest.importorskip("torch")
    parts = {"left": np.ones((4, 2)), "core": np.ones((3, 2, 2)), "right": np.ones((5, 2))}
    bad = parts[name]
    if fault in ("nan", "inf"):
        bad[..., 0] = float(fault)
    else:
        bad = {
            "int": bad.astype(int),
            "complex": bad.astype(complex),
            "library": torch.tensor(bad),
            "list": bad.tolist(),
        }[fault]
    parts[name] = bad
    named = {"library": "torch", "list": "list"}.get(fault, name)
    with pytest.raises(DataError, match=named):
        Tucker2(**parts)


def test_products_beyond_the_type_are_refused():
    """Cores that the stack's type cannot hold are refused, never returned as infinity."""
    b, a = arrays()
    stack = LowRankStack(*([(300.0 * x).astype("float16") for x in side] for side in (b, a)))
    with np.errstate(over="ignore"), pytest.raises(DataError, match="float16 does not hold"):
        tucker2(stack, 4)


# ---------------------------------------------------------------- the core's doors

DECOMPOSITION = tucker2(LowRankStack(*arrays()), 2).tucker2


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda s: tucker2(np.ones((5, 4)), 1), r"\(5, 4\); expected \(K, m, n\)"),
        (lambda s: tucker2("weights", 1), r"builtins\.str: give an array .* DenseStack"),
        (lambda s: rate_distortion({"B": 1}), r"builtins\.dict"),
        (lambda s: DECOMPOSITION + s, "no sum"),
        (lambda s: DenseStack(np.ones((3, 5, 4))) + np.ones((3, 5, 4)), r"numpy\.ndarray"),
        (lambda s: tucker2(s, 1, dtype="whatever"), "dtype is 'whatever'"),
        (lambda s: tucker2(s, 1, dtype=int), "dtype has dtype int"),
        (lambda s: tucker2(s, 1, seed=-1), "seed is -1"),
        (lambda s: tucker2(s, 1, weights=[1e-200] * 3), "1e-100"),
        (lambda s: tucker2(s, 1, weights=[1.0, 1.0, 1e200]), "1e-100"),
        (lambda s: tucker2(s * 1e6, 1, dtype=np.float16), "float16.*wider"),
        (lambda s: s.scaled([1.0, 2.0]), "found 2 weights; expected 3"),
        (lambda s: DenseStack(np.ones((3, 5, 4))).scaled([1.0]), "found 1 weights; expected 3"),
        (lambda s: cluster(s, 1.5, 1), "clusters is 1.5"),
        (lambda s: cluster(s, "2", 1), "clusters is '2'"),
        (lambda s: subspace_overlap(np.zeros((5, 2)), np.eye(5)[:, :2]), "dependent"),
        (lambda s: subspace_overlap(np.ones((5, 2)), np.eye(5)[:, :2]), "dependent"),
        (lambda s: tucker2(LazyStack(lambda k: np.full((5, 4), 1e200), (3, 5, 4)), 1), "slice 0"),
    ],
)
def test_the_core_refuses_in_one_sentence(attempt, message):
    """What is no stack, no dtype, no seed, no weights; nothing raw, nothing silent."""
    stack = LowRankStack(*arrays())
    with pytest.raises(LotrError, match=message) as caught:
        attempt(stack)
    assert "\n" not in str(caught.value)


def test_libraries_do_not_mix():
    """Sums of NumPy and PyTorch are refused, not a TypeError of either."""
    torch = pytest.importorskip("torch")
    lefts, rights = arrays()
    ours = LowRankStack(lefts, rights)
    theirs = LowRankStack([torch.tensor(b) for b in lefts], [torch.tensor(a) for a in rights])
    with pytest.raises(DataError, match="one array library"):
        ours + theirs
    with pytest.raises(DataError, match="one array library"):
        DECOMPOSITION + tucker2(theirs, 2).tucker2
    with pytest.raises(OptionError, match="dtype is 'float16'"):
        tucker2(theirs, 1, dtype="float16")


def test_a_lazy_stack_is_off_the_gradient_tape():
    """Slices of a parameter: the decomposition is no part of its graph."""
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.randn(3, 12, 10, dtype=torch.float64))
    stack = LazyStack(lambda k: weight[k] * 2, (3, 12, 10), like=weight)
    found = tucker2(stack, 12 - 2, method="exact").tucker2
    assert not any(x.requires_grad for x in (found.left, found.core, found.right))
    trained = Tucker2(*(torch.nn.Parameter(x) for x in (found.left, found.core, found.right)))
    assert not truncate_tucker2(trained, 2).left.requires_grad
