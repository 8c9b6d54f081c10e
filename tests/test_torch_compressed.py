"""Compressed adapters in plain torch: loaded, trained on, merged, saved, beside dense weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from compressed_fixtures import adapter, dense_updates, group  # noqa: E402
from tests.test_torch_modules import Net, layers  # noqa: E402

KINDS = {"query": (12, 12), "value": (12, 12), "up": (20, 12)}


def mixed() -> lt.CompressedAdapter:
    """Both parts, a shared part alone, and private parts of which one layer has none."""
    paths = {kind: [f"layer.{k}.{kind}" for k in range(3)] for kind in KINDS}
    return adapter(
        group("query", paths["query"], KINDS["query"], (2, 3), (2, 0, 1)),
        group("value", paths["value"], KINDS["value"], (3, 2)),
        group("up", paths["up"], KINDS["up"], private=(1, 0, 2)),
    )


def private_only() -> lt.CompressedAdapter:
    return adapter(group("up", [f"layer.{k}.up" for k in range(3)], KINDS["up"], private=(1, 0, 2)))


def base(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def tuned(compressed: lt.CompressedAdapter, dtype: torch.dtype = torch.float64) -> Net:
    """The net with every ΔW written out: an oracle that shares no code."""
    model = base(dtype)
    for name, delta in dense_updates(compressed).items():
        model.get_submodule(name).weight.data += torch.from_numpy(delta).to(dtype)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("make", [mixed, private_only])
@pytest.mark.parametrize("tokens", [1, 50])
def test_forward_equals_the_dense_module(make, tokens: int) -> None:
    model = lotr.load_lotr(base(), make())
    x = torch.randn(tokens, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), tuned(make())(x), rtol=1e-11, atol=1e-11)
    assert not any(p.requires_grad for p in model.parameters())
    for name, delta in dense_updates(make()).items():
        found = model.get_submodule(name).delta_weight().numpy()
        np.testing.assert_allclose(found, delta, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_from_a_directory_as_the_export_in_peft(tmp_path: Path) -> None:
    """A real compression, against PEFT's own LoRA of it."""
    peft = pytest.importorskip("peft")
    bundled = lt.load(Path(lt.__file__).parent / "data" / "amazon-sentiment")
    names = [module.name for module in bundled.modules]
    torch.manual_seed(0)
    model = nn.Module()
    for module in bundled.modules:
        parent = model
        *parts, last = module.name.split(".")
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(module.A.shape[1], module.B.shape[0]))
    small = lt.compress(bundled, budget="10%")
    small.save(tmp_path / "small")
    replace(small.to_lora(), dtype=np.dtype("float32")).save(tmp_path / "lora")
    ours = lotr.load_lotr(copy.deepcopy(model), tmp_path / "small", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").base_model
    for name in names[:12]:
        x = torch.randn(3, model.get_submodule(name).in_features)
        expected = theirs.model.get_submodule(name)(x)
        torch.testing.assert_close(ours.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-4)


def test_layers_without_a_shared_part_have_no_dummy_factors() -> None:
    model = lotr.load_lotr(base(), mixed())
    assert [name for name, _ in model.lotr_factors.groups()] == ["query", "value"]
    nothing = model.get_submodule("layer.1.up")
    assert isinstance(nothing, lotr.LotrLinear)
    assert not list(nothing.parameters(recurse=False))
    assert nothing.private_rank == 0
    expected = sum(g.parameters for g in mixed().groups)
    own = sum(v.numel() for v in lotr.lotr_state_dict(model).values())
    assert own == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_type_of_choice(dtype: torch.dtype) -> None:
    model = lotr.load_lotr(base(torch.float32), mixed(), dtype=dtype)
    assert {v.dtype for v in lotr.lotr_state_dict(model).values()} == {dtype}
    x = torch.randn(4, 12)
    tolerance = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    expected = tuned(mixed(), torch.float32)(x)
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    assert model(x).dtype == torch.float32


def test_merge_unmerge_and_unload() -> None:
    before, x = state(base()), torch.randn(5, 12, dtype=torch.float64)
    model = lotr.load_lotr(base(), mixed())
    expected = model(x)
    lotr.merge(model)
    torch.testing.assert_close(model(x), expected)
    lotr.unmerge(model)
    torch.testing.assert_close(model(x), expected)
    plain = lotr.unload(lotr.merge(model))
    torch.testing.assert_close(plain(x), expected)
    assert list(plain.state_dict()) == list(before)
    for name, weight in tuned(mixed()).state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], weight)


