"""lotr calibrate, lotr compress --calibration, and lotr heal, beside the library."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import lotrtensor as lt
from adapters_fixtures import assert_refused, lotr

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import lotrtensor.torch as lotr_torch  # noqa: E402
from lotrtensor.torch import texts  # noqa: E402
from tests.tiny_encoder import encoder_lora, write_encoder, write_texts  # noqa: E402


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop")
    write_encoder(path / "base")
    encoder_lora().save(path / "lora")
    write_texts(path / "texts.txt")
    return path


@pytest.fixture
def here(shop, monkeypatch):
    monkeypatch.chdir(shop)
    return shop


COMMON = ("--base", "base", "--text", "texts.txt")


def test_the_whole_job(here, tmp_path):
    calibration, small, healed = (tmp_path / name for name in ("calibration", "small", "healed"))
    done = lotr("calibrate", "lora", *COMMON, "-o", calibration)
    assert (done.code, done.err) == (0, "")
    assert "4 modules" in done.out
    done = lotr("compress", "lora", "-o", small, "--budget", "25%", "--calibration", calibration)
    assert (done.code, done.err) == (0, "")
    assert "error in the calibration's metric" in " ".join(done.out.split())
    done = lotr("heal", small, "lora", *COMMON, "-o", healed, "--json")
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["distance_after"] < told["distance_before"]
    assert told["file_bytes"] == lt.load(healed).file_bytes
    assert lt.compare(lt.load("lora"), lt.load(healed)).relative_error == pytest.approx(
        told["relative_error"], rel=1e-3
    )


def test_the_command_measures_what_the_library_does(here, tmp_path):
    lora = lt.load("lora")
    assert lotr("calibrate", "lora", *COMMON, "-o", tmp_path / "found").code == 0
    model = texts.base_model(here / "base", lora)
    options = {"length": 512, "batch": 8}
    batches = texts.text_batches(model, here / "base", here / "texts.txt", **options)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(
        len(line.split()) for line in (here / "texts.txt").read_text().splitlines()
    )
    expected = lotr_torch.calibrate(model, lora, batches)
    found = lt.Calibration.load(tmp_path / "found")
    assert found.places == expected.places
    for name, module in expected.modules.items():
        np.testing.assert_array_equal(found.modules[name].inputs.factor, module.inputs.factor)


def test_a_json_document(here, tmp_path):
    done = lotr("calibrate", "lora", *COMMON, "-o", tmp_path / "found", "--json")
    assert json.loads(done.out)["modules"] == 4


def test_a_head_that_the_adapter_carries_is_loaded(here, tmp_path):
    """A classifier's head is in the adapter's file, not in the base model's."""
    rng = np.random.default_rng(0)
    key = "base_model.model.classifier"
    head = {f"{key}.weight": rng.normal(size=(3, 32)).astype("f4"), f"{key}.bias": np.ones(3, "f4")}
    lora = encoder_lora("SEQ_CLS")
    modules = [lt.LoraModule(f"bert.{m.name}", m.B, m.A) for m in lora.modules]
    config = dict(lora.config) | {"modules_to_save": ["classifier"]}
    lt.LoraAdapter(tuple(modules), config, lora.dtype, head).save(tmp_path / "lora")
    model = texts.base_model(here / "base", lt.load(tmp_path / "lora"))
    np.testing.assert_array_equal(model.classifier.weight.detach().numpy(), head[f"{key}.weight"])
    done = lotr("calibrate", tmp_path / "lora", *COMMON, "-o", tmp_path / "found")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--base", "nowhere", "--text", "texts.txt"), ["nowhere is no directory"]),
        (("--base", "lora", "--text", "texts.txt"), ["lora cannot be loaded as AutoModel"]),
        (("--base", "base", "--text", "nowhere"), ["nowhere"]),
        (("--base", "base", "--text", "empty"), ["empty holds no text"]),
        (("--base", "base", "--text", "binary"), ["binary is no UTF-8 text"]),
        (("--base", "base", "--text", "base"), ["base"]),
    ],
)
def test_bad_input_gets_one_sentence(args, words, here, tmp_path):
    (here / "empty").write_text("\n \n")
    (here / "binary").write_bytes(b"\xff\xfe\x00")
    assert_refused(lotr("calibrate", "lora", *args, "-o", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(here, tmp_path):
    lora = encoder_lora()
    renamed = tuple(lt.LoraModule(f"decoder.{m.name}", m.B, m.A) for m in lora.modules)
    lt.LoraAdapter(renamed, lora.config, lora.dtype).save(tmp_path / "other")
    found = lotr("calibrate", tmp_path / "other", *COMMON, "-o", tmp_path / "out")
    assert_refused(found, "the model has no decoder.encoder.layer.0")


def test_too_few_tokens_are_told(here, tmp_path):
    write_texts(here / "few.txt", 4)
    args = ("--base", "base", "--text", "few.txt", "-o", tmp_path / "out")
    done = lotr("calibrate", "lora", *args)
    assert done.code == 0
    assert "places of inputs were seen" in " ".join(done.err.split())


def test_what_is_not_compressed_is_not_healed(here, tmp_path):
    assert_refused(
        lotr("heal", "lora", "lora", *COMMON, "-o", tmp_path / "out"), "no compressed adapter"
    )
    lt.compress(lt.load("lora"), budget="40%").save(tmp_path / "small")
    assert_refused(
        lotr("heal", tmp_path / "small", tmp_path / "small", *COMMON, "-o", tmp_path / "out"),
        "expected the adapter before",
    )


def test_a_file_of_what_is_read_is_not_replaced(here):
    for path in ("base/model.safetensors", "lora/adapter_model.safetensors"):
        before = (here / path).read_bytes()
        found = lotr("calibrate", "lora", *COMMON, "-o", path, "--force")
        assert_refused(found, path, "which is read")
        assert (here / path).read_bytes() == before


def test_a_head_that_is_nowhere_is_refused(here, tmp_path):
    lora = encoder_lora("SEQ_CLS")
    modules = tuple(lt.LoraModule(f"bert.{m.name}", m.B, m.A) for m in lora.modules)
    lt.LoraAdapter(modules, lora.config, lora.dtype).save(tmp_path / "lora")
    found = lotr("calibrate", tmp_path / "lora", *COMMON, "-o", tmp_path / "found")
    assert_refused(found, "base has no classifier", "random numbers")


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "QUESTION_ANS"])
def test_tasks_of_more_than_a_text_are_refused(task, here, tmp_path):
    encoder_lora(task).save(tmp_path / "lora")
    found = lotr("calibrate", tmp_path / "lora", *COMMON, "-o", tmp_path / "found")
    assert_refused(found, "more than a text")


