"""LoTR as a PEFT method: what a user of PEFT expects of any method."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import get_peft_model  # noqa: E402
from torch import nn  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.peft as lotr  # noqa: E402
from lotrtensor.torch import param_groups  # noqa: E402
from tests.peft_models import (  # noqa: E402
    CORES,
    FACTORS,
    THIRD_PARTY,
    bert,
    classifier,
    config,
    gpt2,
    ids,
    lotr_layers,
    output,
    randomize,
    weighted,
)

pytestmark = pytest.mark.filterwarnings(THIRD_PARTY)


def test_base_package_imports_neither_torch_nor_peft() -> None:
    code = "import sys, lotrtensor; sys.exit(bool({'torch', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registered_without_a_change_of_pefts_enum() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    assert PEFT_TYPE_TO_CONFIG_MAPPING["LOTR"] is lotr.LotrConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LOTR"] is lotr.LotrModel
    assert "LOTR" not in peft.PeftType.__members__


@pytest.mark.parametrize("version", ["0.17.1", "0.20.0"])
def test_an_old_peft_is_refused_by_version(version: str) -> None:
    with pytest.raises(lotr.PeftVersionError, match=rf"needs peft 0\.21 or newer; found {version}"):
        lotr.check_peft(version)


def test_a_peft_without_the_hooks_is_refused() -> None:
    with pytest.raises(lotr.PeftVersionError, match="lacks _get_adapter_state_dict"):
        lotr.check_peft("0.99.0", object)


def test_the_base_output_is_unchanged_at_start() -> None:
    base = bert()
    expected = output(base)
    for init in ("orthogonal", "paper", "svd"):
        model = get_peft_model(bert(), config(init=init))
        assert torch.equal(output(model), expected)


def test_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(bert(), config())
    assert model.get_nb_trainable_parameters()[0] == CORES + FACTORS
    model.print_trainable_parameters()
    assert f"trainable params: {CORES + FACTORS:,}" in capsys.readouterr().out
    cores = get_peft_model(bert(), config(train="cores"))
    assert cores.get_nb_trainable_parameters()[0] == CORES
    names = [n for n, p in cores.named_parameters() if p.requires_grad]
    assert all("lotr_core" in name for name in names)


@pytest.mark.parametrize(
    ("rank", "parameters"),
    [(1, 1560), (2, 3168), (4, 6528), (8, 13824), (16, 30720), (32, 73728)],
)
def test_parameter_counts_of_the_papers_table(rank: int, parameters: int) -> None:
    """RoBERTa-base, query and value sharing one pair (arXiv 2402.01376)."""
    from transformers import RobertaConfig, RobertaModel

    with torch.device("meta"):
        base = RobertaModel(RobertaConfig(vocab_size=64))
    model = get_peft_model(
        base, lotr.LotrConfig(r=rank, target_modules=["query", "value"], group_by="shape")
    )
    assert model.get_nb_trainable_parameters()[0] == parameters


def test_param_groups_of_a_peft_model() -> None:
    model = get_peft_model(bert(), config())
    groups = param_groups(model, 1e-3, factor_lr=1e-4, core_lr=1e-2)
    assert [(g["lr"], len(g["params"])) for g in groups] == [(1e-4, 6), (1e-2, 9)]


def test_all_linear_and_layers_to_transform() -> None:
    model = get_peft_model(bert(), config(target_modules="all-linear"))
    assert len(lotr_layers(model)) == 18
    model.add_adapter("second", config(target_modules="all-linear"))
    assert all("second" in layer.lotr_core for layer in lotr_layers(model).values())
    some = get_peft_model(bert(), config(layers_to_transform=[0, 2]))
    assert {name.split(".layer.")[1][0] for name in lotr_layers(some)} == {"0", "2"}
    without = get_peft_model(bert(), config(exclude_modules=["value"]))
    assert not any(name.endswith("value") for name in lotr_layers(without))


def test_layers_of_a_group_read_one_pair() -> None:
    model = get_peft_model(bert(), config(group_by="qv=query|value"))
    layers = lotr_layers(model)
    by_factors = {id(layer.lotr_shared["default"]) for layer in layers.values()}
    assert len(by_factors) == 2
    keys = [key for key in model.state_dict() if "lotr_factors" in key]
    assert len(keys) == len(set(keys)) == 4


@pytest.mark.parametrize(
    "transform",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to(torch.float64)],
    ids=["deepcopy", "pickle", "to"],
)
def test_sharing_survives(transform) -> None:
    model = get_peft_model(bert(), config())
    randomize(model)
    expected = output(model)
    moved = transform(model)
    owned = {id(f) for f in moved.base_model.lotr_factors["default"].values()}
    read = {id(layer.lotr_shared["default"]) for layer in lotr_layers(moved).values()}
    assert owned == read
    torch.testing.assert_close(output(moved).float(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_factors_and_cores() -> None:
    model = get_peft_model(bert(), config())
    randomize(model)
    weighted(model(ids())[0]).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 15
    assert all(p.grad is not None and p.grad.norm() > 1e-3 for p in trained.values())


# Merging


@pytest.mark.parametrize("make", [bert, gpt2], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_unmerge_and_unload(make, safe: bool) -> None:
    targets = {} if make is bert else {"target_modules": ["c_attn", "c_fc"]}
    model = get_peft_model(make(), config(**targets))
    randomize(model)
    expected, before = output(model), output(make())
    assert not torch.allclose(expected, before, atol=1e-3)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    plain = model.merge_and_unload(safe_merge=safe)
    assert not lotr_layers(plain)
    assert set(plain.state_dict()) == set(make().state_dict())
    torch.testing.assert_close(output(plain), expected, rtol=1e-4, atol=1e-4)


def test_merges_beside_trainable_tokens() -> None:
    """What the wrapper of the tokens computes becomes the embedding's own weight."""
    options = {"trainable_token_indices": {"word_embeddings": [0, 3]}}
    model = get_peft_model(bert(), config(**options))
    randomize(model)
    tokens = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    tokens.data.normal_(generator=torch.Generator().manual_seed(3))
    expected, rows = output(model), tokens.detach().clone()
    plain = model.merge_and_unload(safe_merge=True)
    weight = plain.get_input_embeddings().weight
    assert isinstance(weight, torch.nn.Parameter)
    assert torch.equal(weight[[0, 3]], rows)
    assert set(plain.state_dict()) == set(bert().state_dict())
    torch.testing.assert_close(output(plain), expected, rtol=1e-4, atol=1e-4)


