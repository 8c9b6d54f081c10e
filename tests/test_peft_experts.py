"""The PEFT method on fused experts."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import lotrtensor as lt  # noqa: E402
from lotrtensor.peft import LotrConfig, hotswap_adapter  # noqa: E402
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
from tests.peft_models import THIRD_PARTY  # noqa: E402

pytestmark = pytest.mark.filterwarnings(THIRD_PARTY)


def near(found, expected, most=1e-6):
    """Models normalise in float32 whatever their type."""
    return float((found - expected).detach().norm()) < most * float(expected.detach().norm())


def adapted(name="mixtral", seed=1, base=None, rank=(3, 5), dtype=torch.float64, **options):
    base = tiny(name, dtype) if base is None else base
    config = LotrConfig(r=rank, target_parameters=TARGETS, **options)
    return base, randomise(peft.get_peft_model(copy.deepcopy(base), config), seed=seed)


def deltas(model, adapter="default"):
    """Dense ΔW_e of every expert, from the tensors that the adapter is saved as."""
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    found = {}
    for group in model.base_model.plans(adapter):
        left = state[f"base_model.lotr_left.{group.name}"]
        right = state[f"base_model.lotr_right.{group.name}"]
        for name in group.modules:
            core = state[f"base_model.model.{name}.lotr_core"]
            found[name] = group.scale * left @ core @ right.T
    return found


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_model_computes_what_dense_weights_do(name):
    base, model = adapted(name)
    expected = logits(with_dense(base, deltas(model)))
    assert not near(expected, logits(base), 0.1)
    assert near(logits(model), expected)
    with model.disable_adapter():
        assert near(logits(model), logits(base))
    assert near(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_only_factors_and_cores_train_and_are_saved_once(name, tmp_path):
    base, model = adapted(name)
    expected = 0
    for experts in experts_of(base).values():
        for count, m, n in (experts.gate_up_proj.shape, experts.down_proj.shape):
            if name == "gpt_oss":
                m, n = n, m
            expected += 3 * m + 5 * n + 15 * count
    assert model.get_nb_trainable_parameters()[0] == expected
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "adapter")
    assert lt.load(tmp_path / "adapter").parameters == expected
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").double()
    assert near(logits(again), logits(model))
    assert again.get_nb_trainable_parameters()[0] == 0
    assert again.peft_config["default"].target_parameters == sorted(TARGETS)


@pytest.mark.parametrize("name", MODELS)
def test_merge_unmerge_and_unload(name):
    base, model = adapted(name)
    expected, before = logits(with_dense(base, deltas(model))), base.state_dict()
    model.merge_adapter(safe_merge=True)
    assert near(logits(model), expected)
    model.unmerge_adapter()
    assert near(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert near(logits(model), logits(base))
    merged = model.merge_and_unload()
    assert near(logits(merged), expected)
    assert merged.state_dict().keys() == before.keys()
    _, model = adapted(name)
    plain = model.unload()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_safe_merge_of_what_is_not_finite_leaves_every_weight():
    base, model = adapted()
    update = model.base_model.model.model.layers[1].mlp.experts.down_proj
    with torch.no_grad():
        update.lotr_core["default"][2, 0, 0] = torch.inf
    with pytest.raises(lt.DataError, match=r"expert 2 of model\.layers\.1.*down_proj.*NaN"):
        model.merge_adapter(safe_merge=True)
    for key, value in model.unload().state_dict().items():
        assert torch.equal(value, base.state_dict()[key])


def test_several_adapters_are_switched_added_shared_and_deleted():
    base, model = adapted()
    one = deltas(model)
    model.add_adapter("other", LotrConfig(r=2, target_parameters=TARGETS[:1]))
    model.set_adapter("other")
    randomise(model, seed=5)
    two = deltas(model, "other")
    assert set(two) < set(one)
    assert near(logits(model), logits(with_dense(base, two)))
    model.set_adapter("default")
    assert near(logits(model), logits(with_dense(base, one)))
    model.base_model.set_adapter(["default", "other"])
    both = {name: delta + two.get(name, 0) for name, delta in one.items()}
    assert near(logits(model), logits(with_dense(base, both)))
    model.set_adapter("default")
    model.add_adapter("third", LotrConfig(share_factors="default"))
    model.set_adapter("third")
    assert model.get_nb_trainable_parameters()[0] == 15 * 4 * 4
    model.set_adapter("default")
    model.delete_adapter("third")
    model.delete_adapter("other")
    assert near(logits(model), logits(with_dense(base, one)))


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_sums(combination):
    base, model = adapted()
    model.add_adapter("other", LotrConfig(r=2, target_parameters=TARGETS, init="paper"))
    model.set_adapter("other")
    randomise(model, seed=5)
    one, two = deltas(model), deltas(model, "other")
    error = model.add_weighted_adapter(
        ["default", "other"], [0.5, -2.0], "sum", combination_type=combination, svd_rank=None
    )
    model.set_adapter("sum")
    found = deltas(model, "sum")
    expected = {name: 0.5 * one[name] - 2.0 * two[name] for name in one}
    lost = sum(float((found[n] - expected[n]).norm() ** 2) for n in one)
    whole = sum(float(x.norm() ** 2) for x in expected.values())
    assert (lost / whole) ** 0.5 == pytest.approx(error, abs=1e-6)
    assert (error < 1e-6) == (combination == "cat")
    assert near(logits(model), logits(with_dense(base, found)), 1e-4)


def test_another_adapter_is_swapped_in(tmp_path):
    base, model = adapted()
    _, other = adapted(seed=7, base=base)
    other.save_pretrained(tmp_path / "other")
    hotswap_adapter(model, tmp_path / "other")
    assert near(logits(model), logits(other))


def test_linear_layers_beside_experts_and_layers_left_out():
    base = tiny("deepseek_v3")
    options = {"target_modules": ["q_b_proj"], "exclude_modules": ["layers.0.self_attn.q_b_proj"]}
    _, model = adapted(base=base, **options)
    names = {name for group in model.base_model.plans("default") for name in group.modules}
    assert {n for n in names if "experts" not in n} == {"model.layers.1.self_attn.q_b_proj"}
    assert len(names) == 1 + 2 * 8
    merged = logits(copy.deepcopy(model).merge_and_unload())
    assert near(logits(model), merged)


def test_experts_of_a_layer_are_left_out():
    _, model = adapted(exclude_modules=["layers.0.mlp.experts"])
    names = {name for group in model.base_model.plans("default") for name in group.modules}
    assert all(name.startswith("model.layers.1.") for name in names)


def test_factors_are_shared_over_layers_where_a_pattern_says_so():
    base, model = adapted(group_by="up=gate_up_proj,down=down_proj", init="svd")
    assert [plan.name for plan in model.base_model.plans("default")] == ["up", "down"]
    assert near(logits(model), logits(with_dense(base, deltas(model))))


def test_an_adapter_starts_from_a_trained_one(tmp_path):
    base, model = adapted()
    model.save_pretrained(tmp_path / "trained")
    config = LotrConfig(r=(3, 5), init=str(tmp_path / "trained"))
    again = peft.get_peft_model(copy.deepcopy(base), config)
    assert near(logits(again), logits(model), 1e-5)


def test_random_cores_and_half_precision():
    base = tiny("gpt_oss", torch.bfloat16)
    config = LotrConfig(r=4, target_parameters=TARGETS, init_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert not torch.equal(logits(model), logits(base))
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_checkpointed_layers_give_the_same_gradients():
    _, model = adapted("qwen3_moe")
    model.train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            base, name = model.base_model.model, "activation_checkpointing_enable"
            enable = getattr(base, name, None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target_parameters": ["experts.w1"]}, lt.FormatError, r"'experts\.w1'.*not found"),
        ({"target_parameters": ["gate.weight"]}, lt.ShapeError, r"mlp\.gate\.weight is \(4, 32\)"),
        ({"target_parameters": TARGETS, "r": 33}, lt.RankError, r"experts\.0\.down_proj"),
        (
            {"target_parameters": TARGETS, "layers_to_transform": [0]},
            lt.UnsupportedAdapterError,
            "layers_to_transform",
        ),
        (
            {"target_parameters": TARGETS, "group_by": r"few=experts\.[01]\.down"},
            lt.FormatError,
            "does not divide",
        ),
    ],
)
def test_what_cannot_be_adapted_is_named_and_the_model_is_as_it_was(options, error, text):
    model = tiny("mixtral")
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(error, match=text):
        peft.get_peft_model(model, LotrConfig(**{"r": 2, **options}))
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_module_that_is_a_parameter_of_experts_is_refused_with_the_way_out(name):
    text = f"'{name}', which is not found.*target_parameters names: .*'experts.gate_up_proj'"
    with pytest.raises(lt.FormatError, match=text):
        peft.get_peft_model(tiny("qwen3_moe"), LotrConfig(r=2, target_modules=["q_proj", name]))


def test_a_slip_of_the_pen_is_not_taken_for_experts():
    with pytest.raises(lt.FormatError, match=r"'q_porj', which is not found.*correct it"):
        peft.get_peft_model(tiny("qwen3_moe"), LotrConfig(r=2, target_modules=["q_porj"]))


@pytest.mark.parametrize("targets", [["q_b_proj", "down_proj"], r".*\.(q_b_proj|down_proj)"])
def test_experts_that_other_modules_share_a_name_with_are_left_out_with_a_word(targets):
    with pytest.warns(lt.LotrWarning, match="'down_proj', and experts are left as they are"):
        model = peft.get_peft_model(tiny("deepseek_v3"), LotrConfig(r=2, target_modules=targets))
    names = {name for group in model.base_model.plans("default") for name in group.modules}
    assert any("shared_experts.down_proj" in name for name in names)
    assert not any(".experts.0." in name for name in names)


def test_a_file_of_other_experts_is_refused_and_the_model_is_as_it_was(tmp_path):
    _, model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    base = tiny("deepseek_v3")
    before = {n: id(m) for n, m in base.named_modules()}
    with pytest.raises(lt.FormatError, match="made for another model"):
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert {n: id(m) for n, m in base.named_modules()} == before


@pytest.mark.parametrize("targets", ["experts.down_proj", [], [3], 7])
def test_targets_that_are_no_names_are_refused(targets):
    with pytest.raises(lt.OptionError, match="target_parameters is"):
        LotrConfig(target_parameters=targets)


def test_mixed_batches_are_refused():
    _, model = adapted()
    model.eval()
    with pytest.raises(lt.UnsupportedAdapterError, match=r"experts.*which row"):
        model(TOKENS, adapter_names=["default", "__base__"])
