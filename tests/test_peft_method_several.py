"""Several adapters of one model: weighted sums, swaps, references; and transformers' own doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import (  # noqa: E402
    AutoPeftModelForFeatureExtraction,
    PeftModel,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter as hotswap_lora  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModel  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.peft as lotr  # noqa: E402
from tests.peft_models import (  # noqa: E402
    THIRD_PARTY,
    bert,
    config,
    gpt2,
    ids,
    lotr_layers,
    output,
    randomize,
    weighted,
)

pytestmark = pytest.mark.filterwarnings(THIRD_PARTY)


def deltas(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """ΔW of an adapter by hand, in float64, m × n."""
    found = {}
    for name, layer in lotr_layers(model).items():
        if adapter in layer.lotr_core:
            left, right = layer.lotr_shared[adapter].left, layer.lotr_shared[adapter].right
            core = layer.lotr_core[adapter]
            parts = [x.detach().double() for x in (left, core, right.T)]
            found[name] = layer.lotr_scale[adapter] * torch.linalg.multi_dot(parts)
    return found


def weighted_deltas(model: nn.Module, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in weights.items():
        for name, delta in deltas(model, adapter).items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(expected)
    lost2 = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((lost2 / sum(delta.square().sum() for delta in expected.values())).sqrt())


def several(make=bert, **options: Any) -> nn.Module:
    """Adapters of unlike ranks, scales and layers."""
    model = get_peft_model(make(), config(**options), adapter_name="a")
    model.add_adapter("b", config(r=(5, 2), lotr_alpha=7.0, **options))
    model.add_adapter("c", config(r=2, target_modules=["query"], use_rslora=True))
    for seed, name in enumerate("abc"):
        randomize(model, name, seed)
    return model


WEIGHTS = {"a": 0.5, "b": -1.25, "c": 2.0}


@pytest.mark.parametrize("group_by", ["type", "shape"])
def test_a_sum_by_concatenation_is_exact(group_by: str) -> None:
    model = several(group_by=group_by)
    expected = weighted_deltas(model, WEIGHTS)
    before = output(model)
    stated = model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", "cat")
    assert torch.equal(output(model), before)
    assert error(deltas(model, "sum"), expected) < 1e-6
    assert stated < 1e-6
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum" in n)
    model.set_adapter("sum")
    plain = bert()
    with torch.no_grad():
        for name, delta in expected.items():
            plain.get_submodule(name.removeprefix("base_model.model.")).weight += delta.float()
    torch.testing.assert_close(output(model), output(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 3, (4, 6), 100])
def test_a_rounded_sum_states_its_error(rank) -> None:
    model = several()
    expected = weighted_deltas(model, WEIGHTS)
    stated = model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", svd_rank=rank)
    found = error(deltas(model, "sum"), expected)
    assert stated == pytest.approx(found, rel=1e-3, abs=1e-6)
    p, q = (5, 4) if rank is None else (rank, rank) if isinstance(rank, int) else rank
    # No subspaces of these ranks do better than the tails of the unfoldings of each group.
    tails = {}
    for kind in ("query", "value", "intermediate.dense"):
        members = [delta for name, delta in expected.items() if name.endswith(kind)]
        wide = (torch.cat(members, dim=1), torch.cat([d.T for d in members], dim=1))
        tails[kind] = [
            float(torch.linalg.svdvals(x)[r:].square().sum())
            for x, r in zip(wide, (p, q), strict=True)
        ]
    whole = sum(float(delta.square().sum()) for delta in expected.values())
    lower = (sum(max(t) for t in tails.values()) / whole) ** 0.5
    upper = (sum(sum(t) for t in tails.values()) / whole) ** 0.5
    assert lower * (1 - 1e-6) <= found <= upper * (1 + 1e-6) + 1e-6
    assert rank != 3 or found > 0.05
    assert model.peft_config["sum"].groups[0]["rank"] != [100, 100]


def test_a_sum_of_conv1d_and_embeddings_goes_to_disk_and_back(tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn", "wpe"]}
    model = get_peft_model(gpt2(), config(**options), adapter_name="a")
    model.add_adapter("b", config(**options, r=2))
    randomize(model, "a"), randomize(model, "b", seed=1)
    expected = weighted_deltas(model, {"a": 1.0, "b": 1.0})
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="cat")
    assert error(deltas(model, "sum"), expected) < 1e-6
    model.set_adapter("sum")
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    again = PeftModel.from_pretrained(gpt2(), str(tmp_path / "sum"))
    torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-5)
    assert lt.load(tmp_path / "sum").parameters == sum(
        p.numel() for n, p in model.named_parameters() if ".sum" in n
    )


def test_cores_of_shared_factors_add_up_at_the_same_rank() -> None:
    model = get_peft_model(bert(), config(), adapter_name="a")
    model.add_adapter("b", config(share_factors="a"))
    randomize(model, "a"), randomize(model, "b", seed=1)
    expected = weighted_deltas(model, {"a": 2.0, "b": -1.0})
    for kind in ("linear", "cat"):
        assert model.add_weighted_adapter(["a", "b"], [2.0, -1.0], kind, kind) < 1e-6
        assert error(deltas(model, kind), expected) < 1e-6
        assert {tuple(g["rank"]) for g in model.peft_config[kind].groups} == {(3, 4)}


def test_ranks_never_exceed_the_layers() -> None:
    model = get_peft_model(bert(), config(r=20), adapter_name="a")
    model.add_adapter("b", config(r=20))
    randomize(model, "a"), randomize(model, "b", seed=1)
    expected = weighted_deltas(model, {"a": 1.0, "b": 1.0})
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    assert error(deltas(model, "sum"), expected) < 1e-6
    assert max(max(g["rank"]) for g in model.peft_config["sum"].groups) <= 40


def test_a_tied_head_follows_the_sum() -> None:
    options = {"target_modules": ["wte"], "ensure_weight_tying": True}
    model = get_peft_model(gpt2(), config(**options), adapter_name="a")
    model.add_adapter("b", config(**options))
    randomize(model, "a"), randomize(model, "b", seed=1)
    delta = weighted_deltas(model, {"a": 1.0, "b": 1.0})["base_model.model.transformer.wte"]
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    plain = gpt2()
    plain.transformer.wte.weight.data += delta.T.float()
    assert plain.lm_head.weight is plain.transformer.wte.weight
    torch.testing.assert_close(output(model), output(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((["a", "x"], [1, 1], "sum"), {}, lt.FormatError, "no adapter 'x'"),
        ((["a"], [1], "b"), {}, lt.FormatError, "an adapter 'b' already"),
        ((["a", "b"], [1], "sum"), {}, lt.DataError, "expected one finite"),
        (([], [], "sum"), {}, lt.DataError, "an adapter at the least"),
        ((["a", "b"], [1, float("nan")], "sum"), {}, lt.DataError, "finite"),
        ((["a", "a"], [1, 1], "sum"), {}, lt.DataError, "twice"),
        ((["a", "b"], [1, 1], "sum", "ties"), {}, lt.UnsupportedAdapterError, "'ties'.*'cat'"),
        ((["a", "b"], [1, 1], "sum", "dare_linear_svd"), {}, lt.UnsupportedAdapterError, "dare"),
        ((["a", "b"], [1, 1], "sum", "linear"), {}, lt.UnsupportedAdapterError, "'cat'"),
        ((["a", "b"], [1, 1], "sum"), {"density": 0.5}, lt.UnsupportedAdapterError, "density"),
        ((["a", "b"], [1, 1], "sum"), {"svd_clamp": 1}, lt.UnsupportedAdapterError, "svd_clamp"),
        ((["a", "b"], [1, 1], "sum", "cat"), {"svd_rank": 3}, lt.UnsupportedAdapterError, "rank"),
        ((["a", "b"], [1, 1], "sum"), {"svd_rank": 0}, lt.RankError, "rank is 0"),
        ((["a", "b"], [1, 1], "left"), {}, lt.FormatError, "cannot be named"),
    ],
)
def test_sums_that_have_no_meaning(arguments, options, kind, message: str) -> None:
    model = several()
    keys = list(model.state_dict())
    with pytest.raises(kind, match=message):
        model.add_weighted_adapter(*arguments, **options)
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["a", "b", "c"]


def test_a_head_has_no_weighted_sum() -> None:
    model = get_peft_model(bert(), config(modules_to_save=["LayerNorm"]), adapter_name="a")
    with pytest.raises(lt.UnsupportedAdapterError, match="'a' has modules_to_save"):
        model.add_weighted_adapter(["a"], [1.0], "sum")


# Swapping in place


def saved(directory: Path, seed: int, **options: Any) -> Path:
    model = get_peft_model(bert(), config(**options))
    randomize(model, seed=seed)
    model.save_pretrained(str(directory))
    return directory


def expected_of(directory: Path) -> torch.Tensor:
    return output(PeftModel.from_pretrained(bert(), str(directory)))


@pytest.mark.parametrize("options", [{}, {"r": (2, 4), "lotr_alpha": 3.0}])
@pytest.mark.filterwarnings("ignore:.*CheckpointFunction:DeprecationWarning")
def test_a_swap_takes_the_place_of_an_adapter_and_compiles_nothing(tmp_path: Path, options) -> None:
    first, second = saved(tmp_path / "1", 1), saved(tmp_path / "2", 2, **options)
    model = PeftModel.from_pretrained(bert(), str(first)).eval()
    compiled, x = torch.compile(model, backend="eager"), ids()
    with torch.no_grad():
        compiled(x)
        lotr.hotswap_adapter(compiled, second)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(x)[0]
    torch.testing.assert_close(found, expected_of(second), rtol=1e-4, atol=1e-5)
    lotr.hotswap_adapter(model, first)
    torch.testing.assert_close(output(model), expected_of(first), rtol=1e-4, atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(expected_of(tmp_path / "again"), output(model))


def test_swaps_that_are_refused(tmp_path: Path) -> None:
    first, wide = saved(tmp_path / "1", 1), saved(tmp_path / "2", 2, r=6)
    fewer = saved(tmp_path / "3", 3, target_modules=["query"])
    model = PeftModel.from_pretrained(bert(), str(first))
    before = output(model)
    for directory, message in (
        (wide, r"rank \(6, 6\) in the directory and \(3, 4\)"),
        (fewer, "is not the same set of layers"),
        (tmp_path / "none", "none"),
    ):
        with pytest.raises(lt.FormatError, match=message):
            lotr.hotswap_adapter(model, directory)
    with pytest.raises(lt.FormatError, match="no adapter 'other'"):
        lotr.hotswap_adapter(model, first, "other")
    with pytest.raises(lt.FormatError, match="no LoTR adapter"):
        lotr.hotswap_adapter(bert(), first)
    assert torch.equal(output(model), before)
    model.add_adapter("other", config(share_factors="default"))
    with pytest.raises(lt.UnsupportedAdapterError, match="share their factors"):
        lotr.hotswap_adapter(model, first)
    model.delete_adapter("other")
    model.merge_adapter()
    with pytest.raises(lt.UnsupportedAdapterError, match="unmerge_adapter first"):
        lotr.hotswap_adapter(model, first)


def test_pefts_own_swap_is_refused_and_leaves_the_model(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(bert(), str(saved(tmp_path / "1", 1)))
    before = output(model)
    with pytest.raises(ValueError, match=r"only supports .*LORA but LOTR"):
        hotswap_lora(model, str(saved(tmp_path / "2", 2)), adapter_name="default")
    assert torch.equal(output(model), before)


# Preference training: a trained adapter beside a frozen reference


def test_a_reference_adapter_stays_as_it_is(tmp_path: Path) -> None:
    directory = saved(tmp_path / "sft", 1)
    model = PeftModel.from_pretrained(
        bert(), str(directory), adapter_name="policy", is_trainable=True
    )
    model.load_adapter(str(directory), adapter_name="reference")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = ids()
    for _ in range(3):
        model.set_adapter("reference", inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            reference = model(x)[0]
        model.set_adapter("policy")
        optimizer.zero_grad()
        weighted(model(x)[0] - reference).backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    trained = {n for n in start if ".policy" in n}
    assert changed == trained
    model.set_adapter("reference")
    torch.testing.assert_close(output(model), expected_of(directory))
    with model.disable_adapter():
        torch.testing.assert_close(output(model), output(bert()))
    model.set_adapter("policy")
    model.save_pretrained(str(tmp_path / "dpo"), selected_adapters=["policy"])
    torch.testing.assert_close(expected_of(tmp_path / "dpo" / "policy"), output(model))


# transformers' own doors


def refusal() -> Any:
    return pytest.raises(lt.UnsupportedAdapterError, match=r"PeftModel\.from_pretrained")


def test_transformers_own_adapters_are_refused_and_the_way_out_is_open(tmp_path: Path) -> None:
    base = bert()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    randomize(model)
    model.save_pretrained(str(tmp_path / "lotr"))
    expected = output(model)

    plain = bert()
    keys = list(plain.state_dict())
    with refusal():
        plain.add_adapter(config())
    with refusal():
        plain.load_adapter(str(tmp_path / "lotr"))
    with refusal():
        AutoModel.from_pretrained(str(tmp_path / "lotr"))
    assert list(plain.state_dict()) == keys
    torch.testing.assert_close(output(plain), output(bert()))

    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "lotr"))
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(expected_of(tmp_path / "again"), expected, rtol=1e-4, atol=1e-5)
    auto = AutoPeftModelForFeatureExtraction.from_pretrained(str(tmp_path / "lotr"))
    torch.testing.assert_close(output(auto), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_adapter_is_swapped_for_a_tied_one_alone(tmp_path: Path) -> None:
    for name, tie in (("tied", True), ("other", True), ("loose", False)):
        one = get_peft_model(gpt2(), config(target_modules=["wte"], ensure_weight_tying=tie))
        randomize(one, seed=len(name))
        one.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
    model = PeftModel.from_pretrained(gpt2(), str(tmp_path / "tied"))
    with pytest.raises(lt.FormatError, match="ensure_weight_tying is True in the model"):
        lotr.hotswap_adapter(model, tmp_path / "loose")
    lotr.hotswap_adapter(model, tmp_path / "other")
    expected = PeftModel.from_pretrained(gpt2(), str(tmp_path / "other"))
    torch.testing.assert_close(output(model), output(expected), rtol=1e-5, atol=1e-5)
