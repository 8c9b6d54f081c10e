"""Files of the PEFT method: one format with the command line; Trainer."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.peft as lotr  # noqa: E402
from lotrtensor.cli.app import app  # noqa: E402
from tests.peft_models import (  # noqa: E402
    THIRD_PARTY,
    bert,
    classifier,
    config,
    gpt2,
    ids,
    lotr_layers,
    output,
    randomize,
    saved,
    trained,
)

pytestmark = [
    pytest.mark.filterwarnings(THIRD_PARTY),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora(path: Path, make=bert, **options) -> nn.Module:
    """Train (that is, randomise) a LoRA and save it."""
    model = get_peft_model(make(), LoraConfig(**{"r": 3, "target_modules": ["query"], **options}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(path, save_embedding_layers=False)
    return model


@pytest.mark.parametrize("group_by", ["type", "shape", "qv=query|value"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip(tmp_path: Path, group_by: str, low_cpu_mem_usage: bool) -> None:
    model = trained(group_by=group_by)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(other), output(model))
    assert not any(p.requires_grad for p in other.parameters())
    assert not any(p.is_meta for p in other.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_shares_and_trains(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    saved(tmp_path)
    model = PeftModel.from_pretrained(
        bert(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    read = {
        id(p)
        for layer in lotr_layers(model).values()
        for p in [*layer.lotr_shared["default"].parameters(), layer.lotr_core["default"]]
    }
    assert trainable == read
    assert len(read) == 6 + 9


def test_factors_are_on_disk_once_under_the_native_keys(tmp_path: Path) -> None:
    saved(tmp_path)
    keys = set(load_file(tmp_path / WEIGHTS))
    groups = ["attention.self.query", "attention.self.value", "intermediate.dense"]
    expected = {f"base_model.lotr_{side}.{g}" for side in ("left", "right") for g in groups}
    expected |= {
        f"base_model.model.encoder.layer.{k}.{g}.lotr_core" for k in range(3) for g in groups
    }
    assert keys == expected


def test_file_size_is_parameters_times_itemsize_and_a_header(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert len(content) == 8 + header + 4 * model.get_nb_trainable_parameters()[0]


def test_the_config_says_everything_and_reads_back(tmp_path: Path) -> None:
    saved(tmp_path, lotr_alpha=6, lotr_dropout=0.1, group_by="shape", train="cores")
    record = json.loads((tmp_path / CONFIG).read_text())
    assert record["peft_type"] == "LOTR"
    assert record["format_version"] == 1
    assert [g["name"] for g in record["groups"]] == ["32x32", "48x32"]
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, lotr.LotrConfig)
    assert (read.r, read.lotr_alpha, read.train) == ((3, 4), 6, "cores")
    again = tmp_path / "again"
    read.save_pretrained(again)
    assert json.loads((again / CONFIG).read_text()) == record


def test_lotrtensor_reads_what_peft_saved(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    adapter = lt.load(tmp_path)
    assert adapter.parameters == model.get_nb_trainable_parameters()[0]
    for group in adapter.groups:
        dense = group.tucker2().to_dense()
        for name, delta in zip(group.modules, dense, strict=True):
            layer = model.base_model.model.get_submodule(name)
            found = layer.get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(found, delta, rtol=1e-4, atol=1e-5)


def test_peft_reads_what_lotrtensor_wrote_of_a_peft_adapter(tmp_path: Path) -> None:
    expected = output(trained())
    lt.load(saved(tmp_path / "a")).save(tmp_path / "b")
    model = PeftModel.from_pretrained(bert(), tmp_path / "b")
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [9, (9, 9), 4])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_converted_lora_computes_the_same(tmp_path: Path, rank, low_cpu_mem_usage) -> None:
    reference = lora(tmp_path / "lora", target_modules=["query", "value"])
    converted = lt.convert(lt.load(tmp_path / "lora"), rank=rank)
    converted.save(tmp_path / "lotr")
    model = PeftModel.from_pretrained(
        bert(), tmp_path / "lotr", low_cpu_mem_usage=low_cpu_mem_usage
    )
    if rank == 4:  # not exact: held against the converted adapter's own ΔW
        lora_again = converted.to_lora()
        lora_again.save(tmp_path / "again")
        reference = PeftModel.from_pretrained(bert(), tmp_path / "again")
    torch.testing.assert_close(output(model), output(reference), rtol=1e-3, atol=1e-4)


def test_cores_on_disk_as_products_are_multiplied_out(tmp_path: Path) -> None:
    reference = lora(tmp_path / "lora", r=1)
    lt.convert(lt.load(tmp_path / "lora"), rank=3).save(tmp_path / "lotr")
    assert any(key.endswith(".lotr_core_left") for key in load_file(tmp_path / "lotr" / WEIGHTS))
    model = PeftModel.from_pretrained(bert(), tmp_path / "lotr")
    torch.testing.assert_close(output(model), output(reference), rtol=1e-3, atol=1e-4)


def test_a_converted_embedding_computes_the_same(tmp_path: Path) -> None:
    reference = lora(tmp_path / "lora", target_modules=["word_embeddings", "query"])
    lt.convert(lt.load(tmp_path / "lora"), rank=9).save(tmp_path / "lotr")
    model = PeftModel.from_pretrained(bert(), tmp_path / "lotr")
    torch.testing.assert_close(output(model), output(reference), rtol=1e-3, atol=1e-4)


def test_a_converted_conv1d_computes_the_same(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        reference = lora(tmp_path / "lora", gpt2, target_modules=["c_attn", "c_fc"])
    lt.convert(lt.load(tmp_path / "lora"), rank=6).save(tmp_path / "lotr")
    model = PeftModel.from_pretrained(gpt2(), tmp_path / "lotr")
    torch.testing.assert_close(output(model), output(reference), rtol=1e-3, atol=1e-4)


def test_half_precision_file(tmp_path: Path) -> None:
    reference = lora(tmp_path / "lora")
    lt.convert(lt.load(tmp_path / "lora"), rank=9, dtype="bfloat16").save(tmp_path / "lotr")
    model = PeftModel.from_pretrained(bert(), tmp_path / "lotr")
    torch.testing.assert_close(output(model), output(reference), rtol=0.05, atol=0.05)


def test_a_classifier_head_travels_along(tmp_path: Path) -> None:
    model = get_peft_model(classifier(), config(task_type="SEQ_CLS"))
    randomize(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "a")
    other = PeftModel.from_pretrained(classifier(), tmp_path / "a")
    assert torch.equal(output(other), output(model))
    adapter = lt.load(tmp_path / "a")
    assert sorted(adapter.extras) == [
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    ]
    adapter.save(tmp_path / "b")
    again = PeftModel.from_pretrained(classifier(), tmp_path / "b")
    torch.testing.assert_close(output(again), output(model), rtol=1e-4, atol=1e-5)


def test_several_adapters_save_and_load_apart(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("other", config(r=2, group_by="shape"))
    randomize(model, "other", 5)
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    second = output(model)
    model.set_adapter("default")
    fresh = PeftModel.from_pretrained(bert(), tmp_path)
    fresh.load_adapter(tmp_path / "other", "renamed")
    assert torch.equal(output(fresh), output(model))
    fresh.set_adapter("renamed")
    assert torch.equal(output(fresh), second)


def test_an_adapter_that_shares_is_whole_on_disk(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("user", config(share_factors="default"))
    randomize(model, "user", 4)
    model.save_pretrained(tmp_path)
    model.set_adapter("user")
    alone = PeftModel.from_pretrained(bert(), tmp_path / "user")
    assert torch.equal(output(alone), output(model))
    both = PeftModel.from_pretrained(bert(), tmp_path)
    both.load_adapter(tmp_path / "user", "user")
    assert both.base_model.tie_factors() == 3


# Starting from another adapter


def test_training_starts_from_a_lora(tmp_path: Path) -> None:
    reference = lora(tmp_path / "lora", target_modules=["query", "value"])
    model = get_peft_model(bert(), lotr.LotrConfig(r=9, init=str(tmp_path / "lora")))
    torch.testing.assert_close(output(model), output(reference), rtol=1e-3, atol=1e-4)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lotr_" in n)
    model.save_pretrained(tmp_path / "lotr")
    assert str(tmp_path) not in (tmp_path / "lotr" / CONFIG).read_text()
    again = PeftModel.from_pretrained(bert(), tmp_path / "lotr")
    assert torch.equal(output(again), output(model))


def test_training_starts_from_a_lotr(tmp_path: Path) -> None:
    reference = trained()
    reference.save_pretrained(tmp_path / "lotr")
    model = get_peft_model(bert(), lotr.LotrConfig(init=str(tmp_path / "lotr"), train="cores"))
    torch.testing.assert_close(output(model), output(reference), rtol=1e-4, atol=1e-5)
    assert model.get_nb_trainable_parameters()[0] == 9 * 3 * 4


def test_rank_of_a_core_may_grow_in_training(tmp_path: Path) -> None:
    """A file that is trained on claims no more that its cores have the rank of the LoRA's."""
    lora(tmp_path / "lora", r=1)
    lt.convert(lt.load(tmp_path / "lora"), rank=3).save(tmp_path / "lotr")
    model = PeftModel.from_pretrained(bert(), tmp_path / "lotr", is_trainable=True)
    randomize(model)
    model.save_pretrained(tmp_path / "trained")
    lt.load(tmp_path / "trained").to_lora().save(tmp_path / "export")
    exported = PeftModel.from_pretrained(bert(), tmp_path / "export")
    torch.testing.assert_close(output(exported), output(model), rtol=1e-3, atol=1e-4)