def test_conv1d_and_unlike_sides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(7, 5), Conv1D(7, 7)).double()
    plain = copy.deepcopy(model)
    compressed = adapter(
        group("0", ["0"], (7, 5), (2, 1), (2,)), group("1", ["1"], (7, 7), private=(3,))
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    found = lotr.load_lotr(model, compressed)(x)
    for name, delta in dense_updates(compressed).items():
        plain.get_submodule(name).weight.data += torch.from_numpy(delta.T)
    torch.testing.assert_close(found, plain(x))
    torch.testing.assert_close(lotr.unload(lotr.merge(model))(x), plain(x))


# Training


def test_gradients_of_private_factors() -> None:
    """∂/∂P = (∂/∂W) Q and ∂/∂Q = (∂/∂W)ᵀ P, W the dense weight."""
    model, twin = lotr.load_lotr(base(), mixed(), train="all"), tuned(mixed())
    x = torch.randn(6, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for name, layer in layers(model):
        if layer.private_rank:
            grad = twin.get_submodule(name).weight.grad
            p, q = layer.lotr_private_left, layer.lotr_private_right
            torch.testing.assert_close(p.grad, grad @ q)
            torch.testing.assert_close(q.grad, grad.T @ p)
        assert layer.base.weight.grad is None


def train(model: nn.Module, steps: int = 5) -> list[float]:
    torch.manual_seed(1)
    x = torch.randn(16, 12, dtype=torch.float64)
    optimizer = torch.optim.Adam(lotr.param_groups(model, 1e-3, core_lr=1e-2))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_on_lowers_the_loss_and_leaves_the_base() -> None:
    model = lotr.load_lotr(base(), mixed(), train="all")
    before = {k: v for k, v in state(model).items() if ".base." in k}
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_parameter_groups() -> None:
    model = lotr.load_lotr(base(), mixed(), train="all")
    factors, cores = lotr.param_groups(model, 1.0, factor_lr=0.5, core_lr=2.0)
    assert (factors["lr"], cores["lr"]) == (0.5, 2.0)
    private = {id(p) for n, p in model.named_parameters() if "private" in n}
    assert private <= {id(p) for p in factors["params"]}
    assert sum(p.numel() for p in cores["params"]) == 3 * (2 * 3 + 3 * 2)


def test_cores_alone() -> None:
    model = lotr.load_lotr(base(), mixed(), train="cores")
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {
        "lotr_core"
    }
    lotr.set_trainable(model, "all")
    assert model.get_submodule("layer.0.up").lotr_private_left.requires_grad


def test_cores_alone_where_there_are_none() -> None:
    model = base()
    before = state(model)
    with pytest.raises(lt.OptionError, match="nothing is shared"):
        lotr.load_lotr(model, private_only(), train="cores")
    assert list(model.state_dict()) == list(before)
    loaded = lotr.load_lotr(model, private_only())
    with pytest.raises(lt.OptionError, match="nothing is shared"):
        lotr.set_trainable(loaded, "cores")


def test_the_state_dict_goes_back() -> None:
    model = lotr.load_lotr(base(), mixed(), train="all")
    train(model)
    saved = lotr.lotr_state_dict(model)
    other = lotr.load_lotr(base(), mixed())
    missing = other.load_state_dict(saved, strict=False)
    assert not missing.unexpected_keys
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("make", [mixed, private_only])
def test_a_trained_one_is_saved_as_a_lora(tmp_path: Path, make) -> None:
    model = lotr.load_lotr(base(), make(), train="all")
    train(model)
    lotr.save_lotr(model, tmp_path / "out", config={"base_model_name_or_path": "base"})
    found = lt.load(tmp_path / "out")
    assert isinstance(found, lt.LoraAdapter)
    assert found.dtype == np.dtype("float64")
    assert {m.name for m in found.modules} == set(dense_updates(make()))
    for module in found.modules:
        expected = model.get_submodule(module.name).delta_weight().numpy()
        np.testing.assert_allclose(module.B @ module.A, expected, rtol=0, atol=1e-12)
    again = lt.compress(found, tolerance=0.1)
    assert again.relative_error <= 0.1


def test_a_shared_part_alone_is_saved_as_a_lotr(tmp_path: Path) -> None:
    compressed = adapter(mixed().groups[1])
    model = lotr.load_lotr(base(), compressed)
    lotr.save_lotr(model, tmp_path / "out")
    assert isinstance(lt.load(tmp_path / "out"), lt.LotrAdapter)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(lotr.load_lotr(base(), tmp_path / "out")(x), model(x))


def test_a_rank_makes_it_a_lotr() -> None:
    model = lotr.load_lotr(base(), mixed(), rank=9, group_by="type")
    assert not any(layer.private_rank for _, layer in layers(model))
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), tuned(mixed())(x), rtol=1e-4, atol=1e-4)


