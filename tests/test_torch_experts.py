"""Fused experts in plain torch: against dense weights, and what is refused."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from lotrtensor.torch.examples import tiny_experts  # noqa: E402
from lotrtensor.torch.grouped import Routing, grouped_product  # noqa: E402
from tests.moe_models import (  # noqa: E402
    MODELS,
    TARGETS,
    TOKENS,
    experts_of,
    logits,
    randomise,
    tiny,
    with_dense,
)


def adapted(name, rank=(3, 5), **options):
    model = tiny(name)
    return model, randomise(
        lotr.apply_lotr(copy.deepcopy(model), target_parameters=TARGETS, rank=rank, **options)
    )


def deltas(model):
    """Dense ΔW_e of every expert, from nothing but the state dict."""
    found = {}
    state = model.state_dict()
    for path in experts_of(model):
        for parameter in ("gate_up_proj", "down_proj"):
            update = model.get_submodule(f"{path}.{parameter}")
            group = next(name for name, f in model.lotr_factors.groups() if f is update.factors)
            key = "lotr_factors.:" + group.replace(".", "%2E")
            left, right = state[f"{key}.left"], state[f"{key}.right"]
            for e, core in enumerate(state[f"{path}.{parameter}.lotr_core"]):
                found[f"{path}.{e}.{parameter}"] = update.scale * left @ core @ right.T
    return found


def near(found, expected, most=1e-6):
    """Models normalise in float32 whatever their type."""
    return float((found - expected).detach().norm()) < most * float(expected.detach().norm())


@pytest.mark.parametrize("group_by", ["type", "gate_up_proj,down_proj"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_model_computes_what_dense_weights_do(name, group_by):
    base, model = adapted(name, group_by=group_by)
    expected = logits(with_dense(base, deltas(model)))
    assert (expected - logits(base)).abs().max() > 0.1
    assert near(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_dense_weights(name):
    base, model = adapted(name)
    model(TOKENS, labels=TOKENS).loss.backward()
    dense = with_dense(base, deltas(model))
    dense(TOKENS, labels=TOKENS).loss.backward()
    path, experts = next(iter(experts_of(dense).items()))
    for parameter in ("gate_up_proj", "down_proj"):
        grads = getattr(experts, parameter).grad
        grads = grads.mT if name == "gpt_oss" else grads
        update = model.get_submodule(f"{path}.{parameter}")
        left, right = update.factors.left, update.factors.right
        expected = update.scale * left.T @ grads @ right
        assert near(update.lotr_core.grad, expected)
        wide = update.scale * torch.einsum("emn,nq,epq->mp", grads, right, update.lotr_core)
        assert near(left.grad, wide)
        wide = update.scale * torch.einsum("emn,mp,epq->nq", grads, left, update.lotr_core)
        assert near(right.grad, wide)


@pytest.mark.parametrize("name", MODELS)
def test_it_starts_as_the_model_was_and_shares_over_the_experts_of_a_layer(name):
    base = tiny(name)
    model = lotr.apply_lotr(copy.deepcopy(base), target_parameters=TARGETS, rank=2)
    assert near(logits(model), logits(base))
    groups = [group for group, _ in model.lotr_factors.groups()]
    assert len(groups) == 2 * len(experts_of(base))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = 0
    for experts in experts_of(base).values():
        for parameter in (experts.gate_up_proj, experts.down_proj):
            count, m, n = parameter.shape
            expected += 2 * (m + n) + 4 * count
    assert trained == expected


@pytest.mark.parametrize("name", MODELS)
def test_merge_unmerge_and_unload(name):
    base, model = adapted(name)
    expected, before = logits(with_dense(base, deltas(model))), base.state_dict()
    lotr.merge(model, safe=True)
    assert near(logits(model), expected)
    lotr.unmerge(model)
    assert near(logits(model), expected)
    lotr.unload(model)
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-12)


def test_a_safe_merge_of_what_is_not_finite_leaves_every_weight():
    base, model = adapted("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.lotr_core[2, 0, 0] = torch.inf
    with pytest.raises(lt.DataError, match=r"layers\.1.*expert 2 of down_proj.*NaN or infinite"):
        lotr.merge(model, safe=True)
    lotr.unload(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, base.state_dict()[key])


@pytest.mark.parametrize("name", MODELS)
def test_saved_once_and_loaded_again(name, tmp_path):
    base, model = adapted(name)
    lotr.save_lotr(model, tmp_path / "adapter")
    adapter = lt.load(tmp_path / "adapter")
    assert adapter.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = {module for group in adapter.groups for module in group.modules}
    assert names == set(deltas(model))
    again = lotr.load_lotr(copy.deepcopy(base), tmp_path / "adapter")
    assert near(logits(again), logits(model))
    fresh = lotr.apply_lotr(copy.deepcopy(base), target_parameters=TARGETS, rank=(3, 5))
    lotr.load_lotr(fresh, adapter)
    assert near(logits(fresh), logits(model))


def test_a_lora_of_experts_starts_a_model():
    base, model = adapted("qwen3_moe")
    lora = lotr.to_adapter(model).to_lora()
    again = lotr.load_lotr(copy.deepcopy(base), lora, rank=5)
    assert near(logits(again), logits(model), 1e-4)


def test_linear_layers_and_experts_together_with_cores_alone():
    model = tiny("mixtral")
    lotr.apply_lotr(model, ["q_proj"], target_parameters=TARGETS, rank=2, train="cores")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 + 4
    assert all(name.endswith("lotr_core") for name in trained)
    groups = lotr.param_groups(model, 1e-3, core_lr=1e-2)
    assert [(len(g["params"]), g["lr"]) for g in groups] == [(6, 1e-2)]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    _, model = adapted(name)
    assert model.supports_gradient_checkpointing
    model.train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            name = "activation_checkpointing_enable"  # from transformers 5.2 on
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_come_near_to_full(name, dtype):
    base, model = adapted(name, rank=4)
    expected = logits(with_dense(base, deltas(model)))
    model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = logits(model)
        model(TOKENS, labels=TOKENS).loss.backward()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 0.1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_compiled_model_computes_the_same(name):
    _, model = adapted(name)
    model.float().train()
    model.config.use_cache = False
    model(TOKENS, labels=TOKENS).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    expected = logits(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)
    compiled(TOKENS, labels=TOKENS).loss.backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[key], rtol=1e-3, atol=1e-4)


def test_use_is_seen_and_weights_are_not_read_from_outside():
    _, model = adapted("mixtral")
    uses = lotr.check_adapted(model, {"input_ids": TOKENS})
    assert all(use.ran and not use.read_by for use in uses)
    assert len(uses) == 4


def test_svd_init_and_dropout():
    model = tiny("gpt_oss")
    dense = copy.deepcopy(model)
    lotr.apply_lotr(model, target_parameters=TARGETS, rank=2, init="svd", dropout=0.5)
    update = model.model.layers[0].mlp.experts.down_proj
    wide = torch.cat(list(dense.model.layers[0].mlp.experts.down_proj.mT), dim=1)
    u = torch.linalg.svd(wide)[0][:, :2]
    torch.testing.assert_close(update.factors.left.abs(), u.abs(), rtol=1e-8, atol=1e-8)
    randomise(model).train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("ends", [[3, 3, 8], [0, 0, 0], [0, 8, 8], [8, 8, 8]])
@pytest.mark.parametrize("widths", [(4, 8), (3, 5), (4, 3), (3, 4), (4, 1), (1, 4)])
def test_grouped_products_are_those_of_each_expert(ends, widths):
    torch.manual_seed(0)
    count = ends[-1]
    rows = torch.randn(count, widths[0], requires_grad=True)
    # Stored the other way round, as cores are.
    matrices = torch.randn(3, *widths[::-1]).mT.requires_grad_()
    found = grouped_product(rows, matrices, torch.tensor(ends, dtype=torch.int32))
    starts = [0, *ends[:-1]]
    expected = torch.cat([rows[a:b] @ w for a, b, w in zip(starts, ends, matrices, strict=True)])
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    grads = torch.autograd.grad((found * weight).sum(), [rows, matrices], retain_graph=True)
    wanted = torch.autograd.grad((expected * weight).sum(), [rows, matrices])
    torch.testing.assert_close(grads, wanted)


def test_routing_sorts_and_restores():
    index = torch.tensor([[2, 0], [0, 1], [2, 1]])
    route = Routing.of(index, 4)
    assert route.experts.tolist() == [0, 0, 1, 1, 2, 2]
    tokens = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)[:, None]
    assert route.spread(tokens)[:, 0].tolist() == [10, 20, 20, 30, 10, 30]
    assert route.ends.tolist() == [2, 4, 6, 6]
    rows = index.reshape(-1)[route.order].double()[:, None] + 1
    assert route.collect(rows)[:, 0].tolist() == [4.0, 3.0, 5.0]
    for function, like in ((route.spread, tokens), (route.collect, rows)):
        torch.autograd.gradcheck(function, [like.clone().requires_grad_()])


class Odd(torch.nn.Module):
    """Parameters that are not to be adapted."""

    def __init__(self):
        super().__init__()
        self.mixture = tiny_experts()
        self.mixture.experts.third = torch.nn.Parameter(torch.zeros(4, 2, 2))
        self.mixture.experts.wide = torch.nn.Parameter(torch.zeros(4, 2))
        self.bank = torch.nn.Module()
        self.bank.weight = torch.nn.Parameter(torch.zeros(4, 2, 2))
        self.mixture.experts.codes = torch.nn.Parameter(
            torch.zeros(4, 2, 2, dtype=torch.uint8), requires_grad=False
        )


@pytest.mark.parametrize(
    ("targets", "error", "text"),
    [
        (["experts.wide"], lt.ShapeError, r"mixture\.experts\.wide is \(4, 2\).*3-D"),
        (["router.weight"], lt.ShapeError, r"mixture\.router\.weight is \(4, 8\)"),
        (
            ["bank.weight"],
            lt.UnsupportedAdapterError,
            r"bank\.weight belongs to a Module.*interface",
        ),
        (
            ["experts.third"],
            lt.UnsupportedAdapterError,
            r"experts\.third.*gate_up_proj or down_proj",
        ),
        (["experts.codes"], lt.UnsupportedAdapterError, r"experts\.codes is quantised.*uint8"),
        (["experts.w1"], lt.FormatError, r"'experts\.w1'.*not found"),
        ([], lt.OptionError, "target_parameters is"),
        ("experts.down_proj", lt.OptionError, "expected a list"),
    ],
)
def test_what_cannot_be_adapted_is_named_and_nothing_changes(targets, error, text):
    model = Odd()
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(error, match=text):
        lotr.apply_lotr(model, target_parameters=targets, rank=2)
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for n, p in model.named_parameters() if "codes" not in n)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rank": 33}, lt.RankError, r"experts\.0\.down_proj.*choose p ≤ 32"),
        ({"rank": 2, "group_by": "a=experts"}, lt.ShapeError, "a.*together"),
        ({"rank": 2, "group_by": r"few=experts\.[01]\.down"}, lt.FormatError, "does not divide"),
    ],
)
def test_ranks_and_groups_that_do_not_fit_leave_the_model(options, error, text):
    model = tiny("mixtral")
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(error, match=text):
        lotr.apply_lotr(model, target_parameters=TARGETS, **options)
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_some_experts_or_of_a_compressed_form_is_refused():
    base, model = adapted("mixtral")
    adapter = lotr.to_adapter(model).to_lora()
    some = lt.LoraAdapter(adapter.modules[1:], {}, adapter.dtype)
    with pytest.raises(lt.FormatError, match=r"3 of the 4 experts of .*experts\.down_proj"):
        lotr.load_lotr(base, lt.convert(some, rank=2))
    apart = tuple(
        lt.LoraModule(m.name, *(torch.randn(*x.shape).numpy() for x in (m.B, m.A)))
        for m in adapter.modules
    )
    own = lt.compress(lt.LoraAdapter(apart, {}, adapter.dtype), tolerance=0.3)
    assert any(any(group.private_ranks) for group in own.groups)
    with pytest.raises(lt.UnsupportedAdapterError, match=r"experts\.0.*private factors"):
        lotr.load_lotr(base, own)
    assert all(p.requires_grad for p in base.parameters())


def test_a_compressed_adapter_whose_experts_share_everything_is_loaded():
    base, model = adapted("mixtral")
    small = lt.compress(lotr.to_adapter(model).to_lora(), tolerance=0.01)
    assert not any(any(group.private_ranks) for group in small.groups)
    loaded = lotr.load_lotr(copy.deepcopy(base), small)
    found = with_dense(base, {m.name: torch.from_numpy(m.B @ m.A) for m in small.to_lora().modules})
    assert near(logits(loaded), logits(found), 1e-4)


def test_experts_spread_over_devices_are_refused():
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(lt.UnsupportedAdapterError, match=r"layers\.1.*spread over devices"):
        lotr.apply_lotr(model, target_parameters=TARGETS, rank=2)


class Ungated(torch.nn.Module):
    """Experts without a gate, in × out, with biases and a norm of every expert's output."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = False, True, True, True
    num_experts = 4

    def __init__(self):
        super().__init__()
        self.up_proj = torch.nn.Parameter(torch.randn(4, 8, 6))
        self.up_proj_bias = torch.nn.Parameter(torch.randn(4, 6))
        self.down_proj = torch.nn.Parameter(torch.randn(4, 6, 8))
        self.down_proj_bias = torch.nn.Parameter(torch.randn(4, 8))
        self.post_expert_norm = torch.nn.LayerNorm(8)

    def act_fn(self, x):
        return torch.relu(x)

    def _apply_gate(self, x):
        raise AssertionError("there is no gate")

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for t, choices in enumerate(index.tolist()):
            for place, e in enumerate(choices):
                y = self.act_fn(x[t] @ self.up_proj[e] + self.up_proj_bias[e])
                y = self.post_expert_norm(y @ self.down_proj[e] + self.down_proj_bias[e])
                out[t] += weights[t, place] * y
        return out


def test_experts_without_a_gate_and_with_a_norm_of_their_outputs():
    torch.manual_seed(0)
    model = tiny_experts()
    model.experts = Ungated()
    model.double()
    dense, x = copy.deepcopy(model), torch.randn(9, 8, dtype=torch.float64)
    names = ["experts.up_proj", "experts.down_proj"]
    randomise(lotr.apply_lotr(model, target_parameters=names, rank=2))
    for name, update in model.experts.updates.items():
        for e in range(4):
            getattr(dense.experts, name).data[e] += update.delta_weight(e).T
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)
    alone = lotr.apply_lotr(lotr.unload(model), target_parameters=names[:1], rank=2)
    assert torch.isfinite(alone(x)).all()


def test_no_tokens_give_no_output():
    model = lotr.apply_lotr(tiny_experts(), target_parameters=TARGETS, rank=2)
    found = randomise(model)(torch.zeros(0, 8))
    assert found.shape == (0, 8)
    found.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
