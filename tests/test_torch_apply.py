"""apply_lotr, initialisation, what trains, and files."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from tests.test_torch_modules import TARGETS, Net, adapted, layers, randomize  # noqa: E402


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("init", ["orthogonal", "paper", "svd"])
def test_the_update_is_exactly_zero_at_start(init: str) -> None:
    torch.manual_seed(0)
    base = Net().eval()
    x = torch.randn(4, 12)
    expected = base(x)
    model = lotr.apply_lotr(base, TARGETS, rank=(3, 4), init=init)
    assert torch.equal(model(x), expected)
    for _, layer in layers(model):
        assert torch.count_nonzero(layer.delta_weight()) == 0
        assert torch.count_nonzero(layer.factors.left) > 0
        assert torch.count_nonzero(layer.factors.right) > 0


def test_orthogonal_factors_have_orthonormal_columns() -> None:
    model = lotr.apply_lotr(Net(), TARGETS, rank=(3, 4))
    for factors in model.lotr_factors.values():
        for factor in factors.parameters():
            torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]))


def test_svd_factors_span_the_leading_singular_vectors_of_the_stacked_weights() -> None:
    torch.manual_seed(0)
    base = Net()
    stacked = torch.cat([block.up.weight.detach() for block in base.layer], dim=1)
    expected = torch.linalg.svd(stacked.double())[0][:, :3]
    model = lotr.apply_lotr(base, ["up"], rank=(3, 4), init="svd")
    left = model.lotr_factors.of("up").left.double()
    # Subspaces are compared by their projectors: the sign of a column has no meaning.
    torch.testing.assert_close(left @ left.T, expected @ expected.T, rtol=1e-5, atol=1e-5)


def test_scale_is_alpha_over_the_rank() -> None:
    def scale(**options) -> float:
        return layers(lotr.apply_lotr(Net(), ["query"], **options))[0][1].scale

    assert scale(rank=8) == pytest.approx(4.0)
    assert scale(rank=8, alpha=2) == pytest.approx(0.25)
    assert scale(rank=8, init="paper") == pytest.approx(1 / 8)
    assert scale(rank=4, alpha=2, rslora=True) == pytest.approx(1.0)
    assert scale(rank=(2, 8), alpha=2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("group_by", "groups"),
    [
        ("type", {"query": 3, "value": 3, "up": 3, "down": 3}),
        ("shape", {"12x12": 6, "20x12": 3, "12x20": 3}),
        ("qv=query|value", {"qv": 6, "up": 3, "down": 3}),
    ],
)
def test_grouping(group_by: str, groups: dict[str, int]) -> None:
    model = lotr.apply_lotr(Net(), TARGETS, rank=2, group_by=group_by)
    found = {name: 0 for name, _ in model.lotr_factors.groups()}
    for name, factors in model.lotr_factors.groups():
        found[name] = sum(layer.factors is factors for _, layer in layers(model))
    assert found == groups


@pytest.mark.parametrize(
    ("rank", "parameters"),
    [(1, 1560), (2, 3168), (4, 6528), (8, 13824), (16, 30720), (32, 73728)],
)
def test_parameter_counts_of_the_papers_table(rank: int, parameters: int) -> None:
    """RoBERTa-base: 12 layers, d = 768, query and value share one pair (arXiv 2402.01376)."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.query, self.value = nn.Linear(768, 768), nn.Linear(768, 768)

    model = nn.ModuleDict({"layer": nn.ModuleList(Attention() for _ in range(12))})
    lotr.apply_lotr(model, ["query", "value"], rank=rank, group_by="shape")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_patterns_as_a_regular_expression() -> None:
    model = lotr.apply_lotr(Net(), r"layer\.[02]\..*", rank=2)
    assert {name.split(".")[1] for name, _ in layers(model)} == {"0", "2"}
    assert len(layers(model)) == 8


def test_conv1d_merges_transposed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(10, 6), nn.Tanh(), Conv1D(6, 10))
    lotr.apply_lotr(model, ["0", "2"], rank=2)
    assert model[0].factors.shape == (10, 6)
    randomize(model)
    x = torch.randn(3, 6)
    expected = model(x)
    weight = model[0].weight + model[0].delta_weight().T
    torch.testing.assert_close(model[0](x), x @ weight + model[0].bias)
    torch.testing.assert_close(lotr.unload(lotr.merge(model))(x), expected)


def test_cores_only_trains_nothing_that_grows_with_the_width() -> None:
    model = lotr.apply_lotr(Net(), TARGETS, rank=(3, 4), train="cores")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith("lotr_core") for name in trained)
    assert sum(p.numel() for p in trained.values()) == 12 * 3 * 4
    lotr.set_trainable(model, "all")
    assert all(p.requires_grad for p in model.lotr_factors.parameters())


def test_param_groups_have_their_own_learning_rates() -> None:
    model = lotr.apply_lotr(Net(), TARGETS, rank=2)
    model.head = nn.Linear(12, 2)
    groups = lotr.param_groups(model, 1e-3, factor_lr=1e-4, core_lr=1e-2, weight_decay=0.1)
    optimiser = torch.optim.AdamW(groups)
    rates = {group["lr"]: len(group["params"]) for group in optimiser.param_groups}
    assert rates == {1e-4: 8, 1e-2: 12, 1e-3: 2}
    assert all(group["weight_decay"] == 0.1 for group in optimiser.param_groups)


