"""Adapters of a pack in PEFT models, against dense weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.peft as lotr  # noqa: E402
from pack_fixtures import dense, family, strangers  # noqa: E402

X = torch.linspace(-1, 1, 4 * 120, dtype=torch.float64).reshape(4, 120)


class Base(nn.Module):
    """A model with the modules of `family`, and a head that adapters may carry in full."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(120, 160), "dense": nn.Linear(160, 240)})
            for _ in range(layers)
        )
        self.score = nn.Linear(240, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = [layer["dense"](torch.tanh(layer["query"](x))) for layer in self.layers]
        return self.score(sum(own))


def base() -> nn.Module:
    return Base().double()


def tuned(packed: lt.Pack, name: str) -> nn.Module:
    """The base with the dense updates of one adapter."""
    model, member = base(), packed.member(name)
    with torch.no_grad():
        for module, delta in dense(member.updates()).items():
            model.get_submodule(module).weight += torch.from_numpy(delta)
        for key, array in member.extras.items():
            place = model.get_parameter(key.removeprefix("base_model.model."))
            place.copy_(torch.from_numpy(array))
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def packed(tmp_path: Path) -> lt.Pack:
    return lt.pack(family(5), tmp_path / "pack", tolerance=0.1, share="adapters")


@pytest.mark.parametrize("share", ["adapters", "both", "none", "auto", "layers"])
def test_every_adapter_computes_with_what_is_stored(tmp_path: Path, share: str) -> None:
    packed = lt.pack(family(3), tmp_path / "pack", tolerance=0.1, share=share)
    model = lotr.load_pack(base(), tmp_path / "pack")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.active_adapters == ["user-0"]
    for name in packed.names:
        model.set_adapter(name)
        torch.testing.assert_close(model(X), tuned(packed, name)(X))


def test_rows_of_many_adapters_in_one_batch(packed: lt.Pack) -> None:
    """One by itself among them, and the base model."""
    packed.add("stranger", strangers(1, seed=9)["user-0"])
    model = lotr.load_pack(base(), packed)
    names = ["user-3", "__base__", "stranger", "user-0"]
    found = model(X, adapter_names=names)
    for row, name in enumerate(names):
        one = base() if name == "__base__" else tuned(packed, name)
        torch.testing.assert_close(found[row], one(X[row]))


def test_bases_are_held_once(packed: lt.Pack) -> None:
    model = lotr.load_pack(base(), packed, ["user-0"])
    lotr.load_pack(model, packed, ["user-1", "user-2"])  # at another time, from the same files
    lotr.load_pack(model, lt.Pack(packed.path), {"user-3": "fourth"})
    layer = model.base_model.model.layers[1]["dense"]
    assert set(layer.lotr_shared) == {"user-0", "user-1", "user-2", "fourth"}
    assert len(set(map(id, layer.lotr_shared.values()))) == 1
    shared = {id(p): p.numel() for p in model.base_model.lotr_factors.parameters()}
    cells = [cell.basis for cell in packed.cells]
    assert sum(shared.values()) == sum(b.left.size + b.right.size for b in cells)
    model.set_adapter("fourth")
    model.delete_adapter("user-0")  # the owner goes, the bases stay
    torch.testing.assert_close(model(X), tuned(packed, "user-3")(X))


def test_bases_of_another_pack_are_its_own(tmp_path: Path, packed: lt.Pack) -> None:
    other = lt.pack(family(4, seed=3), tmp_path / "other", tolerance=0.1, share="adapters")
    model = lotr.load_pack(base(), packed, ["user-0"])
    lotr.load_pack(model, other, {"user-0": "other-0"})
    for own, source, name in (("user-0", packed, "user-0"), ("other-0", other, "user-0")):
        model.set_adapter(own)
        torch.testing.assert_close(model(X), tuned(source, name)(X))


def test_heads_that_adapters_carry(tmp_path: Path) -> None:
    adapters = {}
    for i, (name, adapter) in enumerate(family(3).items()):
        head = {
            f"base_model.model.score.{key}": np.full(shape, 0.1 * (i + 1))
            for key, shape in (("weight", (3, 240)), ("bias", (3,)))
        }
        adapters[name] = replace(adapter, config={"modules_to_save": ["score"]}, extras=head)
    packed = lt.pack(adapters, tmp_path / "pack", tolerance=0.1)
    model = lotr.load_pack(base(), packed)
    for name in packed.names:
        model.set_adapter(name)
        torch.testing.assert_close(model(X), tuned(packed, name)(X))


def test_only_cores_train_and_go_back_into_the_pack(packed: lt.Pack, tmp_path: Path) -> None:
    model = lotr.load_pack(base(), packed, ["user-1"], train="cores")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lotr_core" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = model(X).detach()
    model(X).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(before, model(X))
    model.save_pretrained(tmp_path / "saved")
    row = packed.add("trained", tmp_path / "saved" / "user-1", tolerance=0.001)
    assert row.relative_error <= 0.001
    again = lotr.load_pack(base(), packed, ["trained"])
    with torch.no_grad():
        assert float((again(X) - model(X)).norm() / model(X).norm()) < 0.01


def test_what_is_loaded_is_saved_and_loaded_again(packed: lt.Pack, tmp_path: Path) -> None:
    model = lotr.load_pack(base(), packed, ["user-0", "user-4"])
    model.save_pretrained(tmp_path / "out")
    for name in ("user-0", "user-4"):
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "out" / name)
        torch.testing.assert_close(again(X), tuned(packed, name)(X))


