"""Bad input to apply_lotr, load_lotr and merge: one sentence, and the model as it was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from tests.test_public_functions import JUNK, calls, name_of, try_junk  # noqa: E402
from tests.test_torch_apply import lora, snapshot, unchanged  # noqa: E402
from tests.test_torch_modules import TARGETS, Net, adapted  # noqa: E402


@pytest.mark.parametrize(
    ("patterns", "options", "error", "message"),
    [
        (["quary"], {}, lt.FormatError, "'quary' matches none"),
        (["query"], {"rank": 13}, lt.RankError, r"exceeds .*group 'query'.* 12 × 12"),
        (["query"], {"rank": 0}, lt.RankError, "positive integer"),
        (["query"], {"rank": (2, 3, 4)}, lt.RankError, "positive integer"),
        (TARGETS, {"group_by": "all=."}, lt.ShapeError, "together"),
        (["layer.0"], {}, lt.UnsupportedAdapterError, r"layer\.0 is a Block"),
        (["query"], {"init": "magic"}, lt.OptionError, "init is 'magic'"),
        (["query"], {"train": "some"}, lt.OptionError, "train is 'some'"),
        (["query"], {"rank": 2.5}, lt.RankError, "rank is 2.5"),
        (["query"], {"rank": True}, lt.RankError, "rank is True"),
        (["query"], {"rank": "8"}, lt.RankError, "rank is '8'"),
        (["query"], {"alpha": float("nan")}, lt.OptionError, "alpha is nan"),
        (["query"], {"alpha": "1"}, lt.OptionError, "alpha is '1'"),
        (["query"], {"dropout": 1.0}, lt.OptionError, "dropout is 1.0"),
        (["query"], {"group_by": 3}, lt.OptionError, "group_by is 3"),
        (["query"], {"group_by": "types"}, lt.FormatError, "'types' matches none"),
        ([], {}, lt.FormatError, "patterns is empty"),
        ("(", {}, lt.FormatError, "no regular expression"),
    ],
)
def test_refusals(patterns, options, error, message) -> None:
    model = Net()
    before = snapshot(model)
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        lotr.apply_lotr(model, patterns, **{"rank": 2, **options})
    assert unchanged(model, before)
    assert trainable == [p.requires_grad for p in model.parameters()]


def test_an_embedding_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(lt.UnsupportedAdapterError, match=r"embedding '0'.*lotrtensor\.peft"):
        lotr.apply_lotr(model, ["0", "1"], rank=2)
    assert unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_nobody_calls_is_refused_by_name() -> None:
    model = nn.TransformerEncoderLayer(8, 2)
    before = snapshot(model)
    with pytest.raises(lt.UnsupportedAdapterError, match=r"out_proj: MultiheadAttention\.forward"):
        lotr.apply_lotr(model, ["linear1", "out_proj"], rank=2)
    assert unchanged(model, before)


def test_a_second_application_is_refused() -> None:
    model = lotr.apply_lotr(Net(), ["query"], rank=2)
    with pytest.raises(lt.FormatError, match="already"):
        lotr.apply_lotr(model, ["value"], rank=2)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    lotr.save_lotr(adapted(), tmp_path / "out")
    for other, error, message in (
        (Net(layers=2), lt.FormatError, r"layer\.2\.\w+.*another model"),
        (Net(hidden=10), lt.ShapeError, r"another model"),
    ):
        before = snapshot(other)
        with pytest.raises(error, match=message):
            lotr.load_lotr(other, tmp_path / "out")
        assert unchanged(other, before)


def test_filling_other_groups_is_refused(tmp_path: Path) -> None:
    lotr.save_lotr(adapted(), tmp_path / "out")
    model = lotr.apply_lotr(Net(), TARGETS, rank=2)
    before = snapshot(model)
    with pytest.raises(lt.FormatError, match="rank"):
        lotr.load_lotr(model, tmp_path / "out")
    assert unchanged(model, before)


def test_a_tied_weight_is_not_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    lotr.apply_lotr(model, ["0"], rank=2)
    before = snapshot(model)
    with pytest.raises(lt.UnsupportedAdapterError, match="0 shares its weight"):
        lotr.merge(model)
    assert unchanged(model, before)
    assert not model[0].merged


def test_a_quantised_weight_is_not_merged() -> None:
    class Packed(nn.Module):
        in_features = out_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
            self.bias = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.float().T

    model = nn.Sequential(nn.Linear(4, 4), Packed())
    lotr.apply_lotr(model, ["0", "1"], rank=2)
    assert model[1].lotr_core.dtype == torch.float32
    before = snapshot(model)
    with pytest.raises(lt.UnsupportedAdapterError, match=r"^1: .*torch\.int8.*lotrtensor\.peft"):
        lotr.merge(model)
    assert unchanged(model, before)
    assert not model[0].merged


QUERY = "layer.0.query"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({QUERY: torch.zeros(12)}, lt.ShapeError, r"query is \(12,\)"),
        ({QUERY: torch.zeros(12, 12, dtype=torch.int32)}, lt.DataError, "query is torch.int32"),
        ({QUERY: np.zeros((12, 12))}, lt.DataError, "query is ndarray"),
        ({QUERY: torch.full((12, 12), torch.nan)}, lt.DataError, "query holds NaN"),
        ({"nowhere": torch.zeros(12, 12)}, lt.FormatError, "'nowhere'.*another model"),
        ({QUERY: torch.zeros(12, 10)}, lt.ShapeError, "another model"),
        ({}, lt.DataError, "no weight deltas"),
        (None, lt.UnsupportedAdapterError, "source is a NoneType"),
        ("no/such/directory", lt.FormatError, "does not exist"),
    ],
)
def test_sources_that_are_none(source, error, message) -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        lotr.load_lotr(model, source, rank=2)
    assert unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rank", [0, 2.5, (1, 2, 3), "4"])
def test_a_rank_that_is_none(rank) -> None:
    with pytest.raises(lt.RankError, match="rank is"):
        lotr.load_lotr(Net(), lora([QUERY]), rank=rank)


def test_a_wrong_format_version_is_refused(tmp_path: Path) -> None:
    lotr.save_lotr(adapted(), tmp_path / "out")
    config = tmp_path / "out" / "adapter_config.json"
    text = config.read_text()
    assert '"format_version": 1' in text
    config.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    model = Net()
    before = snapshot(model)
    with pytest.raises(lt.FormatError, match="format_version 9"):
        lotr.load_lotr(model, tmp_path / "out")
    assert unchanged(model, before)


def test_a_directory_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(lt.FormatError, match="exists"):
        lotr.save_lotr(adapted(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_merged_layers_are_not_filled(tmp_path: Path) -> None:
    model = adapted()
    lotr.save_lotr(model, tmp_path / "out")
    lotr.merge(model)
    with pytest.raises(lt.FormatError, match=r"is merged.*unmerge"):
        lotr.load_lotr(model, tmp_path / "out")
    lotr.load_lotr(lotr.unmerge(model), tmp_path / "out")


def test_a_lora_needs_a_rank() -> None:
    with pytest.raises(lt.UnsupportedAdapterError, match="give the rank"):
        lotr.load_lotr(Net(), lora(["layer.0.query"]))


def test_a_carried_tensor_is_not_lost(tmp_path: Path) -> None:
    adapter = lotr.to_adapter(adapted())
    extra = {"base_model.model.head.weight": np.zeros((2, 2), np.float32)}
    carrying = lt.LotrAdapter(adapter.groups, {"modules_to_save": ["head"]}, adapter.dtype, extra)
    with pytest.raises(lt.UnsupportedAdapterError, match=r"head\.weight"):
        lotr.load_lotr(Net(), carrying)


def small() -> nn.Module:
    """A model of two layers, adapted."""
    return lotr.apply_lotr(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), ["0", "1"], rank=2)


def packed(folder: Path) -> lt.Pack:
    """A pack of one adapter of that model."""
    return lt.pack({"user": lotr.to_adapter(small())}, folder / "pack", tolerance=0.5)


def compressed() -> tuple[lt.CompressedAdapter, lt.LoraAdapter]:
    """A LoRA of two layers, and what compression leaves of it."""
    rng = np.random.default_rng(0)
    pairs = [rng.normal(size=(2, 6, 2)) for _ in "01"]
    modules = [lt.LoraModule(name, b, a.T) for name, (b, a) in zip("01", pairs, strict=True)]
    whole = lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))
    return lt.compress(whole, tolerance=0.5, form="lora"), whole


RIGHT = {
    lotr.heal: {
        "model": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
        "compressed": compressed()[0],
        "original": compressed()[1],
        "batches": list(torch.ones(10, 1, 6)),
    },
    lotr.calibrate: {
        "model": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
        "adapter": compressed()[1],
        "batches": list(torch.ones(10, 1, 6)),
    },
    lotr.apply_lotr: {"model": None, "patterns": ["0"], "rank": 2},
    lotr.set_trainable: {"model": small()},
    lotr.param_groups: {"model": small(), "lr": 1e-3},
    lotr.merge: {"model": small()},
    lotr.unmerge: {"model": small()},
    lotr.unload: {"model": small()},
    lotr.lotr_state_dict: {"model": small()},
    lotr.load_lotr: {"model": small(), "source": lotr.to_adapter(small())},
    lotr.load_pack: {"model": small(), "pack": packed(Path(tempfile.mkdtemp())), "name": "user"},
    lotr.to_adapter: {"model": small()},
    lotr.save_lotr: {"model": small(), "directory": "out"},
    lotr.check_adapted: {"model": small(), "batch": torch.ones(1, 6)},
}


def test_every_function_is_tried() -> None:
    functions = {getattr(lotr, name) for name in lotr.__all__}
    assert {f for f in functions if not isinstance(f, type)} == RIGHT.keys()


THEIRS = ("batch", "batches", "read")
"""What is given to the model or is a function of the caller's: its errors are theirs."""


@pytest.mark.parametrize(
    ("function", "name"), [c for c in calls(RIGHT) if c[1] not in THEIRS], ids=name_of
)
@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_whatever_is_passed_there_is_a_result_or_an_error_of_ours(
    function, name, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert None in JUNK
    for junk in JUNK:
        plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        right = RIGHT[function] | ({"model": plain} if function is lotr.apply_lotr else {})
        try_junk(function, right, name, [junk])
