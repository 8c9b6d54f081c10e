"""Format version 2, byte by byte: a golden directory, and a decoder written from the page alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from adapters_fixtures import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    edit_config,
    snapshot,
    with_checksums,
    write_lora,
)
from compressed_decoder import read_updates
from compressed_fixtures import codes, dense_updates, terms
from lotrtensor.adapters.compressed_group import CompressedGroup, SourceRecord
from lotrtensor.adapters.formats.coded_row import from_row
from lotrtensor.core.bits.shared import QuantisedTucker2
from lotrtensor.core.bits.stack import QuantisedStack
from lotrtensor.core.bits.terms import QuantisedTerms

GOLDEN = Path(__file__).parent / "golden" / "compressed-v2"
UPDATES = GOLDEN.parent / "compressed-v2-updates.safetensors"
"""ΔW of every module in float64, computed once from the codes below."""


def golden_adapter():
    """Both parts and a slice without terms; an embedding of large codes; a carried tensor."""
    m, n, layers = 7, 5, 3
    shared = QuantisedTucker2(
        codes(m, 2, 1, 3), codes(layers, 6, 9, 2).reshape(layers, 2, 3), codes(n, 3, 4, 5), 0.03125
    )
    private = (terms((m, n), 1, 2, 1), QuantisedTerms.empty(m, n), terms((m, n), 2, 8, 40))
    query = CompressedGroup(
        name="query",
        modules=tuple(f"layer.{i}.query" for i in range(layers)),
        shape=(m, n),
        slice_ranks=(3, 2, 4),
        stack=QuantisedStack(shared, private),
        relative_error=0.25,
        norm=8.0,
    )
    words = CompressedGroup(
        name="words",
        modules=("words",),
        shape=(4, 6),
        slice_ranks=(3,),
        stack=QuantisedStack(None, (terms((4, 6), 3, 3, 1000),)),
        relative_error=0.125,
        norm=2.0,
        embedding=True,
    )
    config = {"base_model_name_or_path": "org/model", "task_type": "SEQ_CLS",
              "modules_to_save": ["classifier"]}  # fmt: skip
    extras = {f"{PREFIX}classifier.bias": np.array([0.5, -1.0], dtype="float32")}
    source = SourceRecord(np.dtype("float16"), 100, 200)
    return lt.CompressedAdapter((query, words), config, source, extras)


def check_equal(found, expected):
    """The same modules, and the same numbers but for the order of sums."""
    assert set(found) == set(expected)
    for name in expected:
        atol = 1e-14 * max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol)


def test_the_golden_directory_is_written_byte_by_byte(tmp_path):
    golden_adapter().save(tmp_path / "out")
    expected = snapshot(GOLDEN)
    assert snapshot(tmp_path / "out") == expected | {WEIGHTS: with_checksums(expected[WEIGHTS])}
    assert set(snapshot(GOLDEN)) == {CONFIG, WEIGHTS}


def test_the_golden_directory_is_read():
    expected, found = golden_adapter(), lt.load(GOLDEN)
    assert isinstance(found, lt.CompressedAdapter)
    assert (found.config, found.source) == (expected.config, expected.source)
    for mine, other in zip(found.groups, expected.groups, strict=True):
        for field in ("name", "modules", "shape", "slice_ranks", "relative_error", "norm"):
            assert getattr(mine, field) == getattr(other, field)
        assert mine.embedding == other.embedding
    (bias,) = found.extras.values()
    np.testing.assert_array_equal(bias, np.array([0.5, -1.0], np.float32))


def test_the_numbers_of_the_golden_directory():
    expected = safetensors.numpy.load_file(UPDATES)
    check_equal(dense_updates(golden_adapter()), expected)
    check_equal({m.name: m.B @ m.A for m in lt.load(GOLDEN).updates()}, expected)
    check_equal(read_updates(GOLDEN), expected)


@pytest.mark.parametrize("form", ["auto", "lora", "lotr"])
@pytest.mark.parametrize("goal", [{"tolerance": 0.5}, {"tolerance": 0.001}])
def test_another_decoder_reads_the_same(tmp_path, form, goal):
    lora = lt.load(write_lora(tmp_path / "lora"))
    lt.compress(lora, form=form, **goal).save(tmp_path / "small")
    check_equal(read_updates(tmp_path / "small"), dense_updates(lt.load(tmp_path / "small")))


@pytest.mark.parametrize("form", ["lora", "lotr"])
def test_another_decoder_reads_the_bundled_adapter(tmp_path, form):
    lora = lt.load(Path(lt.__file__).parent / "data" / "amazon-sentiment")
    found = lt.compress(lora, budget="4%", form=form)
    found.save(tmp_path / "small")
    check_equal(read_updates(tmp_path / "small"), dense_updates(found))


def test_the_page_shows_the_decoder_and_every_field_of_the_index():
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text("utf-8")
    assert "{literalinclude} ../tests/compressed_decoder.py" in page
    section = page[page.index("## Compressed") : page.index("## PEFT LoRA")]
    tensors = safetensors.numpy.load_file(GOLDEN / WEIGHTS)
    index = from_row(tensors["lotr_coded"], "golden")[0].records
    fields = {key for group in index["groups"] for key in group} | set(index)
    told = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert fields | {key for key in tensors if key.startswith("lotr_")} <= told


@pytest.mark.parametrize("version", [0, 4, "2", None, True, 2.5])
def test_another_version_is_refused(tmp_path, version):
    golden_adapter().save(tmp_path / "small")
    edit_config(tmp_path / "small", format_version=version)
    with pytest.raises(lt.FormatError, match=f"format_version {version!r}.*reads 1 and 2"):
        lt.load(tmp_path / "small")


def test_the_reader_of_version_1_refuses_version_2():
    with pytest.raises(lt.FormatError, match="format_version 2"):
        lt.LotrAdapter.load(GOLDEN)