def test_a_task_gives_its_class_of_model(tmp_path: Path) -> None:
    adapters = {
        name: replace(adapter, config={"task_type": "FEATURE_EXTRACTION"})
        for name, adapter in family(2).items()
    }
    packed = lt.pack(adapters, tmp_path / "pack", tolerance=0.1)
    model = lotr.load_pack(base(), packed)
    assert type(model) is peft.PeftModelForFeatureExtraction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_train_with_their_adapter_are_left_alone(
    packed: lt.Pack, dtype: torch.dtype
) -> None:
    """Those of a new adapter that starts on the bases are equal to them, but not for long."""
    config = lotr.LotrConfig(init=str(packed.path))
    model = peft.get_peft_model(Base().to(dtype), config)
    lotr.load_pack(model, packed, ["user-0"])
    layer = model.base_model.model.layers[0]["query"]
    assert layer.lotr_shared["default"] is not layer.lotr_shared["user-0"]
    before = layer.get_delta_weight("user-0").clone()
    with torch.no_grad():
        layer.lotr_shared["default"].left += 1.0
    assert torch.equal(layer.get_delta_weight("user-0"), before)


def test_a_model_whose_adapters_are_all_gone_takes_others(packed: lt.Pack) -> None:
    model = lotr.load_pack(base(), packed, ["user-0"])
    model.delete_adapter("user-0")
    lotr.load_pack(model, packed, ["user-2"])
    torch.testing.assert_close(model(X), tuned(packed, "user-2")(X))


# --- refusals


def biased(adapter: lt.LoraAdapter, **fields) -> lt.LoraAdapter:
    """An adapter that carries a bias of the base model."""
    extras = {"base_model.model.layers.0.query.base_layer.bias": np.ones(160, np.float32)}
    return replace(adapter, extras=extras, config={"bias": "lora_only"} | fields)


def test_biases_belong_to_one_adapter(tmp_path: Path) -> None:
    adapters = family(3)
    adapters["user-1"] = biased(adapters["user-1"])
    packed = lt.pack(adapters, tmp_path / "pack", tolerance=0.1)
    model = lotr.load_pack(base(), packed, ["user-0"])
    before = state(model)
    for other, names in ((base(), None), (model, ["user-1"])):
        with pytest.raises(lt.UnsupportedAdapterError, match=r"user-1 carries .*bias.* by itself"):
            lotr.load_pack(other, packed, names)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


def head(adapter: lt.LoraAdapter, rows: int, names: tuple[str, ...] = ("weight", "bias")):
    shapes = {"weight": (rows, 240), "bias": (rows,)}
    extras = {f"base_model.model.score.{k}": np.ones(shapes[k], np.float32) for k in names}
    return replace(adapter, config={"modules_to_save": ["score"]}, extras=extras)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ()])