def test_layers_of_the_same_form_are_filled() -> None:
    model = lotr.load_lotr(base(), mixed(), train="all")
    train(model)
    lotr.load_lotr(model, mixed())
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), tuned(mixed())(x))


# Refusals


def other_widths() -> lt.CompressedAdapter:
    query, value, up = mixed().groups
    return adapter(query, value, group("up", list(up.modules), up.shape, private=(1, 1, 2)))


def test_layers_of_another_form_are_refused() -> None:
    model = lotr.load_lotr(base(), mixed())
    before = state(model)
    with pytest.raises(lt.FormatError, match=r"layer\.1\.up has private factors of rank 1"):
        lotr.load_lotr(model, other_widths())
    with pytest.raises(lt.FormatError, match="up has private factors"):
        lotr.load_lotr(model, adapter(*mixed().groups[:2]))
    with pytest.raises(lt.FormatError, match=r"dtype is torch\.float16"):
        lotr.load_lotr(model, mixed(), dtype=torch.float16)
    lotr.merge(model)
    with pytest.raises(lt.FormatError, match="is merged"):
        lotr.load_lotr(model, mixed())
    lotr.unmerge(model)
    for key, value in state(model).items():
        torch.testing.assert_close(value, before[key])


@pytest.mark.parametrize("dtype", [torch.int8, "float32", torch.float8_e4m3fn, torch.complex64, 3])
def test_types_that_layers_do_not_compute_in(dtype) -> None:
    with pytest.raises(lt.OptionError, match=r"expected torch\.float32"):
        lotr.load_lotr(base(), mixed(), dtype=dtype)


@pytest.mark.parametrize("step", [1e-12, 1e9])
def test_numbers_that_a_type_does_not_hold(step: float) -> None:
    value = mixed().groups[1]
    part = replace(value.stack.shared, step=step)
    compressed = adapter(replace(value, stack=replace(value.stack, shared=part)))
    model = base()
    before = state(model)
    with pytest.raises(lt.DataError, match=r"group 'value'.*float16 does not hold"):
        lotr.load_lotr(model, compressed, dtype=torch.float16)
    assert list(state(model)) == list(before)
    assert any(p.requires_grad for p in model.parameters())
    lotr.load_lotr(model, compressed, dtype=torch.float32)


def test_another_model_an_embedding_and_carried_tensors() -> None:
    with pytest.raises(lt.FormatError, match="made for another model"):
        lotr.load_lotr(Net(layers=2), mixed())
    words = group("words", ["words"], (4, 6), private=(2,), embedding=True)
    model = nn.ModuleDict({"words": nn.Embedding(6, 4)})
    with pytest.raises(lt.UnsupportedAdapterError, match="embedding"):
        lotr.load_lotr(model, adapter(words))
    carried = lt.CompressedAdapter(
        mixed().groups, {}, mixed().source, {"base_model.model.head.bias": np.zeros(2, np.float32)}
    )
    with pytest.raises(lt.UnsupportedAdapterError, match=r"head\.bias"):
        lotr.load_lotr(base(), carried)


def test_copies_and_compilation() -> None:
    model = lotr.load_lotr(base(torch.float32), mixed())
    x = torch.randn(3, 12)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    compiled = torch.compile(copied, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