def test_long_lines_are_cut_to_what_the_model_takes(here, tmp_path):
    (here / "long.txt").write_text("\n".join(["word1 " * 50] * 20))
    args = ("--base", "base", "--text", "long.txt", "-o", tmp_path / "found")
    done = lotr("calibrate", "lora", *args)
    assert (done.code, done.err) == (0, "")
    assert lt.Calibration.load(tmp_path / "found").places == 20 * 32


def test_too_few_lines_to_heal(here, tmp_path):
    write_texts(here / "few.txt", 20)
    lt.compress(lt.load("lora"), budget="40%").save(tmp_path / "small")
    args = ("--base", "base", "--text", "few.txt", "-o", tmp_path / "out")
    assert_refused(lotr("heal", tmp_path / "small", "lora", *args), "smaller --batch")


def test_a_damaged_base_is_refused(here, tmp_path):
    shutil.copytree(here / "base", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    args = ("--base", tmp_path / "base", "--text", "texts.txt", "-o", tmp_path / "out")
    assert_refused(lotr("calibrate", "lora", *args), "cannot be loaded as AutoModel")


def test_an_output_that_stands_is_kept(here, tmp_path):
    (tmp_path / "out").write_text("mine")
    found = lotr("calibrate", "lora", *COMMON, "-o", tmp_path / "out")
    assert_refused(found, "exists")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_input_is_not_replaced(here):
    before = (here / "texts.txt").read_text()
    found = lotr("calibrate", "lora", *COMMON, "-o", "texts.txt", "--force")
    assert_refused(found, "texts.txt")
    assert (here / "texts.txt").read_text() == before
