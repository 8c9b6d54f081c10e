"""To and from TensorLy's Tucker tensors: exact, both ways."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import ShapeError, Tucker2, tucker2
from tests.strategies import make, seeds

tensorly = pytest.importorskip("tensorly")
decomposition = pytest.importorskip("tensorly.decomposition")

from lotrtensor.tensorly import from_tensorly, to_tensorly  # noqa: E402

sizes = st.integers(1, 6)


@given(sizes=st.tuples(*[sizes] * 5), seed=seeds)
def test_there_and_back_is_exact(sizes, seed):
    """Bit by bit; TensorLy's own reconstruction is ours."""
    slices, m, n, p, q = sizes
    rng = np.random.default_rng(seed)
    found = Tucker2(
        rng.standard_normal((m, p)),
        rng.standard_normal((slices, p, q)),
        rng.standard_normal((n, q)),
    )
    tensor = to_tensorly(found)
    assert tensor.shape == (slices, m, n)
    assert tensor.rank == (slices, p, q)
    back = from_tensorly(tensor)
    for a, b in ((back.left, found.left), (back.core, found.core), (back.right, found.right)):
        assert np.array_equal(a, b)
    dense = tensorly.tucker_to_tensor(tensor)
    assert dense == pytest.approx(found.to_dense(), abs=1e-12)


def test_partial_tucker_is_read():
    """Two factors, of the modes 1 and 2, as a plain pair or as TensorLy returns them."""
    tensor = make("decaying", 0, 7, 6, [3, 3, 3, 3]).dense()
    found = decomposition.partial_tucker(tensor, rank=[3, 2], modes=[1, 2], init="svd")[0]
    core, factors = found
    converted = from_tensorly((core, factors))
    assert converted.shape == (4, 7, 6)
    assert converted.rank == (3, 2)
    expected = np.einsum("kpq,mp,nq->kmn", core, *factors)
    assert converted.to_dense() == pytest.approx(expected, abs=1e-12)


def test_a_full_tucker_is_read():
    """A compressed first mode goes into the cores."""
    tensor = make("generic", 0, 7, 6, [3, 3, 3, 3]).dense()
    found = decomposition.tucker(tensor, rank=[2, 4, 3], init="svd")
    converted = from_tensorly(found)
    assert converted.shape == (4, 7, 6)
    assert converted.rank == (4, 3)
    assert converted.to_dense() == pytest.approx(tensorly.tucker_to_tensor(found), abs=1e-12)


def test_a_fit_is_what_tensorly_reconstructs():
    """The error that we report is the one that TensorLy measures."""
    case = make("generic", 1, 8, 7, [2, 2, 2])
    fit = tucker2(case.stack(), (3, 4))
    dense = tensorly.tucker_to_tensor(to_tensorly(fit.tucker2))
    error = tensorly.norm(case.dense() - dense) / tensorly.norm(case.dense())
    assert fit.relative_error == pytest.approx(float(error), rel=1e-9)


def test_in_any_library(xp):
    """The arrays themselves go through: no copy to NumPy, type kept."""
    fit = tucker2(xp.stack(make("generic", 1, 5, 4, [2, 2]), "float32"), 2).tucker2
    try:
        tensor = to_tensorly(fit)
    except (TypeError, AttributeError, ValueError):
        if xp.name == "strict":  # no backend of TensorLy's
            return
        raise
    back = from_tensorly(tensor)
    for a, b in ((back.left, fit.left), (back.core, fit.core), (back.right, fit.right)):
        assert xp.owns(a)
        assert a.dtype == xp.dtype("float32")
        assert np.array_equal(xp.numpy(a), xp.numpy(b))


@pytest.mark.parametrize(
    "tensor",
    [
        (np.ones((2, 2)), [np.ones((3, 2)), np.ones((3, 2))]),
        (np.ones((2, 2, 2, 2)), [np.ones((3, 2))] * 4),
        (np.ones((2, 2, 2)), [np.ones((3, 2))]),
        (np.ones((2, 2, 2)), [np.ones((3, 2))] * 4),
        (np.ones((2, 2, 2)), [np.ones((3, 2)), np.ones((3, 3))]),
        (np.ones((2, 2, 2)), [np.ones((4, 3)), np.ones((3, 2)), np.ones((3, 2))]),
    ],
    ids=["matrix", "fourth order", "one factor", "four factors", "unlike ranks", "unlike first"],
)
def test_what_is_no_tucker2_is_refused(tensor):
    """With a ShapeError, not one of NumPy's."""
    with pytest.raises(ShapeError):
        from_tensorly(tensor)


def test_tensorly_is_not_loaded_before_it_is_asked_for():
    """Nor is its global backend touched."""
    program = (
        "import sys, lotrtensor; assert 'tensorly' not in sys.modules;"
        "import tensorly; tensorly.set_backend('numpy'); before = tensorly.get_backend();"
        "import lotrtensor.tensorly; assert tensorly.get_backend() == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