def test_a_head_of_another_shape(tmp_path: Path, loaded: bool, names: tuple[str, ...]) -> None:
    adapters = family(3)
    adapters["user-1"] = head(adapters["user-1"], 3)
    adapters["user-2"] = head(adapters["user-2"], 3 if names != ("weight", "bias") else 5, names)
    packed = lt.pack(adapters, tmp_path / "pack", tolerance=0.1)
    model = lotr.load_pack(base(), packed, ["user-0"]) if loaded else base()
    before = state(model)
    with pytest.raises(lt.FormatError, match="another head"):
        lotr.load_pack(model, packed, ["user-1", "user-2"])
    assert list(state(model)) == list(before)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_takes_heads_off_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    adapters = family(3)
    for name in ("user-1", "user-2"):
        adapters[name] = head(adapters[name], 3)
    packed = lt.pack(adapters, tmp_path / "pack", tolerance=0.1)
    model = lotr.load_pack(base(), packed, ["user-0"])
    before, fill = state(model), lotr.packs._fill

    def failing(wrapped, name, member):
        if name == "user-2":
            raise error
        fill(wrapped, name, member)

    monkeypatch.setattr(lotr.packs, "_fill", failing)
    with pytest.raises(error):
        lotr.load_pack(model, packed, ["user-1", "user-2"])
    assert list(state(model)) == list(before)
    torch.testing.assert_close(model(X), tuned(packed, "user-0")(X))


REFUSED = {
    "nobody": ({"names": ["user-0", "nobody"]}, lt.FormatError, "holds no adapter 'nobody'"),
    "no names": ({"names": []}, lt.FormatError, "expected at least one"),
    "a name for names": ({"names": "user-0"}, lt.OptionError, "list of names"),
    "one name twice": ({"names": {"user-0": "a", "user-1": "a"}}, lt.FormatError, "one name"),
    "a dot": ({"names": {"user-0": "v1.0"}}, lt.FormatError, "cannot be named"),
    "a number": ({"names": {"user-0": 1}}, lt.OptionError, "named 1"),
    "a list": ({"names": {"user-0": ["x"]}}, lt.OptionError, "named"),
    "lists": ({"names": [["user-0"]]}, lt.FormatError, "holds no adapter"),
    "bytes": ({"names": b"user-0"}, lt.OptionError, "list of names"),
    "all": ({"train": "all"}, lt.OptionError, "expected 'cores'"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("loaded", [False, True])
def test_what_cannot_be_leaves_the_model(packed: lt.Pack, case: str, loaded: bool) -> None:
    options, error, words = REFUSED[case]
    model = lotr.load_pack(base(), packed, ["user-2"]) if loaded else base()
    before = state(model)
    with pytest.raises(error, match=words):
        lotr.load_pack(model, packed, **options)
    assert list(state(model)) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


def test_a_name_that_is_taken(packed: lt.Pack) -> None:
    model = lotr.load_pack(base(), packed, ["user-2"])
    with pytest.raises(lt.FormatError, match="'user-2' already"):
        lotr.load_pack(model, packed)
    assert list(model.peft_config) == ["user-2"]


def test_another_model(packed: lt.Pack) -> None:
    model = Base(layers=1).double()
    with pytest.raises(lt.FormatError, match=r"layers\.1\."):
        lotr.load_pack(model, packed)
    assert not any("lotr" in name for name in model.state_dict())


def test_another_method(packed: lt.Pack) -> None:
    lora = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(lt.UnsupportedAdapterError, match="another PEFT method"):
        lotr.load_pack(lora, packed)


def test_an_adapter_without_bases_has_no_cores_to_train(tmp_path: Path) -> None:
    packed = lt.pack(strangers(2), tmp_path / "pack", tolerance=0.3, share="none")
    with pytest.raises(lt.OptionError, match="no cores to train; unpack"):
        lotr.load_pack(base(), packed, train="cores")


@pytest.mark.parametrize("loaded", [False, True])
def test_what_fails_half_way_leaves_the_model(
    packed: lt.Pack, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    model = lotr.load_pack(base(), packed, ["user-2"]) if loaded else base()
    before, fill = state(model), lotr.packs._fill

    def failing(wrapped, name, member):
        if name == "user-4":
            raise MemoryError
        fill(wrapped, name, member)

    monkeypatch.setattr(lotr.packs, "_fill", failing)
    with pytest.raises(MemoryError):
        lotr.load_pack(model, packed, ["user-0", "user-1", "user-4"])
    assert list(state(model)) == list(before)
    torch.testing.assert_close(model(X), (tuned(packed, "user-2") if loaded else base())(X))


def test_copies_do_not_share_with_their_model(packed: lt.Pack) -> None:
    model = lotr.load_pack(base(), packed, ["user-0"])
    copied = copy.deepcopy(model)
    lotr.load_pack(copied, packed, ["user-1"])
    layer, other = (m.base_model.model.layers[0]["query"] for m in (copied, model))
    assert layer.lotr_shared["user-1"] is layer.lotr_shared["user-0"]
    assert layer.lotr_shared["user-0"] is not other.lotr_shared["user-0"]
