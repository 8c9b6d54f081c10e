"""Packs byte by byte: a golden directory, and a decoder written from the page alone."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from compressed_fixtures import codes, terms
from lotrtensor.adapters.compressed_group import CompressedGroup, SourceRecord
from lotrtensor.core.bits.basis import QuantisedBasis
from lotrtensor.core.bits.stack import QuantisedStack
from lotrtensor.packs.coding import cells_to_tensors, member_to_tensors
from lotrtensor.packs.files import Entry, Index, publish, write_shard
from lotrtensor.packs.members import Cell, Member
from pack_decoder import read_adapter
from pack_fixtures import contents, dense, family

GOLDEN = Path(__file__).parent / "golden" / "pack-v1"
UPDATES = GOLDEN.parent / "pack-v1-updates.safetensors"
"""ΔW of every module of both adapters in float64, computed once from the codes below."""

M, N = 7, 5


def own_part(names, ranks, shape=(M, N)):
    """Private terms of modules, of these ranks."""
    group = CompressedGroup(
        name="query",
        modules=names,
        shape=shape,
        slice_ranks=(3,) * len(names),
        stack=QuantisedStack(None, tuple(terms(shape, r, 2 + r, 3) for r in ranks)),
        relative_error=0.25,
        norm=2.0,
    )
    config = {"base_model_name_or_path": "org/model", "modules_to_save": ["classifier"]}
    extras = {"base_model.model.classifier.bias": np.array([0.5, -1.0], dtype="float32")}
    source = SourceRecord(np.dtype("float16"), 100, 200)
    return lt.CompressedAdapter((group,), config, source, extras)


def write_golden(path):
    """Two cells, one of a single module and one of two; an adapter on them, and one by itself."""
    cells = (
        Cell(("layer.0.query",), (M, N), QuantisedBasis(
            codes(M, 2, 1, 3), codes(N, 3, 4, 5), codes(2, 3, 7, 9), 0.0625, 4)),
        Cell(("layer.1.query", "layer.2.query"), (M, N), QuantisedBasis(
            codes(M, 1, 5, 300), codes(N, 2, 6, 2), codes(1, 2, 8, 2000), 0.03125, 6)),
    )  # fmt: skip
    names = tuple(f"layer.{i}.query" for i in range(3))
    by_module = {name: cell for cell in cells for name in cell.modules}
    cores = {
        name: codes(p, q, 10 + i, 4)
        for i, name in enumerate(names)
        for p, q in [by_module[name].basis.rank]
    }
    members = {
        "on bases": Member(own_part(names, (1, 0, 2)), cores, 2.0, 0.125, by_module),
        "by itself": Member(own_part(names[:2], (2, 1))),
    }
    path.mkdir()
    shard = write_shard(path, "cells", 1, cells_to_tensors(cells))
    tensors, entries = {}, {}
    for number, (name, member) in enumerate(members.items(), 1):
        own = member_to_tensors(member, cells)
        tensors |= {f"{number}.{key}": tensor for key, tensor in own.items()}
        entries[name] = Entry("adapters-00002.safetensors", number, 0.25, 0.5, 900, number == 1)
    adapters = write_shard(path, "adapters", 2, tensors)
    publish(path, Index((shard,), (adapters,), entries, 3, {"tolerance": 0.25}, "auto"))
    return members


def check_equal(found, expected):
    """The same modules, and the same numbers but for the order of sums."""
    assert set(found) == set(expected)
    for name in expected:
        atol = 1e-13 * max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol)


def golden_updates(name):
    every = safetensors.numpy.load_file(UPDATES)
    return {k.partition("/")[2]: x for k, x in every.items() if k.partition("/")[0] == name}


def test_the_golden_pack_is_written_byte_by_byte(tmp_path):
    write_golden(tmp_path / "pack")
    assert contents(tmp_path / "pack") == contents(GOLDEN)


@pytest.mark.parametrize("name", ["on bases", "by itself"])
def test_the_golden_pack_is_read(name):
    pack = lt.Pack(GOLDEN)
    pack.check()
    member = pack.member(name)
    check_equal(dense(member.updates()), golden_updates(name))
    check_equal(read_adapter(GOLDEN, name), golden_updates(name))
    assert member.own.config["base_model_name_or_path"] == "org/model"
    (bias,) = member.own.extras.values()
    np.testing.assert_array_equal(bias, np.array([0.5, -1.0], np.float32))
    assert pack.row(name) == (name, 0.25, 0.5, 900, name == "on bases")


@pytest.mark.parametrize("share", ["auto", "both", "layers"])
def test_another_decoder_reads_the_same(tmp_path, share):
    made = lt.pack(family(4), tmp_path / "pack", tolerance=0.1, share=share)
    for name in made.names:
        check_equal(read_adapter(tmp_path / "pack", name), dense(made.member(name).updates()))


def test_the_page_shows_the_decoder_and_every_field():
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text("utf-8")
    assert "{literalinclude} ../tests/pack_decoder.py" in page
    section = page[page.index("## Packs") : page.index("## PEFT LoRA")]
    told = set(re.findall(r"^\| `([\w.<>]+)` \|", section, re.MULTILINE))
    index = json.loads((GOLDEN / "lotr_pack.json").read_text("utf-8"))
    cells = safetensors.numpy.load_file(GOLDEN / "cells-00001.safetensors")
    adapters = safetensors.numpy.load_file(GOLDEN / "adapters-00002.safetensors")
    record = json.loads(zlib.decompress(cells["lotr_cells"].tobytes()))[0]
    assert set(index) | set(index["shards"][0]) | set(cells) | set(record) <= told
    own = {key.partition(".")[2] for key in adapters if not key.partition(".")[2].startswith("car")}
    assert {f"<number>.{key}" for key in own} <= told


def damage(path, change):
    """A copy of the golden pack with one file changed."""
    shutil.copytree(GOLDEN, path)
    file, edit = change
    content = (path / file).read_bytes()
    (path / file).write_bytes(edit(content))
    return path


CELLS, ADAPTERS, INDEX = "cells-00001.safetensors", "adapters-00002.safetensors", "lotr_pack.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((CELLS, lambda x: x[:-3]), "cells-00001.safetensors has .* bytes, and the index says"),
        ((ADAPTERS, lambda x: x[:-3]), "adapters-00002.safetensors has .* bytes"),
        ((CELLS, lambda x: x[:-1] + bytes([x[-1] ^ 255])), "SHA-256"),
        ((INDEX, lambda x: x.replace(b'"format_version":1', b'"format_version":2')), "update"),
        ((INDEX, lambda x: x.replace(b'"lotr-pack"', b'"other"')), "update lotrtensor"),
        ((INDEX, lambda x: x[:50]), "cannot be read as JSON"),
        ((INDEX, lambda x: x.replace(b'"cells-', b'"../cells-')), "damaged"),
        ((INDEX, lambda x: x.replace(b"[0,1,", b"[7,1,")), "damaged"),
        ((INDEX, lambda x: x.replace(b"[0,1,", b"[0,9,")), "coded is missing"),
        ((INDEX, lambda x: x.replace(b'"next":3', b'"next":"x"')), "damaged"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_damage_is_told_by_name(tmp_path, change, says):
    path = damage(tmp_path / "pack", change)
    with pytest.raises(lt.FormatError, match=says):
        lt.Pack(path).check()


@pytest.mark.parametrize("file", [CELLS, ADAPTERS])
def test_a_missing_shard_is_told_by_name(tmp_path, file):
    path = damage(tmp_path / "pack", (INDEX, lambda x: x))
    (path / file).unlink()
    with pytest.raises(lt.FormatError, match=f"{file} is missing"):
        lt.Pack(path).check()


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_byte_is_never_taken_for_another_number(tmp_path, seed):
    """Without the digests: a shard of the right size decodes to something, or is refused."""
    rng = np.random.default_rng(seed)
    file = (CELLS, ADAPTERS)[seed % 2]

    def flip(content):
        place = int(rng.integers(len(content)))
        other = bytes([content[place] ^ int(rng.integers(1, 256))])
        return content[:place] + other + content[place + 1 :]

    path = damage(tmp_path / "pack", (file, flip))
    with pytest.raises(lt.FormatError, match=f"{file}"):
        lt.Pack(path).check()
    for name in ("on bases", "by itself"):
        try:
            lt.Pack(path).member(name).updates()
        except lt.LotrError as error:
            assert "\n" not in str(error)
