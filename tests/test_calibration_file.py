"""The file of a calibration: read as it was written, or refused in a sentence."""

import json

import numpy as np
import pytest

import lotrtensor as lt

SIDES = {"query": (20, 32), "key": (24, 32), "last": (5, 20)}


def moment(size, dtype="f4", rank=4):
    factor = np.random.default_rng(size).normal(size=(rank, size)).astype(dtype)
    return lt.Moment(factor, 1.5 * float(np.sum(factor.astype("f8") ** 2)))


@pytest.fixture
def calibration():
    inputs = {n: moment(n) for n in (20, 32)}
    modules = {name: lt.ModuleMoments(inputs[n], moment(m), 2.0) for name, (m, n) in SIDES.items()}
    return lt.Calibration(modules, places=640)


def test_it_is_read_as_it_was_written(calibration, tmp_path):
    calibration.save(tmp_path / "file")
    read = lt.Calibration.load(tmp_path / "file")
    assert read.places == 640 and set(read.modules) == set(SIDES)
    assert read.modules["query"].inputs is read.modules["key"].inputs
    for name, own in calibration.modules.items():
        np.testing.assert_array_equal(read.modules[name].outputs.factor, own.outputs.factor)
        assert read.modules[name].norm == own.norm


def test_moments_of_doubles_are_kept_in_single_precision(tmp_path):
    one = moment(8, "f8")
    lt.Calibration({"0": lt.ModuleMoments(one, one, 1.0)}, 10).save(tmp_path / "file")
    read = lt.Calibration.load(tmp_path / "file").modules["0"].inputs
    np.testing.assert_array_equal(read.factor, one.factor.astype("f4"))


@pytest.mark.parametrize(
    ("made", "places"),
    [
        (lt.Moment(np.full((2, 8), np.nan, "f4"), 3.0), 10),
        (lt.Moment(np.full((2, 8), 1e30), 3.0), 10),
        (lt.Moment(np.full((2, 8), 1e60), 3.0), 10),
        (lt.Moment(np.ones((9, 8), "f4"), 100.0), 10),
        (lt.Moment(np.ones(8, "f4"), 100.0), 10),
        (lt.Moment(np.eye(2, 8), 1.0), 10),
        (lt.Moment(np.eye(2, 8), float("inf")), 10),
        (lt.Moment(np.eye(2, 8), 0.0), 10),
        (lt.Moment(np.eye(2, 8), 3.0), 0),
        (lt.Moment(np.eye(2, 8), 3.0), 1.5),
    ],
)
def test_what_could_not_be_read_is_not_written(made, places, tmp_path):
    with pytest.raises(lt.DataError, match="the calibration cannot be stored"):
        lt.Calibration({"0": lt.ModuleMoments(made, made, 1.0)}, places).save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\ud800", 3])
def test_names_that_could_not_be_read_are_not_written(name, tmp_path):
    calibration = lt.Calibration({name: lt.ModuleMoments(moment(8), moment(8), 1.0)}, 10)
    if name == 3:  # JSON has it as text
        calibration.save(tmp_path / "file")
        assert list(lt.Calibration.load(tmp_path / "file").modules) == ["3"]
    else:
        with pytest.raises(lt.DataError, match=r"cannot be stored: .*half a character"):
            calibration.save(tmp_path / "file")
        assert not list(tmp_path.iterdir())


def test_rows_of_unlike_length_are_refused(tmp_path):
    ragged = lt.Moment([[1.0, 2.0], [3.0]], 20.0)
    with pytest.raises(lt.DataError, match="cannot be stored"):
        lt.Calibration({"0": lt.ModuleMoments(ragged, ragged, 1.0)}, 10).save(tmp_path / "file")


def damaged(path, change=dict, factor=None):
    """Write the file anew with its metadata changed, or another matrix for every moment."""
    from safetensors.numpy import load_file, save_file

    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    metadata.pop("lotr_crc32")
    tensors = {key: x if factor is None else factor for key, x in load_file(path).items()}
    save_file(tensors, path, change(metadata))


def told(field, value):
    """Metadata in which a number of the first module is another."""

    def change(metadata):
        record = json.loads(metadata["modules"])
        place = record["query"] if field == "norm" else record["query"]["inputs"]
        place[field] = value
        return metadata | {"modules": json.dumps(record)}

    return change


HOSTILE = [
    *(("trace", value) for value in (True, "1.0", -1.0, 5e-324, 1e-12, 1e308, 10**400)),
    *(("norm", value) for value in (-1.0, 1e200, 10**400, None)),
    ("key", "none"),
]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        *((told(field, value), "damaged") for field, value in HOSTILE),
        (lambda m: {"format": "pt"}, "is no calibration"),
        (lambda m: m | {"version": "9"}, "version '9'"),
        (lambda m: m | {"modules": "[]"}, "damaged"),
        (lambda m: m | {"modules": "{"}, "JSON"),
        (lambda m: m | {"modules": '{"query": {"inputs": {"key": "x", "trace": 1}}}'}, "damaged"),
        (lambda m: m | {"places": "many"}, "damaged"),
        (lambda m: m | {"places": "-5"}, "damaged"),
    ],
)
def test_a_damaged_file_is_refused(change, text, calibration, tmp_path):
    path = tmp_path / "calibration"
    calibration.save(path)
    damaged(path, change)
    with pytest.raises(lt.FormatError, match=text):
        lt.Calibration.load(path)


@pytest.mark.parametrize(
    "factor", [np.ones(4, "f4"), np.ones((3, 2), "f4"), np.ones((1, 32), "f8")]
)
def test_a_moment_that_is_none_is_refused(factor, calibration, tmp_path):
    path = tmp_path / "calibration"
    calibration.save(path)
    damaged(path, factor=factor)
    with pytest.raises(lt.FormatError, match="is no moment"):
        lt.Calibration.load(path)


def test_a_truncated_file_is_refused(calibration, tmp_path):
    path = tmp_path / "calibration"
    calibration.save(path)
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(lt.FormatError):
            lt.Calibration.load(path)


def test_no_file_is_refused(tmp_path):
    with pytest.raises(lt.FormatError, match="does not exist"):
        lt.Calibration.load(tmp_path / "none")