def test_unload_gives_the_base_model_back() -> None:
    model = get_peft_model(bert(), config())
    randomize(model)
    assert torch.equal(output(model.unload()), output(bert()))


def test_safe_merge_refuses_nan() -> None:
    """Whichever layer it is that diverged: no weight of any layer changes."""
    model = get_peft_model(bert(), config())
    randomize(model)
    layers = lotr_layers(model)
    last = list(layers)[-1]
    layers[last].lotr_core["default"].data.fill_(float("nan"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(lt.DataError, match=r"adapter default .*layer\.2\.intermediate\.dense"):
            merge(safe_merge=True)
        assert lotr_layers(model) == layers
        assert not any(layer.merged for layer in layers.values())
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]) or "lotr_core" in key
    with pytest.raises(lt.DataError, match="NaNs detected"):
        layers[last].merge(safe_merge=True)


def test_disable_adapter() -> None:
    model = get_peft_model(bert(), config())
    randomize(model)
    adapted = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(bert()))
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(output(model), adapted)
    assert model.get_nb_trainable_parameters()[0] == CORES + FACTORS


# Everything else that a model goes through


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model = get_peft_model(bert(), config())
    randomize(model)
    expected = model(ids())[0]
    weighted(expected).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(ids())[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weighted(found).backward()
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if checkpointing:
            name = "activation_checkpointing_enable"  # from transformers 5.2 on
            enable = getattr(base, name, None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        torch.manual_seed(0)
        model = get_peft_model(base, config())
        randomize(model)
        weighted(model(ids())[0]).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-5)
        assert grad.norm() > 1e-3


def test_half_precision_base_gets_float32_adapter() -> None:
    model = get_peft_model(bert().to(torch.bfloat16), config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert output(model).dtype == torch.bfloat16
    half = get_peft_model(bert().to(torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}
    randomize(half)
    output(half)


def test_autocast() -> None:
    model = get_peft_model(bert(), config())
    randomize(model)
    expected = output(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output(model)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_embeddings_are_adapted() -> None:
    model = get_peft_model(bert(), config(target_modules=["word_embeddings", "query"]))
    randomize(model)
    expected = output(model)
    assert not torch.allclose(expected, output(bert()), atol=1e-3)
    names = ["default", "__base__", "default", "default"]
    mixed = output(model, adapter_names=names)
    torch.testing.assert_close(mixed[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-4, atol=1e-5)
    plain = model.merge_and_unload()
    torch.testing.assert_close(output(plain), expected, rtol=1e-4, atol=1e-4)


def test_the_fused_transformer_layer_does_not_lose_the_update() -> None:
    """In evaluation PyTorch runs it in one kernel that calls none of its layers."""
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = get_peft_model(base.eval(), lotr.LotrConfig(r=2, target_modules=["linear1"]))
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        before = model(x)
        for layer in lotr_layers(model).values():
            nn.init.normal_(layer.lotr_core["default"])
        after = model(x)
        assert (after - before).abs().max() > 1e-2
        torch.testing.assert_close(model.merge_and_unload()(x), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "more"),
    [({"bias": "lotr_only"}, 3 * (32 + 32 + 48)), ({"trainable_token_indices": [3, 4]}, 2 * 32)],
)
def test_what_trains_beside_the_update(options, more: int) -> None:
    model = get_peft_model(bert(), config(**options))
    assert model.get_nb_trainable_parameters()[0] == CORES + FACTORS + more


def test_replicated_layers_have_their_own_cores() -> None:
    model = get_peft_model(bert(2), config(layer_replication=[[0, 2], [0, 2]]))
    assert len(model.base_model.model.encoder.layer) == 4
    assert model.get_nb_trainable_parameters()[0] == 12 * 3 * 4 + FACTORS
    randomize(model)
    output(model)
    with pytest.raises(lt.UnsupportedAdapterError, match=r"shares its weight with .*layer\.2"):
        model.merge_adapter()
    first = output(model)
    model.add_adapter("second", config(layer_replication=[[0, 2], [0, 2]]))
    assert len(model.base_model.model.encoder.layer) == 4
    assert torch.equal(output(model), first)


def test_a_mixed_batch_takes_each_rows_own_head() -> None:
    options = {"task_type": "SEQ_CLS"}
    model = get_peft_model(classifier(), config(**options))
    model.add_adapter("other", config(**options))
    for seed, name in enumerate(["default", "other"]):
        randomize(model, name, seed)
        nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
    names = ["other", "default", "other", "default"]
    mixed = output(model, adapter_names=names)
    for name in set(names):
        model.set_adapter(name)
        rows = [i for i, n in enumerate(names) if n == name]
        torch.testing.assert_close(mixed[rows], output(model)[rows], rtol=1e-4, atol=1e-5)


def test_modules_to_save_train_with_the_adapter() -> None:
    model = get_peft_model(classifier(), config(task_type="SEQ_CLS"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trained)
