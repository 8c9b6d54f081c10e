"""Adapters of a pack in a torch model, against the dense updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lotrtensor as lt
import lotrtensor.torch as lotr
from pack_fixtures import dense, family


def base(layers=2):
    """A model with the modules of `family`."""
    torch.manual_seed(0)
    found = nn.Module()
    found.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.query, layer.dense = nn.Linear(120, 160), nn.Linear(160, 240)
        layer.forward = lambda x, own=layer: own.dense(torch.tanh(own.query(x)))
        found.layers.append(layer)
    found.forward = lambda x: sum(layer(x) for layer in found.layers)
    return found


@pytest.mark.parametrize("share", ["adapters", "both", "none", "auto"])
def test_a_model_computes_with_what_is_stored(tmp_path, share):
    packed = lt.pack(family(4), tmp_path / "pack", tolerance=0.1, share=share)
    x = torch.randn(3, 120, dtype=torch.float64)
    model = lotr.load_pack(base().double(), tmp_path / "pack", "user-2")
    expected = base().double()
    with torch.no_grad():
        for name, delta in dense(packed.member("user-2").updates()).items():
            expected.get_submodule(name).weight += torch.from_numpy(delta)
        torch.testing.assert_close(model(x), expected(x))
    shared = {id(layer.query.factors) for layer in model.layers}
    assert len(shared) == {"adapters": 2, "both": 1, "none": 1}.get(share, len(shared))


def test_another_adapter_takes_its_place(tmp_path):
    packed = lt.pack(family(4, own=0.0), tmp_path / "pack", tolerance=0.1, share="adapters")
    model = lotr.load_pack(base().double(), packed, "user-0")
    lotr.load_pack(model, packed, "user-3")
    for name, delta in dense(packed.member("user-3").updates()).items():
        found = model.get_submodule(name).delta_weight().numpy()
        np.testing.assert_allclose(found, delta, atol=1e-10)


def test_cores_that_were_trained_on_the_bases_go_into_the_pack(tmp_path):
    packed = lt.pack(family(4, own=0.0), tmp_path / "pack", tolerance=0.1, share="adapters")
    model = lotr.load_pack(base(), packed, "user-0", train="cores")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"layers.{k}.{kind}.lotr_core" for k in range(2) for kind in ("query", "dense")
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = model.layers[0].query.lotr_core.detach().clone()
    model(torch.randn(8, 120)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.layers[0].query.lotr_core)
    row = packed.add("trained", lotr.to_adapter(model))
    assert row.uses_bases and row.relative_error <= 0.1
    largest = max(r.bytes for r in packed.rows[:-1])
    assert row.bytes < 1.5 * largest  # cores alone: the bases hold all of it


def test_a_name_that_is_not_there(tmp_path):
    packed = lt.pack(family(2), tmp_path / "pack", tolerance=0.2)
    model = base()
    with pytest.raises(lt.FormatError, match="holds no adapter 'nobody'"):
        lotr.load_pack(model, packed, "nobody")
    assert not any("lotr" in name for name, _ in model.named_parameters())
