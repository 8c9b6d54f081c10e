"""Whatever passes for an array: a right result, or a sentence that says what to give instead."""

import functools

import ml_dtypes
import numpy as np
import pytest

import lotrtensor as lt
from lotrtensor import core

RNG = np.random.default_rng(0)
B, A = RNG.standard_normal((3, 6, 2)), RNG.standard_normal((3, 2, 5))
X = B @ A


def torch_kind(make):
    torch = pytest.importorskip("torch")
    return make(torch, torch.tensor(X)), make(torch, torch.tensor(B)), make(torch, torch.tensor(A))


def nested(torch, x):
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


def masked(x):
    return np.ma.masked_array(x, mask=x > 1)


def thrice(make):
    return make(X), make(B), make(A)


REFUSED = {
    "masked": lambda: thrice(masked),
    "float8": lambda: thrice(lambda x: x.astype(ml_dtypes.float8_e4m3fn)),
    "integers": lambda: thrice(lambda x: x.astype(int)),
    "complex": lambda: thrice(lambda x: x.astype(complex)),
    "objects": lambda: thrice(lambda x: x.astype(object)),
    "text": lambda: thrice(lambda x: x.astype(str)),
    "dates": lambda: thrice(lambda x: x.astype("M8[s]")),
    "fields": lambda: thrice(lambda x: x.view([("x", "f8")])),
    "meta": lambda: torch_kind(lambda torch, x: x.to("meta")),
    "sparse": lambda: torch_kind(lambda torch, x: x.to_sparse()),
    "nested": lambda: torch_kind(nested),
    "quantised": lambda: torch_kind(
        lambda torch, x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    ),
}

CALLS = {
    "tucker2": lambda x, b, a: lt.tucker2(x, rank=1),
    "tucker2 of pairs": lambda x, b, a: lt.tucker2(lt.LowRankStack(b, a), rank=1),
    "norm": lambda x, b, a: lt.norm(x),
    "rate_distortion": lambda x, b, a: lt.rate_distortion(x),
    "inner": lambda x, b, a: lt.inner(x, x),
    "cluster": lambda x, b, a: lt.cluster(x, 2, (1, 1)),
    "principal_angles": lambda x, b, a: lt.principal_angles(b[0], b[1]),
    "hosvd": lambda x, b, a: core.hosvd(x),
    "hooi": lambda x, b, a: core.hooi(x, rank=(1, 1)),
    "DenseStack": lambda x, b, a: lt.DenseStack(x),
    "LazyStack": lambda x, b, a: lt.norm(lt.LazyStack(lambda k: x[k], (3, 6, 5), like=x[0])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_array_of_real_numbers_is_refused(kind, call):
    if kind == "nested" and call in ("principal_angles", "LazyStack"):
        pytest.skip("a matrix of a nested tensor is a plain one")
    with pytest.raises(lt.LotrError) as refused:
        CALLS[call](*REFUSED[kind]())
    assert len(str(refused.value)) < 300


ALIKE = {
    "big-endian": lambda x: x.astype(">f8"),
    "big-endian float32": lambda x: x.astype(">f4"),
    "read-only": lambda x: np.lib.stride_tricks.as_strided(x, writeable=False),
    "reversed": lambda x: x[::-1, ::-1, ::-1][::-1, ::-1, ::-1],
    "columns first": np.asfortranarray,
    "long double": lambda x: x.astype(np.longdouble),
    "with gaps": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "unaligned": lambda x: (
        np.frombuffer(b"\0" + x.tobytes(), dtype=np.uint8)[1:].view(x.dtype).reshape(x.shape)
    ),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_other_layouts_of_the_same_numbers_are_the_same(kind):
    change = ALIKE[kind]
    for near, far in (
        (X, change(X)),
        (lt.LowRankStack(B, A), lt.LowRankStack(change(B), change(A))),
    ):
        expected, found = lt.tucker2(near, rank=2), lt.tucker2(far, rank=2)
        assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-5)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrices_whose_product_is_another_are_refused():
    with pytest.raises(lt.DataError, match="matrix"):
        lt.LowRankStack([np.matrix(x) for x in B], [np.matrix(x) for x in A])


def test_a_function_under_jit_is_refused():
    jax = pytest.importorskip("jax")
    for call in (lambda x: lt.tucker2(x, rank=1).tucker2.core, lt.norm):
        with pytest.raises(lt.DataError, match=r"jax\.jit"):
            jax.jit(call)(jax.numpy.asarray(X))


@pytest.mark.parametrize("rank", ["x", float("nan"), 1.5, True, 0, -1, [1]])
def test_a_rank_of_an_export_is_an_integer(rank):
    modules = tuple(lt.LoraModule(f"l.{k}.q", B[k], A[k]) for k in range(3))
    lora = lt.LoraAdapter(modules, {}, np.dtype("float64"))
    for adapter in (lora, lt.convert(lora, rank=2), lt.compress(lora, tolerance=0.3)):
        with pytest.raises(lt.RankError):
            adapter.to_lora(rank)


EDGES = {
    "one slice": (1, 4, 5),
    "one row": (3, 1, 5),
    "one column": (3, 4, 1),
    "one number": (1, 1, 1),
    "many slices": (20_000, 2, 3),
}


@pytest.mark.parametrize("shape", EDGES.values(), ids=EDGES)
def test_the_smallest_and_longest_shapes(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    fit = lt.tucker2(x, rank=1)
    assert 0.0 <= fit.relative_error <= 1.0
    assert fit.lower_bound <= fit.relative_error + 1e-12


@pytest.mark.parametrize("kind", ["zero", "ties", "one direction", "denormal"])
def test_spectra_without_a_gap(kind):
    x = {
        "zero": np.zeros((3, 4, 5)),
        "ties": np.stack([np.eye(4, 5)] * 3),
        "one direction": np.ones((3, 4, 5)),
        "denormal": np.full((3, 4, 5), 5e-324),
    }[kind]
    call = functools.partial(lt.tucker2, x, rank=2)
    if kind == "denormal":
        with pytest.raises(lt.DataError):
            call()
        return
    fit = call()
    expected = np.sqrt(0.5) if kind == "ties" else 0.0
    assert fit.relative_error == pytest.approx(expected, abs=1e-12)
    assert np.isfinite(fit.tucker2.core).all()