def test_training_lowers_the_loss_and_leaves_the_base() -> None:
    torch.manual_seed(0)
    base = Net()
    before = snapshot(base)
    model = lotr.apply_lotr(base, TARGETS, rank=4)
    x, target = torch.randn(32, 12), torch.randn(32, 12)
    optimiser = torch.optim.AdamW(lotr.param_groups(model, 1e-2))
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert unchanged(lotr.unload(model), before)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_directory_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted(dtype, group_by="qv=query|value")
    lotr.save_lotr(model, tmp_path / "out", config={"base_model_name_or_path": "base"})
    adapter = lt.load(tmp_path / "out")
    assert adapter.dtype.name == str(dtype).removeprefix("torch.")
    assert adapter.config["base_model_name_or_path"] == "base"
    assert {row.group for row in adapter.summary} == {"qv", "down", "up"}
    torch.manual_seed(0)
    other = lotr.load_lotr(Net().to(dtype), tmp_path / "out").eval()
    assert not any(p.requires_grad for p in other.parameters())
    x = torch.randn(4, 12, dtype=dtype)
    tight = dtype == torch.float32
    torch.testing.assert_close(
        other(x), model(x), rtol=1e-5 if tight else 0.05, atol=1e-5 if tight else 0.1
    )


def test_file_size_is_parameters_times_itemsize_and_a_header(tmp_path: Path) -> None:
    model = adapted()
    lotr.save_lotr(model, tmp_path / "out")
    content = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(content) == 8 + header + 4 * numbers


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_forward_merged_and_the_export_as_a_peft_lora_are_equal(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(10, 6), nn.Tanh(), nn.Linear(10, 6), nn.Tanh(), Conv1D(10, 6))
    base = copy.deepcopy(model)
    randomize(lotr.apply_lotr(model, ["0", "2", "4"], rank=(3, 4), group_by="conv=0|4"))
    x = torch.randn(5, 6)
    expected = model(x)
    lotr.save_lotr(model, tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "lora")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        exported = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lotr.load_lotr(base, tmp_path / "lotr")(x), expected)
    torch.testing.assert_close(lotr.unload(lotr.merge(model))(x), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_was_adapted_is_filled(tmp_path: Path) -> None:
    model = adapted()
    lotr.save_lotr(model, tmp_path / "out")
    torch.manual_seed(0)
    other = lotr.apply_lotr(Net(), TARGETS, rank=(3, 4), alpha=7.0).eval()
    lotr.load_lotr(other, tmp_path / "out")
    x = torch.randn(4, 12)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


def test_starts_from_weight_deltas() -> None:
    torch.manual_seed(0)
    base, tuned = Net().eval(), Net().eval()
    left, right = torch.randn(12, 3), torch.randn(12, 3)
    deltas = {f"layer.{k}.query": left @ torch.randn(3, 3) @ right.T * 0.1 for k in range(3)}
    tuned.load_state_dict(base.state_dict())
    for name, delta in deltas.items():
        tuned.get_submodule(name).weight.data += delta
    model = lotr.load_lotr(base, deltas, rank=3, train="all")
    x = torch.randn(4, 12)
    torch.testing.assert_close(model(x), tuned(x), rtol=1e-4, atol=1e-4)
    assert layers(model)[0][1].lotr_core.requires_grad


def test_deltas_of_unlike_layers_have_their_own_ranks() -> None:
    """More rank than a group has is cut; another grouping is another fit of the same deltas."""
    torch.manual_seed(0)
    names = [f"layer.{k}.{kind}" for k in range(3) for kind in ("query", "value", "up")]
    deltas = {n: torch.randn_like(Net().get_submodule(n).weight) * 0.1 for n in names}
    model = lotr.load_lotr(Net(), deltas, rank=(64, 64), group_by="qv=query|value")
    ranks = {name: factors.rank for name, factors in model.lotr_factors.groups()}
    assert ranks == {"qv": (12, 12), "up": (20, 12)}
    for name, layer in layers(model):
        torch.testing.assert_close(layer.delta_weight(), deltas[name], rtol=1e-4, atol=1e-5)


def lora(names: list[str], rank: int = 2) -> lt.LoraAdapter:
    from lotrtensor.adapters.modules import LoraModule

    rng = np.random.default_rng(0)
    shapes = {name: tuple(Net().get_submodule(name).weight.shape) for name in names}
    modules = [
        LoraModule(
            name,
            rng.normal(size=(m, rank)).astype(np.float32) * 0.3,
            rng.normal(size=(rank, n)).astype(np.float32) * 0.3,
        )
        for name, (m, n) in shapes.items()
    ]
    return lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))


def test_starts_from_a_lora() -> None:
    torch.manual_seed(0)
    base, tuned = Net().eval(), Net().eval()
    tuned.load_state_dict(base.state_dict())
    adapter = lora([f"layer.{k}.{name}" for k in range(3) for name in ("query", "up")])
    for module in adapter.modules:
        tuned.get_submodule(module.name).weight.data += torch.from_numpy(module.B @ module.A)
    model = lotr.load_lotr(base, adapter, rank=6)
    x = torch.randn(4, 12)
    torch.testing.assert_close(model(x), tuned(x), rtol=1e-4, atol=1e-4)
