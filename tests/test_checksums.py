"""Every file carries a checksum of each tensor: a flipped bit is named, whichever it is."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lotrtensor as lt
from lotrtensor.adapters.integrity import check_files
from tests.adapters_fixtures import (
    INDEX,
    WEIGHTS,
    assert_refused,
    document,
    lotr,
    read_header,
    with_checksums,
    write_lora,
)

FORMS = ("lotr", "lora", "compressed", "image.safetensors")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One adapter in every form that is written."""
    path = tmp_path_factory.mktemp("outputs")
    extras = {"base_model.model.head.weight": np.ones((2, 3), np.float32)}
    source = lt.load(write_lora(path / "source", extras=extras, modules_to_save=["head"]))
    lt.convert(source, rank=3).save(path / "lotr")
    lt.truncate(source, rank=1).save(path / "lora")
    lt.compress(source, tolerance=0.3).save(path / "compressed")
    image = (lt.LoraModule("lora_unet_x", np.ones((4, 1), "f4"), np.ones((1, 4), "f4")),)
    adapter = lt.LoraAdapter(image, {}, np.dtype("float32"))
    adapter.save(path / "image.safetensors", file_format="kohya")
    return path


def weights(path):
    return path if path.is_file() else path / WEIGHTS


def copied(outputs, tmp_path, form):
    source, target = outputs / form, tmp_path / form
    (shutil.copyfile if source.is_file() else shutil.copytree)(source, target)
    return target


@pytest.mark.parametrize("form", FORMS)
def test_a_file_holds_the_checksums_that_the_page_describes(outputs, form):
    content = weights(outputs / form).read_bytes()
    header = read_header(weights(outputs / form))
    assert with_checksums(content) == content
    assert len(header["__metadata__"]["lotr_crc32"]) == 8 * (len(header) - 1)
    lt.load(outputs / form)  # without a warning
    (found,) = check_files(outputs / form)
    assert (found.tensors, found.checked, found.damaged) == (len(header) - 1, True, ())
    said = lotr("check", outputs / form)
    assert said.code == 0
    assert f"{len(header) - 1} tensors are as they were written" in said.out
    assert document("check", outputs / form)["files"][0]["tensors"] == len(header) - 1


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_of_any_tensor_is_named(outputs, tmp_path, form):
    path = copied(outputs, tmp_path, form)
    content = bytearray(weights(path).read_bytes())
    header = read_header(weights(path))
    start = 8 + int.from_bytes(content[:8], "little")
    for key, entry in header.items():
        if key == "__metadata__" or entry["data_offsets"][0] == entry["data_offsets"][1]:
            continue
        changed = bytearray(content)
        changed[start + entry["data_offsets"][0]] ^= 1  # the last digit of a number
        weights(path).write_bytes(changed)
        assert check_files(path)[0].damaged == (key,)
        assert_refused(lotr("check", path), key, "not as they were written")
        with pytest.warns(lt.LotrWarning, match="is not as it was written") as told:
            try:
                lt.load(path)
            except lt.LotrError:
                assert form == "compressed"  # codes that no decoder takes
        assert any(key in str(warning.message) for warning in told)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data(), form=st.sampled_from(FORMS))
def test_no_change_of_any_byte_is_taken_in_silence(outputs, tmp_path, data, form):
    """A change of the file is refused, warned of, or in a space between two words of the header."""
    path = tmp_path / form
    if not path.exists():
        copied(outputs, tmp_path, form)
    content = bytearray(weights(outputs / form).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    weights(path).write_bytes(content)
    before = read_header(weights(outputs / form))
    try:
        found = check_files(path)[0]
    except lt.LotrError:
        return
    if found.checked and not found.damaged:
        after = read_header(weights(path))
        del before["__metadata__"], after["__metadata__"]
        assert before == after


def test_files_of_others_are_read_in_silence_and_cannot_be_checked(outputs, tmp_path):
    path = write_lora(tmp_path / "x")
    lt.load(path)
    assert_refused(lotr("check", path), "holds no checksums")
    assert not check_files(path)[0].checked


def test_checksums_of_another_number_of_tensors(outputs, tmp_path):
    path = copied(outputs, tmp_path, "lora")
    content = weights(path).read_bytes()
    header = read_header(weights(path))
    text = header["__metadata__"]["lotr_crc32"]
    shorter = f'"{text[:-8]}"' + " " * 8
    weights(path).write_bytes(content.replace(f'"{text}"'.encode(), shorter.encode()))
    with pytest.warns(lt.LotrWarning, match="checksums of"):
        lt.load(path)


def test_shards_are_checked_one_by_one(outputs, tmp_path):
    path = copied(outputs, tmp_path, "lora")
    (path / WEIGHTS).rename(path / "a.safetensors")
    names = [key for key in read_header(path / "a.safetensors") if key != "__metadata__"]
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    assert [found.path.name for found in check_files(path)] == ["a.safetensors"]
    content = bytearray((path / "a.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "a.safetensors").write_bytes(content)
    with pytest.warns(lt.LotrWarning, match="is not as it was written"):
        lt.load(path)


@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_what_holds_no_tensors_cannot_be_checked(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "empty":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a file of tensors")
    assert_refused(lotr("check", path), "x")


def test_an_image_file_keeps_no_old_checksums(outputs, tmp_path):
    lt.load(outputs / "image.safetensors").save(tmp_path / "again.safetensors")
    lt.load(tmp_path / "again.safetensors")
    assert lotr("check", tmp_path / "again.safetensors").code == 0
