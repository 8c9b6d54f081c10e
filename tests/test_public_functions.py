"""What a user passes: a public function gives a result or one of our errors."""

import inspect
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

import lotrtensor as lt
from lotrtensor import core
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.tensorly import from_tensorly, to_tensorly
from tests.checkpoint_fixtures import model, tune, write
from tests.strategies import make

CASE = make("generic", 0, 7, 6, [2, 3, 2])
STACK = CASE.stack()
MODULES = tuple(
    LoraModule(f"layers.{k}.proj", b, a)
    for k, (b, a) in enumerate(zip(CASE.B, CASE.A, strict=True))
)
ADAPTER = lt.LoraAdapter(MODULES, {}, np.dtype(np.float64))
EXPERTS = lt.LoraAdapter(
    tuple(
        lt.LoraModule(f"mlp.experts.{k}.up_proj", m.B, m.A)
        for k, m in enumerate(MODULES)
        if m.shape == MODULES[0].shape
    ),
    {},
    np.dtype(np.float64),
)
LOTR = lt.convert(ADAPTER, rank=2)
SMALL = lt.compress(ADAPTER, tolerance=0.5)
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
    "a\0b",
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
    lt.shared_outer: {"adapter": EXPERTS, "rank": 1},
    lt.compare: {"a": ADAPTER, "b": ADAPTER},
    lt.analyze: {"adapter": ADAPTER},
    lt.similarity: {"adapters": [ADAPTER]},
    lt.analyze_collection: {"adapters": {"a": ADAPTER}, "threshold": 0.5, "same": 0.01},
    core.hosvd: {"stack": STACK},
    core.st_hosvd: {"stack": STACK, "rank": 2},
    core.hooi: {"stack": STACK, "rank": 2},
    core.truncate_tucker2: {"tucker2": TUCKER2, "rank": 2},
    lt.LowRankStack: {"B": CASE.B, "A": CASE.A},
    lt.DenseStack: {"slices": CASE.dense()},
    lt.LazyStack: {"read": CASE.dense().__getitem__, "shape": (3, 7, 6), "like": CASE.dense()},
    lt.Tucker2: {"left": TUCKER2.left, "core": TUCKER2.core, "right": TUCKER2.right},
    lt.Tucker2.astype: {"self": TUCKER2, "dtype": np.float32},
    lt.LowRankStack.take: {"self": STACK, "indices": [0, 2]},
    lt.LowRankStack.scaled: {"self": STACK, "weights": [1.0, 2.0, 3.0]},
    lt.LotrAdapter.to_lora: {"self": LOTR, "rank": 1},
    to_tensorly: {"tucker2": TUCKER2},
    from_tensorly: {"tensor": (TUCKER2.core, [TUCKER2.left, TUCKER2.right])},
}
"""Functions of values, and arguments that they take."""

PACK = lt.pack({"a": ADAPTER}, Path(tempfile.mkdtemp()) / "pack", tolerance=0.5)
BASE, TUNED = model(layers=1), tune(model(layers=1))
CHECKPOINTS = {"base": "base", "tuned": "tuned"}
RIGHT_FILES = {
    lt.load: {"path": "lora"},
    lt.LoraAdapter.load: {"path": "lora"},
    lt.LotrAdapter.load: {"directory": "lotr"},
    lt.CompressedAdapter.load: {"directory": "small"},
    lt.LoraAdapter.save: {"self": ADAPTER, "path": "out"},
    lt.LotrAdapter.save: {"self": LOTR, "directory": "out"},
    lt.CompressedAdapter.save: {"self": SMALL, "directory": "out"},
    lt.extract: CHECKPOINTS | {"rank": 1},
    lt.extraction_error: CHECKPOINTS | {"adapter": ADAPTER},
    lt.merge: {"base": "base", "adapter": ADAPTER, "output": "out"},
    lt.pack: {"adapters": {"a": ADAPTER}, "path": "out", "tolerance": 0.3},
    lt.refit: {"pack": PACK, "originals": {"a": ADAPTER}},
}
"""Functions of files, and arguments that they take in the directory that `files` fills."""


def calls(right):
    """Every function and each of its parameters."""
    return [
        (function, name)
        for function in right
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "progress") and parameter.kind is not parameter.VAR_KEYWORD
    ]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two checkpoints and two adapters in the working directory."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base", BASE)
    write(tmp_path / "tuned", TUNED)
    ADAPTER.save("lora")
    LOTR.save("lotr")
    SMALL.save("small")


def test_every_public_function_is_tried():
    public = {getattr(package, name) for package in (lt, core) for name in package.__all__}
    assert {f for f in public if inspect.isfunction(f)} <= (RIGHT | RIGHT_FILES).keys()


def name_of(value):
    """Name of a function, or of a parameter."""
    return getattr(value, "__qualname__", value)


@pytest.mark.parametrize("function", RIGHT, ids=name_of)
def test_what_is_right_is_taken(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.LotrWarning)
        assert function(**RIGHT[function]) is not None


@pytest.mark.parametrize("function", RIGHT_FILES, ids=name_of)
def test_the_right_files_are_taken(function, files):
    if function is lt.merge:
        with pytest.raises(lt.FormatError, match="no weight"):
            function(**RIGHT_FILES[function])
    else:
        function(**RIGHT_FILES[function])


@pytest.mark.parametrize(("function", "name"), calls(RIGHT), ids=name_of)
@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_whatever_is_passed_there_is_a_result_or_an_error_of_ours(function, name):
    try_junk(function, RIGHT[function], name)


@pytest.mark.parametrize(("function", "name"), calls(RIGHT_FILES), ids=name_of)
@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_whatever_is_passed_for_files_there_is_a_result_or_an_error_of_ours(function, name, files):
    try_junk(function, RIGHT_FILES[function], name)


def try_junk(function, right, name, values=JUNK):
    """Call the function with everything but the right thing for one of its parameters."""
    for junk in values:
        try:
            function(**right | {name: junk})
        except lt.LotrError as error:
            assert str(error), (function, name, junk)
            assert "\n" not in str(error)
        except Exception as error:
            pytest.fail(f"{name} = {junk!r} ends in {error!r}")
