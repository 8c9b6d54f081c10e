"""Loads of the PEFT method that fail: damaged and foreign files leave the model as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import PeftConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import lotrtensor as lt  # noqa: E402
from tests.peft_models import (  # noqa: E402
    THIRD_PARTY,
    bert,
    classifier,
    config,
    saved,
    trained,
)

pytestmark = [
    pytest.mark.filterwarnings(THIRD_PARTY),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit(path: Path, config_change=None, weights_change=None) -> Path:
    if config_change:
        record = json.loads((path / CONFIG).read_text())
        config_change(record)
        (path / CONFIG).write_text(json.dumps(record))
    if weights_change:
        tensors = load_file(path / WEIGHTS)
        weights_change(tensors)
        save_file(tensors, path / WEIGHTS)
    return path


def drop_core(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.encoder.layer.1.attention.self.query.lotr_core"]


def cut_factor(tensors: dict[str, torch.Tensor]) -> None:
    key = "base_model.lotr_left.attention.self.query"
    tensors[key] = tensors[key][:-1].contiguous()


def stray_factor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.lotr_left.nowhere"] = torch.zeros(2, 2)


def diverge(tensors: dict[str, torch.Tensor]) -> None:
    key = "base_model.model.encoder.layer.1.attention.self.query.lotr_core"
    tensors[key] = tensors[key] * float("nan")


DAMAGE = [
    (None, drop_core, lt.FormatError, r"layer\.1\.attention\.self\.query\.lotr_core is missing"),
    (None, cut_factor, lt.FormatError, r"lotr_left\.attention\.self\.query .*\(31, 3\)"),
    (None, stray_factor, lt.UnsupportedAdapterError, r"lotr_left\.nowhere"),
    (None, diverge, lt.DataError, r"query\.lotr_core holds NaN"),
    (lambda c: c.update(format_version=7), None, lt.FormatError, "format_version 7"),
    (lambda c: c["groups"][0].pop("rank"), None, lt.FormatError, "rank of a group is missing"),
    (
        lambda c: c["groups"][0]["modules"].append("encoder.layer.9.attention.self.query"),
        None,
        lt.FormatError,
        "slice_ranks of a group",
    ),
    (lambda c: c["groups"][0].update(shape=[32, 31]), None, lt.FormatError, r"expects \(31, 4\)"),
]


def same(model: nn.Module, state: dict[str, torch.Tensor], flags: list[bool]) -> bool:
    now = model.state_dict()
    return (
        list(now) == list(state)
        and all(torch.equal(now[k], state[k]) for k in now)
        and [p.requires_grad for p in model.parameters()] == flags
    )


@pytest.mark.parametrize(("config_change", "weights_change", "error", "message"), DAMAGE)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_failed_loads(
    tmp_path: Path, config_change, weights_change, error, message, low_cpu_mem_usage
) -> None:
    directory = edit(saved(tmp_path), config_change, weights_change)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    base = bert()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(base, directory, **options)
    assert same(base, state, flags)

    model = trained()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        model.load_adapter(directory, "second", **options)
    assert same(model, state, flags)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("damage", [drop_core, cut_factor, stray_factor])
def test_failed_loads_with_a_config_in_hand(tmp_path: Path, damage) -> None:
    """Then, as for a model hub's repository, the tensors come when the adapter is in its place."""
    directory = edit(saved(tmp_path), weights_change=damage)
    base = bert()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(lt.FormatError, match=r"lotr_"):
        PeftModel.from_pretrained(base, directory, config=PeftConfig.from_pretrained(directory))
    assert same(base, state, flags)


@pytest.mark.parametrize("keep", [None, 0, 100, -1])
def test_a_file_that_is_missing_or_cut_off(tmp_path: Path, keep: int | None) -> None:
    saved(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).unlink()
    if keep is not None:
        (tmp_path / WEIGHTS).write_bytes(content[:keep])
    model = trained()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    base = bert()
    plain = {k: v.clone() for k, v in base.state_dict().items()}
    message = "has no adapter_model" if keep is None else "damaged or incomplete"
    with pytest.raises(lt.FormatError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(lt.FormatError, match=message):
        model.load_adapter(tmp_path, "second")
    assert same(base, plain, [True] * len(list(base.parameters())))
    assert same(model, state, flags)


@pytest.mark.parametrize("lost", [False, True])
def test_a_head_of_another_size_is_refused(tmp_path: Path, lost: bool) -> None:
    get_peft_model(classifier(), config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    if lost:
        edit(tmp_path, weights_change=lambda t: t.pop("base_model.model.classifier.bias"))
    model = classifier(labels=2 if lost else 3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    message = "bias is .* missing" if lost else r"weight is \(3, 32\) .* \(2, 32\)"
    with pytest.raises(lt.FormatError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    assert same(model, state, [True] * len(list(model.parameters())))
    adapted = get_peft_model(model, config(task_type="SEQ_CLS"))
    state = {k: v.clone() for k, v in adapted.state_dict().items()}
    flags = [p.requires_grad for p in adapted.parameters()]
    with pytest.raises(lt.FormatError, match=message):
        adapted.load_adapter(tmp_path, "second")
    assert same(adapted, state, flags)


def test_a_head_of_another_size_may_be_left_out(tmp_path: Path) -> None:
    get_peft_model(classifier(), config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        PeftModel.from_pretrained(classifier(labels=3), tmp_path, ignore_mismatched_sizes=True)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(lt.FormatError, match=r"encoder\.layer\.2\..*another model"):
        PeftModel.from_pretrained(bert(layers=2), tmp_path)
    with pytest.raises(lt.ShapeError, match=r"is 36 × 36 in this model and 32 × 32"):
        PeftModel.from_pretrained(bert(hidden_size=36), tmp_path)