def test_training_starts_from_weight_deltas(tmp_path: Path) -> None:
    base, tuned = bert(), bert()
    generator = torch.Generator().manual_seed(1)
    for name, module in tuned.named_modules():
        if name.endswith(("query", "value")):
            module.weight.data += 0.1 * torch.randn(32, 32, generator=generator)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    lt.extract(tmp_path / "base", tmp_path / "tuned", rank=32).save(tmp_path / "deltas")
    model = get_peft_model(bert(), lotr.LotrConfig(init=str(tmp_path / "deltas")))
    torch.testing.assert_close(output(model), output(tuned), rtol=1e-3, atol=1e-4)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lotr_" in n)


def test_the_command_line_works_on_a_trained_adapter(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "lotr")
    runner = CliRunner()
    found = runner.invoke(app, ["inspect", str(tmp_path / "lotr"), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["parameters"] == model.get_nb_trainable_parameters()[0]
    for command in (
        ["truncate", "lotr", "-o", "same", "--rank", "4"],
        ["truncate", "lotr", "-o", "less", "--rank", "2"],
        ["export", "same", "-o", "lora"],
    ):
        words = [str(tmp_path / w) if w in ("lotr", "same", "less", "lora") else w for w in command]
        done = runner.invoke(app, words)
        assert done.exit_code == 0, done.output
    for name in ("same", "lora"):
        other = PeftModel.from_pretrained(bert(), tmp_path / name)
        torch.testing.assert_close(output(other), output(model), rtol=1e-3, atol=1e-4)
    less = PeftModel.from_pretrained(bert(), tmp_path / "less")
    assert less.peft_config["default"].groups[0]["rank"] == [2, 2]


# Export


def test_the_export_computes_the_same_as_a_peft_lora(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "lora")
    exported = PeftModel.from_pretrained(bert(), tmp_path / "lora")
    torch.testing.assert_close(output(exported), output(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [bert, gpt2], ids=["Linear", "Conv1D"])
def test_pefts_own_conversion_to_lora(tmp_path: Path, make) -> None:
    targets = {} if make is bert else {"target_modules": ["c_attn", "c_fc"]}
    model = get_peft_model(make(), config(**targets))
    randomize(model)
    lora_config, state = convert_to_lora(model, rank=3)
    assert lora_config.r == 3
    assert len(state) == 2 * len(lotr_layers(model))
    save_as_lora(tmp_path, model, rank=3)
    warn = pytest.warns(UserWarning, match="fan_in_fan_out") if make is gpt2 else nullcontext()
    with warn:
        exported = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(output(exported), output(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"bias": "lotr_only"}, {"bias": "all"}, {"trainable_token_indices": [3, 4]}]
)
def test_what_trains_beside_the_update_is_on_disk(tmp_path: Path, options) -> None:
    model = trained(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path / "a")
    other = PeftModel.from_pretrained(bert(), tmp_path / "a")
    assert torch.equal(output(other), output(model))


def test_replicated_layers_are_on_disk(tmp_path: Path) -> None:
    model = get_peft_model(bert(2), config(layer_replication=[[0, 2], [0, 2]]))
    randomize(model)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(bert(2), tmp_path)
    assert torch.equal(output(other), output(model))


# transformers' Trainer


def trainer(path: Path, steps: int, **options):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = get_peft_model(classifier(), config(task_type="SEQ_CLS", lotr_dropout=0.1))
    data = [{"input_ids": row, "labels": int(k % 2)} for k, row in enumerate(ids(32, 6, seed=3))]
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=data)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "checkpoint-3")
    rest = trainer(tmp_path / "rest", 6)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    losses = [
        [entry["loss"] for entry in run.state.log_history if "loss" in entry and entry["step"] > 3]
        for run in (whole, rest)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    expected = whole.model.state_dict()
    for key, value in rest.model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    adapter = lt.load(tmp_path / "whole" / "checkpoint-6")
    assert adapter.parameters + 2 * 33 == whole.model.get_nb_trainable_parameters()[0]
