"""A merged checkpoint appears whole or not at all, and replaces nothing that is read."""

import json
import shutil

import pytest

from lotrtensor import (
    FormatError,
    merge,
)
from lotrtensor.adapters.formats import publish
from tests.adapters_fixtures import (
    assert_refused,
    bert_pairs,
    lotr,
    lotr_process,
    nth_call,
    snapshot,
    write_lora,
)
from tests.checkpoint_fixtures import (
    full,
    model,
    pair,
    read,
    tune,
    write,
)

unconverged = pytest.mark.filterwarnings("ignore:.*did not converge:lotrtensor.errors.LotrWarning")


# ---------------------------------------------------------------- the output


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("stands", [False, True])
def test_the_output_appears_whole_or_not_at_all(tmp_path, monkeypatch, number, stands):
    """A disk that fills up at any of four files leaves what was there, and nothing beside it."""
    base_dir, _, _, _ = pair(tmp_path, rank=2, shards=3)
    adapter, out = full(tmp_path), tmp_path / "merged"
    if stands:
        write(out, model(seed=9))
    before = snapshot(tmp_path)
    failing = nth_call(shutil.copyfileobj, number, OSError(28, "No space left on device"))
    monkeypatch.setattr(shutil, "copyfileobj", failing)
    with pytest.raises(FormatError, match="No space left"):
        merge(base_dir, adapter, out, force=True)
    assert snapshot(tmp_path) == before
    merge(base_dir, adapter, out, force=True)
    assert read(out)[0].keys() == model().keys()


@pytest.mark.parametrize("command", ["merge", "extract"])
def test_no_room_for_the_output(tmp_path, command):
    """The operating system refuses to write that much: one sentence, and nothing is left."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    full(tmp_path).save(tmp_path / "adapter")
    before = snapshot(tmp_path)
    arguments = {
        "merge": [tmp_path / "adapter", "--base", base_dir],
        "extract": ["--base", base_dir, "--tuned", tuned_dir, "--rank", 4],
    }
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    found = lotr_process(command, *arguments[command], "-o", tmp_path / "out", prelude=limit)
    assert_refused(found, "out", "cannot be written")
    assert snapshot(tmp_path) == before


def test_a_failed_rename_restores_what_stood_there(tmp_path, monkeypatch):
    """The old checkpoint is moved back."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    adapter, out = full(tmp_path), tmp_path / "merged"
    write(out, model(seed=9))
    before = snapshot(tmp_path)
    path_type = type(out)
    monkeypatch.setattr(publish, "renameat2", lambda *_: False)  # a system without an exchange
    failing = nth_call(path_type.rename, 2, OSError(5, "Input/output error"))
    monkeypatch.setattr(path_type, "rename", failing)
    with pytest.raises(FormatError, match="cannot be written"):
        merge(base_dir, adapter, out, force=True)
    assert snapshot(tmp_path) == before


def test_outputs_that_stand_there(tmp_path):
    """Refused without --force; with it only a checkpoint is replaced, whole."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    full(tmp_path).save(tmp_path / "adapter")
    command = ["merge", tmp_path / "adapter", "--base", base_dir, "-o"]
    out = write(tmp_path / "out", model(seed=9), shards=2)
    assert_refused(lotr(*command, out), "exists", "--force")
    assert lotr(*command, out, "--force").code == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years")
    assert_refused(lotr(*command, tmp_path / "thesis", "--force"), "no checkpoint")
    (tmp_path / "file").write_text("x")
    assert_refused(lotr(*command, tmp_path / "file", "--force"), "file")
    assert (tmp_path / "thesis" / "draft.txt").read_text() == "years"


@pytest.mark.parametrize("spelling", ["base", "./base", "base/../base", "link"])
def test_the_base_is_no_output(tmp_path, monkeypatch, spelling):
    """However it is spelled, --force or not."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    full(tmp_path).save(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(base_dir)
    before = snapshot(base_dir)
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--force"]):
        found = lotr("merge", "adapter", "--base", "base", "-o", spelling, *more)
        assert_refused(found)
    assert snapshot(base_dir) == before
    assert (tmp_path / "link").is_symlink()


def test_an_output_that_holds_the_base_is_refused(tmp_path):
    """Replacing it would delete the base."""
    outer = write(tmp_path / "outer", model(seed=9))
    base_dir = write(outer / "base", model())
    write(tmp_path / "base", model())
    write(tmp_path / "tuned", tune(model(), rank=2))
    adapter = full(tmp_path)
    before = snapshot(base_dir)
    with pytest.raises(FormatError):
        merge(base_dir, adapter, outer, force=True)
    assert snapshot(base_dir) == before


def test_weights_of_other_forms_are_not_copied(tmp_path):
    """They would be the base's, beside the merged ones; the rest is, of a directory only."""
    base_dir, _, base, _ = pair(tmp_path, rank=2)
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "spiece.model",
    ):
        (base_dir / name).write_text("x")
    adapter = full(tmp_path)
    merge(base_dir, adapter, tmp_path / "merged")
    kept = ["config.json", "model.safetensors", "spiece.model"]
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == kept
    merge(base_dir / "model.safetensors", adapter, tmp_path / "single")
    assert [p.name for p in (tmp_path / "single").iterdir()] == ["model.safetensors"]
    assert read(tmp_path / "single")[0].keys() == base.keys()


def test_the_modules_of_a_sentence_encoder_are_copied(tmp_path):
    """Pooling and dense layers have directories of their own; no path leads elsewhere."""
    base_dir, _, _, _ = pair(tmp_path, rank=2)
    paths = ["", "1_Pooling", "2_Dense", "../tuned", "absent"]
    (base_dir / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    for name in ("1_Pooling", "2_Dense", "onnx"):
        (base_dir / name).mkdir()
        (base_dir / name / "config.json").write_text(name)
    merge(base_dir, full(tmp_path), tmp_path / "merged")
    found = snapshot(tmp_path / "merged")
    assert found["2_Dense/config.json"] == b"2_Dense"
    assert {name for name, x in found.items() if x == b"(directory)"} == {"1_Pooling", "2_Dense"}
    for text in ("{", "[1]", "3", '[{"name": "x"}]'):
        (base_dir / "modules.json").write_text(text)
        with pytest.raises(FormatError, match=r"modules\.json"):
            merge(base_dir, full(tmp_path), tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_outputs_that_hold_an_input_are_refused(tmp_path):
    """The adapter that is merged, and the checkpoints that are compared, are not replaced."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    out = write(tmp_path / "out", model(seed=9))
    full(tmp_path).save(out / "adapter")
    assert_refused(
        lotr("merge", out / "adapter", "--base", base_dir, "-o", out, "--force"), "adapter"
    )
    outer = write_lora(tmp_path / "outer", bert_pairs(1))
    shutil.copytree(base_dir, outer / "base")
    options = ["--base", outer / "base", "--tuned", tuned_dir, "--rank", 2, "-o", outer, "--force"]
    assert_refused(lotr("extract", *options), "outer/base")
    assert read(outer / "base")[0]
