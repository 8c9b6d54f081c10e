"""lotr calibrate, lotr compress --calibration, and lotr heal, beside the library."""

from __future__ import annotations

import json

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
    done = lotr("compress", "lora", "-o", small, "--budget", "40%", "--calibration", calibration)
    assert (done.code, done.err) == (0, "")
    assert "error in the calibration's metric" in " ".join(done.out.split())
    done = lotr("heal", small, "lora", *COMMON, "-o", healed, "--json")
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["distance_after"] <= told["distance_before"]
    assert told["file_bytes"] == lt.load(healed).file_bytes
    assert lt.compare(lt.load("lora"), lt.load(healed)).relative_error == pytest.approx(
        told["relative_error"], rel=1e-3
    )


def test_the_command_measures_what_the_library_does(here, tmp_path):
    lora = lt.load("lora")
    assert lotr("calibrate", "lora", *COMMON, "-o", tmp_path / "found").code == 0
    model = texts.base_model(here / "base", lora)
    options = {"length": 512, "batch": 8, "device": torch.device("cpu")}
    batches = texts.text_batches(here / "base", here / "texts.txt", **options)
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
