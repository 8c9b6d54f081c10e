"""What a user passes: a public function gives a result or one of our errors."""

import inspect
import warnings

import numpy as np
import pytest

import lotrtensor as lt
from lotrtensor import core
from lotrtensor.adapters.modules import LoraModule
from tests.strategies import make

CASE = make("generic", 0, 7, 6, [2, 3, 2])
STACK = CASE.stack()
MODULES = tuple(
    LoraModule(f"layers.{k}.proj", b, a)
    for k, (b, a) in enumerate(zip(CASE.B, CASE.A, strict=True))
)
ADAPTER = lt.LoraAdapter(MODULES, {}, np.dtype(np.float64))
TUCKER2 = lt.tucker2(STACK, 3).tucker2

JUNK = [
    None,
    True,
    0,
    -1,
    2.5,
    float("nan"),
    1 + 1j,
    "no such thing",
    b"bytes",
    "",
    [],
    (),
    {},
    [None],
    [1, 2],
    ["a", "b"],
    (STACK, STACK),
    object(),
    int,
    len,
    np.zeros(3),
    np.zeros((2, 0, 3)),
    np.array("text"),
    np.ones((2, 2, 2), int),
    STACK,
    TUCKER2,
    ADAPTER,
]

RIGHT = {
    lt.tucker2: {"stack": STACK, "rank": 2},
    lt.rate_distortion: {"stack": STACK},
    lt.cluster: {"stack": STACK, "clusters": 2, "rank": 1},
    lt.as_stack: {"slices": STACK},
    lt.inner: {"a": STACK, "b": STACK},
    lt.norm: {"a": STACK},
    lt.cosine_similarity: {"a": STACK, "b": STACK},
    lt.principal_angles: {"a": TUCKER2.left, "b": TUCKER2.left},
    lt.subspace_overlap: {"a": TUCKER2.left, "b": TUCKER2.left},
    lt.convert: {"adapter": ADAPTER, "rank": 2},
    lt.compress: {"adapter": ADAPTER, "tolerance": 0.3},
    lt.truncate: {"adapter": ADAPTER, "rank": 1},
    lt.compare: {"a": ADAPTER, "b": ADAPTER},
    lt.analyze: {"adapter": ADAPTER},
    lt.similarity: {"adapters": [ADAPTER]},
    core.hosvd: {"stack": STACK},
    core.st_hosvd: {"stack": STACK, "rank": 2},
    core.hooi: {"stack": STACK, "rank": 2},
    core.truncate_tucker2: {"tucker2": TUCKER2, "rank": 2},
    lt.LowRankStack: {"B": CASE.B, "A": CASE.A},
    lt.DenseStack: {"slices": CASE.dense()},
    lt.Tucker2: {"left": TUCKER2.left, "core": TUCKER2.core, "right": TUCKER2.right},
}
"""Functions and arguments that they take; all on values. Those of files have tests of their own."""

CALLS = [
    (function, name)
    for function in RIGHT
    for name, parameter in inspect.signature(function).parameters.items()
    if name != "progress" and parameter.kind is not parameter.VAR_KEYWORD
]
OF_FILES = {lt.load, lt.extract, lt.extraction_error, lt.merge}


def test_every_public_function_is_tried():
    functions = {getattr(lt, n) for n in lt.__all__ if inspect.isfunction(getattr(lt, n))}
    assert functions | {getattr(core, n) for n in core.__all__} == (
        {f for f in RIGHT if inspect.isfunction(f)} | OF_FILES
    )


@pytest.mark.parametrize("function", RIGHT, ids=lambda f: f.__name__)
def test_what_is_right_is_taken(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.LotrWarning)
        assert function(**RIGHT[function]) is not None


@pytest.mark.parametrize(("function", "name"), CALLS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_whatever_is_passed_there_is_a_result_or_an_error_of_ours(function, name):
    for junk in JUNK:
        given = RIGHT[function] | {name: junk}
        try:
            function(**given)
        except lt.LotrError as error:
            assert str(error), (function, name, junk)
            assert "\n" not in str(error)
