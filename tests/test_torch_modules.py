"""The torch modules: outputs and gradients against a dense oracle, sharing, transforms."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from lotrtensor.torch.functional import add_update  # noqa: E402


class Block(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.value(torch.tanh(self.query(x)))
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, layers: int = 3, hidden: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(hidden, inner) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layer:
            x = block(x)
        return x


TARGETS = ["query", "value", "up", "down"]


def randomize(model: nn.Module) -> None:
    """Give the cores values, as training would."""
    for name, parameter in model.named_parameters():
        if name.endswith("lotr_core"):
            nn.init.normal_(parameter, std=0.03)


def adapted(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    model = lotr.apply_lotr(Net().to(dtype), TARGETS, **{"rank": (3, 4), **options})
    randomize(model)
    return model.eval()


def dense_twin(model: nn.Module) -> nn.Module:
    """The same net with W + scale · U G Vᵀ written out: an oracle that shares no code."""
    twin = Net().to(next(model.parameters()).dtype)
    own = dict(model.named_modules())
    with torch.no_grad():
        for name, layer in twin.named_modules():
            if isinstance(layer, nn.Linear):
                adapted_layer = own[name]
                u, v = adapted_layer.factors.left, adapted_layer.factors.right
                update = torch.einsum("mp,pq,nq->mn", u, adapted_layer.lotr_core, v)
                layer.weight.copy_(adapted_layer.base.weight + adapted_layer.scale * update)
                if layer.bias is not None:
                    layer.bias.copy_(adapted_layer.base.bias)
    return twin


@pytest.mark.parametrize("tokens", [2, 40], ids=["fewer tokens than m", "more tokens than m"])
def test_gradcheck(tokens: int) -> None:
    torch.manual_seed(0)
    m, n, p, q = 7, 6, 3, 2
    shapes = [(tokens, m), (tokens, n), (m, p), (p, q), (n, q)]
    arguments = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *a: add_update(*a, 0.7), arguments)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 7), lambda: Conv1D(7, 6)])
def test_gradcheck_of_a_layer(make) -> None:
    """Through the module: base, factors that are not its own, core."""
    torch.manual_seed(0)
    factors = lotr.SharedFactors((7, 6), (3, 2), dtype=torch.float64)
    layer = lotr.LotrLinear(make().double(), factors, scale=0.7)
    parameters = [*factors.parameters(), layer.lotr_core]
    for parameter in parameters:
        nn.init.normal_(parameter)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


def test_forward_equals_the_dense_module() -> None:
    model = adapted(torch.float64)
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense_twin(model)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 12), (4, 33, 12)])
def test_gradients_equal_those_of_the_dense_module(shape: tuple[int, ...]) -> None:
    model = adapted(torch.float64)
    twin = dense_twin(model)
    x = torch.randn(shape, dtype=torch.float64)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    expected = {id(f): [0.0, 0.0] for f in {layer.factors for _, layer in layers(model)}}
    weights = dict(twin.named_modules())
    for name, layer in layers(model):
        grad = layer.scale * weights[name].weight.grad
        u, g, v = layer.factors.left, layer.lotr_core, layer.factors.right
        torch.testing.assert_close(g.grad, u.T @ grad @ v, rtol=1e-10, atol=1e-10)
        expected[id(layer.factors)][0] += grad @ v @ g.T
        expected[id(layer.factors)][1] += grad.T @ u @ g
    for factors in {layer.factors for _, layer in layers(model)}:
        left, right = expected[id(factors)]
        torch.testing.assert_close(factors.left.grad, left, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(factors.right.grad, right, rtol=1e-10, atol=1e-10)


def layers(model: nn.Module) -> list[tuple[str, lotr.LotrLinear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, lotr.LotrLinear)]


def test_merge_and_unmerge() -> None:
    model = adapted()
    x = torch.randn(9, 12)
    expected, weight = model(x), model.layer[0].query.weight.clone()
    lotr.merge(model)
    lotr.merge(model)  # a second time changes nothing
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.layer[0].query.weight, weight)
    lotr.unmerge(model)
    torch.testing.assert_close(model.layer[0].query.weight, weight)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_unload_merged_leaves_plain_layers() -> None:
    model = adapted()
    x = torch.randn(9, 12)
    expected = model(x)
    plain = lotr.unload(lotr.merge(model))
    assert not layers(plain)
    assert set(plain.state_dict()) == set(Net().state_dict())
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


def test_unload_unmerged_gives_the_base_back() -> None:
    torch.manual_seed(0)
    base = Net()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = lotr.apply_lotr(base, TARGETS, rank=2)
    randomize(model)
    lotr.unload(model)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_safe_merge_refuses_and_leaves_every_weight() -> None:
    model = adapted()
    before = {name: layer.weight.clone() for name, layer in layers(model)}
    last = layers(model)[-1][1]
    last.lotr_core.data[0, 0] = float("nan")
    with pytest.raises(lt.DataError, match=r"layer\.2\.down.*NaN"):
        lotr.merge(model, safe=True)
    for name, layer in layers(model):
        assert torch.equal(layer.weight, before[name])
        assert not layer.merged


def shared_once(model: nn.Module) -> bool:
    """Whether layers still read the very parameters that the table owns, each registered once."""
    owned = {id(p) for p in model.lotr_factors.parameters()}
    read = {id(p) for _, layer in layers(model) for p in layer.factors.parameters()}
    names = [key for key in model.state_dict() if key.startswith("lotr_factors.")]
    return owned == read and len(names) == len(owned) == 8


@pytest.mark.parametrize(
    "transform",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.float64),
        lambda model: model.to("meta").to_empty(device="cpu"),
        lambda model: model.half().float(),
    ],
    ids=["deepcopy", "pickle", "to float64", "to_empty", "half and back"],
)
def test_sharing_survives(transform) -> None:
    model = adapted()
    assert shared_once(model)
    assert shared_once(transform(model))


def test_a_deep_copy_is_independent() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    x = torch.randn(3, 12)
    expected = model(x)
    with torch.no_grad():
        for parameter in twin.lotr_factors.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(twin(x), expected)


def test_state_dict_round_trip_keeps_sharing_and_values() -> None:
    model = adapted()
    buffer = io.BytesIO()
    torch.save(lotr.lotr_state_dict(model), buffer)
    buffer.seek(0)
    torch.manual_seed(0)
    other = lotr.apply_lotr(Net(), TARGETS, rank=(3, 4)).eval()
    result = other.load_state_dict(torch.load(buffer), strict=False)
    assert not result.unexpected_keys
    assert shared_once(other)
    x = torch.randn(3, 12)
    assert torch.equal(other(x), model(x))


def test_assigning_a_state_dict_keeps_sharing() -> None:
    model = adapted()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    other = lotr.apply_lotr(Net(), TARGETS, rank=(3, 4)).eval()
    other.load_state_dict(state, assign=True)
    assert shared_once(other)
    x = torch.randn(3, 12)
    assert torch.equal(other(x), model(x))


def test_optimiser_sees_every_parameter_once() -> None:
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len({id(p) for p in trained}) == 8 + 12
    numbers = 4 * 3 * 12  # the cores
    numbers += 2 * (12 * 3 + 12 * 4) + (20 * 3 + 12 * 4) + (12 * 3 + 20 * 4)
    assert sum(p.numel() for p in trained) == numbers


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_to_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    model = adapted()
    x = torch.randn(30, 12)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected)
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = adapted().train()
    x = torch.randn(4, 5, 12, requires_grad=True)
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    y = x
    for block in model.layer:
        y = checkpoint(block, y, use_reentrant=reentrant)
    y.square().sum().backward()
    for name, grad in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad)


def test_autocast_computes_in_half_precision_and_trains_in_float32() -> None:
    model = adapted()
    x = torch.randn(6, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model.layer[0].query(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model.layer[0].query(x), rtol=0.05, atol=0.1)
    y.float().sum().backward()
    assert model.layer[0].query.lotr_core.grad.dtype == torch.float32


def test_float32_factors_beside_a_half_precision_layer() -> None:
    base = nn.Linear(12, 10, dtype=torch.bfloat16)
    factors = lotr.SharedFactors((10, 12), (3, 4))
    for factor in factors.parameters():
        nn.init.normal_(factor, std=0.3)
    layer = lotr.LotrLinear(base, factors, scale=0.5)
    nn.init.normal_(layer.lotr_core)
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    dense = x.float() @ (base.weight.float() + layer.delta_weight()).T + base.bias.float()
    torch.testing.assert_close(y.float(), dense, rtol=0.02, atol=0.05)
    layer.merge()
    assert base.weight.dtype == torch.bfloat16


def test_a_functional_call_reaches_the_shared_factors() -> None:
    model = adapted()
    x = torch.randn(3, 12)
    zeros = {
        n: torch.zeros_like(p) for n, p in model.named_parameters() if n.startswith("lotr_factors.")
    }
    assert len(zeros) == 8
    found = torch.func.functional_call(model, zeros, (x,))
    torch.testing.assert_close(found, lotr.unload(model)(x))


@pytest.mark.parametrize("nested", [False, True], ids=["layer", "encoder with padding"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fused_transformer_layer_does_not_lose_the_update(nested: bool) -> None:
    """In evaluation PyTorch runs it in one kernel that calls none of its layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if nested else layer
    lotr.apply_lotr(model.eval(), ["linear1", "linear2"], rank=2)
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    options = {"src_key_padding_mask": mask} if nested else {}
    with torch.no_grad():
        plain = model(x, **options)
        randomize(model)
        model.apply(lambda m: m.lotr_core.data.mul_(30) if isinstance(m, lotr.LotrLinear) else None)
        adapted_output = model(x, **options)
        assert (adapted_output - plain)[~mask if nested else ...].abs().max() > 1e-3
        merged = lotr.unload(lotr.merge(model))(x, **options)
    seen = ~mask if nested else torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(merged[seen], adapted_output[seen], rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_the_update_alone() -> None:
    model = adapted(dropout=0.5)
    layer = model.layer[0].query
    x = torch.randn(6, 12)
    assert torch.equal(model.eval()(x), model(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lotr_core.data.zero_()
    assert torch.equal(layer(x), layer.base(x))
