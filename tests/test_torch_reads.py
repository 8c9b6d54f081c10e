"""Layers whose weight is read without the layer being called: refused, reported, never silent."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from lotrtensor.torch.weight_reads import weight_reads  # noqa: E402
from tests.test_torch_apply import snapshot, unchanged  # noqa: E402


def project(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight)


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.by_self(x)


class Reader(nn.Module):
    """Takes weights in many ways; the names say which layers are passed by."""

    def __init__(self) -> None:
        super().__init__()
        for name in (
            *("read_plain", "read_alias", "read_method", "read_helper", "read_getattr"),
            *("read_property", "read_unrolled", "by_call", "by_self", "by_alias", "by_dtype"),
            *("by_checkpoint", "by_forward", "both", "never"),
        ):
            self.add_module(name, nn.Linear(4, 4))
        self.read_list = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.by_list = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.by_place = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.by_items = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.by_comprehension = nn.ModuleList([nn.Linear(4, 4)])
        self.never.weight.data.mul_(2.0)

    def take(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight.T

    def call(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    @property
    def wide(self) -> torch.Tensor:
        return self.read_property.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.read_plain.weight)
        layer = self.read_alias
        x = x + F.linear(x, weight=layer.weight.float())
        x = x + self.take(self.read_method, x) + project(self.read_helper, x)
        x = x + x @ getattr(self, "read_getattr").weight + x @ self.wide  # noqa: B009
        x = x + x @ torch.cat([self.read_unrolled.weight[:2], self.read_unrolled.weight[2:]])
        for reader in self.read_list:
            x = x + F.linear(x, reader.weight)
        for _, caller in enumerate(self.by_list):
            x = x + caller(x)
        x = x + self.call(self.by_call, x) + run(self, x) + self.by_place["a"](x)
        for _, caller in self.by_items.items():
            x = x + caller(x)
        x = x + sum({k: c(x) for k, c in enumerate(self.by_comprehension)}.values())
        x = x + 0 * self.by_items["b"].weight.sum() + 0 * self.by_comprehension[0].weight.sum()
        other = self.by_alias
        x = x + other(x.to(self.by_dtype.weight.dtype))
        x = x + self.by_dtype(x) + checkpoint(self.by_checkpoint, x, use_reentrant=False)
        return self.by_forward.forward(x) + self.both(x) + F.linear(x, self.both.weight)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_every_way_of_reading_is_seen_and_no_call_is_taken_for_one() -> None:
    model = Reader()
    found = weight_reads(model, linear_names(model))
    lost = {name for name, read in found.items() if not read.called}
    assert lost == {name for name in linear_names(model) if name.startswith("read_")}
    both = {"both", "by_comprehension.0"}
    assert {name for name, read in found.items() if read.called} == both
    assert found["read_method"].where == "Reader.take"


@pytest.mark.parametrize("name", [n for n in linear_names(Reader()) if n.startswith("read_")])
def test_what_is_refused_has_no_effect(name: str) -> None:
    """The refusal is right: a dense change behind the layer's forward changes nothing."""
    model, x = Reader(), torch.randn(3, 4)
    before, kept = model(x), snapshot(model)
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, y: y + 1.0)
    assert torch.equal(model(x), before)
    handle.remove()
    with pytest.raises(lt.UnsupportedAdapterError, match=rf"{name}: Reader\.\w+ reads the weight"):
        lotr.apply_lotr(model, [name, "by_call"], rank=2, group_by="shape")
    assert unchanged(model, kept)
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_is_read_and_called_is_told() -> None:
    with pytest.warns(lt.LotrWarning, match="both: Reader.forward calls this layer in one place"):
        model = lotr.apply_lotr(Reader(), ["both", "by_call"], rank=2)
    with pytest.warns(lt.LotrWarning, match="both of the adapted layers ran, and linear took"):
        uses = lotr.check_adapted(model, torch.randn(2, 4))
    assert {u.name: u.read_by for u in uses} == {"both": ("linear",), "by_call": ()}


class Hidden(nn.Module):
    """Reads a weight through a table that no source shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.chosen = 1

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        x = self.first(x)
        if not skip:
            x = x @ dict(self.named_children())["second"].weight
        return self.experts[self.chosen](x)


def adapted(*names: str) -> nn.Module:
    return lotr.apply_lotr(Hidden(), list(names), rank=2, group_by="shape")


def forward_warnings(model: nn.Module, times: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            model(torch.randn(2, 4))
    return [str(w.message) for w in caught if issubclass(w.category, lt.LotrWarning)]


@pytest.mark.parametrize("train", [False, True])
def test_the_first_forward_tells_once_of_layers_that_did_not_run(train: bool) -> None:
    model = adapted("first", "second").train(train)
    (told,) = forward_warnings(model)
    assert told.startswith("second of the adapted layers did not run in the forward of Hidden")
    assert forward_warnings(model, 20) == []
    assert not model._forward_hooks


def test_nothing_is_told_where_all_ran() -> None:
    model = adapted("first")
    assert forward_warnings(model, 2) == []
    assert not model._forward_hooks


def test_experts_that_are_not_chosen_are_given_time() -> None:
    model = adapted("0", "1", "2")
    assert forward_warnings(model, 15) == []
    (told,) = forward_warnings(model, 1)
    assert "experts.0 and 1 more" in told and "harmless" in told
    model = adapted("0", "1", "2")
    for model.chosen in range(3):
        assert forward_warnings(model) == []
    assert not model._forward_hooks


@pytest.mark.parametrize("transform", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_watches_for_itself(transform) -> None:
    model = adapted("first", "second")
    other = transform(model)
    assert len(forward_warnings(other)) == 1
    assert len(forward_warnings(model)) == 1


def test_an_unloaded_model_is_not_watched() -> None:
    model = lotr.unload(adapted("first", "second"))
    assert forward_warnings(model) == []
    assert not model._forward_hooks


def test_the_dry_look_names_the_reader_and_leaves_the_model() -> None:
    model, x = adapted("first", "second"), torch.randn(2, 4)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(lt.UnsupportedAdapterError, match=r"second .*matmul.* took the weight"):
        lotr.check_adapted(model, (x,))
    assert unchanged(model, before) and torch.equal(torch.get_rng_state(), state)
    with pytest.warns(lt.LotrWarning, match="second of the adapted layers did not run with this"):
        uses = lotr.check_adapted(model, {"x": x, "skip": True})
    assert uses == (lotr.LayerUse("first", True, ()), lotr.LayerUse("second", False, ()))
    with pytest.raises(lt.FormatError, match="no LoTR layers"):
        lotr.check_adapted(Hidden(), x)


def test_the_dry_look_sees_a_shared_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    lotr.apply_lotr(model, ["0", "1"], rank=2)
    with pytest.warns(lt.LotrWarning, match="0 of the adapted layers ran, and linear took"):
        lotr.check_adapted(model, torch.randn(2, 4))
