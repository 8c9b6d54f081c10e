"""Compressed adapters in PEFT models, beside dense weights and PEFT's own LoRA."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import safetensors.torch  # noqa: E402
from huggingface_hub import hf_hub_download  # noqa: E402
from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.peft as lotr  # noqa: E402
from adapters_fixtures import edit_config  # noqa: E402
from adapters_fixtures import lotr as lotr_command  # noqa: E402
from compressed_fixtures import adapter, dense_updates, group  # noqa: E402
from lotrtensor.adapters.formats.coded_row import from_row, to_row  # noqa: E402
from tests.peft_models import bert, output  # noqa: E402
from tests.test_torch_compressed import base, mixed, private_only, state, tuned  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

X = torch.linspace(-1, 1, 72, dtype=torch.float64).reshape(6, 12)


def saved(directory: Path, compressed: lt.CompressedAdapter) -> Path:
    compressed.save(directory)
    return directory


def loaded(directory: Path, make=mixed, **options) -> nn.Module:
    """The net with the adapter of a directory that is made here."""
    return peft.PeftModel.from_pretrained(base(), saved(directory, make()), **options)


def other() -> lt.CompressedAdapter:
    """Other numbers and ranks on other layers."""
    return adapter(
        group("value", [f"layer.{k}.value" for k in (0, 2)], (12, 12), private=(2, 1)),
        group("up", [f"layer.{k}.up" for k in range(3)], (20, 12), (2, 2), (0, 0, 1)),
    )


def summed(*all_: lt.CompressedAdapter) -> nn.Module:
    """The net with several updates written into its weights."""
    model = base()
    for each in all_:
        for name, delta in dense_updates(each).items():
            model.get_submodule(name).weight.data += torch.from_numpy(delta)
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("make", [mixed, private_only, other])
def test_forward_equals_the_dense_module(tmp_path: Path, make, low_cpu_mem_usage: bool) -> None:
    model = loaded(tmp_path / "a", make, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(model(X), tuned(make())(X), rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base()(X))
    for name, delta in dense_updates(make()).items():
        found = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        np.testing.assert_allclose(found.detach().numpy(), delta, rtol=0, atol=1e-12)


def test_no_dummy_factors(tmp_path: Path) -> None:
    model = loaded(tmp_path / "a")
    own = [p for n, p in model.named_parameters() if "lotr_" in n]
    assert sum(p.numel() for p in own) == sum(g.parameters for g in mixed().groups)


@pytest.mark.parametrize("tolerance", [0.05, 0.4])
@pytest.mark.parametrize("form", ["auto", "lotr"])
def test_a_real_adapter_as_its_lora_in_peft(tmp_path: Path, tolerance: float, form: str) -> None:
    from tests.test_peft_method_files import lora

    lora(tmp_path / "lora", r=4)
    small = lt.compress(lt.load(tmp_path / "lora"), tolerance=tolerance, form=form)
    small.save(tmp_path / "small")
    lt.LoraAdapter(small.updates(), small.config, np.dtype("float32")).save(tmp_path / "plain")
    ours = peft.PeftModel.from_pretrained(bert(), tmp_path / "small")
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path / "plain")
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_types_are_those_that_peft_gives_adapters(tmp_path: Path, autocast: bool) -> None:
    model = peft.PeftModel.from_pretrained(
        base(torch.bfloat16), saved(tmp_path / "a", mixed()), autocast_adapter_dtype=autocast
    )
    dtypes = {p.dtype for n, p in model.named_parameters() if "lotr_" in n}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    expected = tuned(mixed(), torch.float32)(X.float())
    found = model(X.to(torch.bfloat16))
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.15)


def test_conv1d_and_embeddings(tmp_path: Path) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(9, 6), Conv1D(7, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.words(x))

    torch.manual_seed(0)
    model = Tiny().double()
    compressed = adapter(
        group("words", ["words"], (6, 9), (2, 3), (2,), embedding=True),
        group("mix", ["mix"], (7, 6), private=(3,)),
    )
    dense = copy.deepcopy(model)
    for name, delta in dense_updates(compressed).items():
        dense.get_submodule(name).weight.data += torch.from_numpy(delta.T)
    x = torch.arange(9).reshape(3, 3)
    found = peft.PeftModel.from_pretrained(model, saved(tmp_path / "a", compressed))
    torch.testing.assert_close(found(x), dense(x))
    torch.testing.assert_close(found.merge_and_unload()(x), dense(x))


@pytest.mark.parametrize(
    "parts", [{"ranks": (2, 3)}, {"private": (2,)}, {"ranks": (2, 3), "private": (2,)}]
)
def test_a_tied_head_has_the_same_update(tmp_path: Path, parts) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.words(x)))

    torch.manual_seed(0)
    words = group("words", ["words"], (6, 9), embedding=True, **parts)
    compressed = adapter(words, ensure_weight_tying=True)
    model = Tied().double()
    dense = copy.deepcopy(model)
    dense.words.weight.data += torch.from_numpy(dense_updates(compressed)["words"].T)
    x = torch.arange(9).reshape(3, 3)
    found = peft.PeftModel.from_pretrained(model, saved(tmp_path / "a", compressed))
    torch.testing.assert_close(found(x), dense(x))
    found.merge_adapter()
    torch.testing.assert_close(found(x), dense(x))


# Several adapters


def several(tmp_path: Path) -> nn.Module:
    model = loaded(tmp_path / "a", adapter_name="a")
    model.load_adapter(saved(tmp_path / "b", other()), "b")
    lt.convert(mixed().to_lora(), rank=9).save(tmp_path / "c")
    model.load_adapter(tmp_path / "c", "c")
    return model


def test_each_of_several_and_all_together(tmp_path: Path) -> None:
    model = several(tmp_path)
    for name, expected in (("a", tuned(mixed())), ("b", tuned(other())), ("c", tuned(mixed()))):
        model.set_adapter(name)
        torch.testing.assert_close(model(X), expected(X), rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(model(X), summed(mixed(), other())(X))


def test_merging_several(tmp_path: Path) -> None:
    model, before = several(tmp_path), state(base())
    model.merge_adapter(["a", "b"], safe_merge=True)
    torch.testing.assert_close(model(X), summed(mixed(), other())(X))
    model.unmerge_adapter()
    for key, value in before.items():
        found = model.base_model.model.state_dict()
        torch.testing.assert_close(found.get(key, found.get(_inside(key))), value)
    model.set_adapter("b")
    plain = model.merge_and_unload()
    assert list(plain.state_dict()) == list(before)
    torch.testing.assert_close(plain(X), tuned(other())(X))


def _inside(key: str) -> str:
    path, _, name = key.rpartition(".")
    return f"{path}.base_layer.{name}"


def test_a_mixed_batch(tmp_path: Path) -> None:
    model = several(tmp_path).eval()
    names = ["a", "b", "__base__", "b", "c", "a"]
    with torch.no_grad():
        found = model(X, adapter_names=names)
    expected = {"a": tuned(mixed()), "b": tuned(other()), "__base__": base(), "c": tuned(mixed())}
    for row, name in enumerate(names):
        torch.testing.assert_close(
            found[row], expected[name](X[row : row + 1])[0], rtol=1e-5, atol=1e-5
        )
    with torch.no_grad():
        torch.testing.assert_close(model(X, adapter_names=["b"] * 6), tuned(other())(X))


def test_deleting_one(tmp_path: Path) -> None:
    model = several(tmp_path)
    model.set_adapter("b")
    model.delete_adapter("a")
    assert not any(".a" in name for name, _ in model.named_parameters() if "lotr_" in name)
    torch.testing.assert_close(model(X), tuned(other())(X))


def test_sharing_the_factors_of_a_compressed_adapter(tmp_path: Path) -> None:
    model = loaded(tmp_path / "a", adapter_name="a")
    model.add_adapter("b", lotr.LotrConfig(share_factors="a"))
    own = {n for n, p in model.named_parameters() if ".b" in n}
    assert own
    assert not any("private" in name for name in own)
    model.set_adapter("b")
    torch.testing.assert_close(model(X), base()(X))
    alone = loaded(tmp_path / "p", private_only, adapter_name="a")
    with pytest.raises(lt.OptionError, match="nothing is shared"):
        alone.add_adapter("b", lotr.LotrConfig(share_factors="a"))


# Training and saving


def train(model: nn.Module, steps: int = 4) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, 1e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(X) - X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_gradients_of_private_factors(tmp_path: Path) -> None:
    model, twin = loaded(tmp_path / "a", is_trainable=True), tuned(mixed())
    model(X).square().sum().backward()
    twin(X).square().sum().backward()
    for kind in ("query", "up"):
        layer = model.get_submodule(f"base_model.model.layer.0.{kind}")
        grad = twin.get_submodule(f"layer.0.{kind}").weight.grad
        p, q = layer.private("default")
        torch.testing.assert_close(p.grad, grad @ q)
        torch.testing.assert_close(q.grad, grad.T @ p)


@pytest.mark.parametrize("make", [mixed, private_only])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_training_on_saving_and_loading(tmp_path: Path, make, low_cpu_mem_usage: bool) -> None:
    model = loaded(tmp_path / "a", make, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "out")
    again = peft.PeftModel.from_pretrained(
        base(), tmp_path / "out", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    torch.testing.assert_close(again(X), model(X))
    train(again)
    again.save_pretrained(tmp_path / "twice")
    found = lt.load(tmp_path / "twice")
    assert isinstance(found, lt.LoraAdapter)
    assert {m.name for m in found.modules} == set(dense_updates(make()))
    for module in found.modules:
        layer = again.get_submodule(f"base_model.model.{module.name}")
        expected = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(module.B @ module.A, expected, rtol=0, atol=1e-12)


def test_plain_numbers_are_exported_by_the_command(tmp_path: Path) -> None:
    """On disk it is no LoRA that others read, so that the export makes one."""
    model = loaded(tmp_path / "a", is_trainable=True)
    train(model)
    model.save_pretrained(tmp_path / "plain")
    assert lotr_command("export", tmp_path / "plain", "-o", tmp_path / "lora").code == 0
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(theirs(X), model(X))
    low = lotr_command("export", tmp_path / "plain", "-o", tmp_path / "low", "--rank", 1)
    assert low.code == 0
    assert {m.rank for m in lt.load(tmp_path / "low").modules} == {1}
    again = lotr_command("export", tmp_path / "lora", "-o", tmp_path / "again")
    assert (again.code, "LoRA already" in again.err) == (1, True)


def test_an_untrained_one_is_saved_too(tmp_path: Path) -> None:
    model = loaded(tmp_path / "a")
    model.save_pretrained(tmp_path / "out")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(again(X), model(X))


def test_a_shared_part_alone_is_saved_as_a_lotr(tmp_path: Path) -> None:
    model = loaded(tmp_path / "a", lambda: adapter(mixed().groups[1]), is_trainable=True)
    train(model)
    model.save_pretrained(tmp_path / "out")
    found = lt.load(tmp_path / "out")
    assert isinstance(found, lt.LotrAdapter)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(again(X), model(X))


def test_cores_alone_train(tmp_path: Path) -> None:
    config = lotr.LotrConfig.from_pretrained(saved(tmp_path / "a", mixed()))
    config.train, config.inference_mode = "cores", False
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "a", config=config, is_trainable=True)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lotr_core"
    }


def test_a_carried_head_travels_along(tmp_path: Path) -> None:
    from tests.peft_models import classifier

    names = [f"bert.encoder.layer.{k}.attention.self.query" for k in range(2)]
    weight = {"weight": np.ones((2, 32), np.float32), "bias": np.ones(2, np.float32)}
    compressed = replace(
        adapter(group("query", names, (32, 32), (2, 2), (1, 2)), modules_to_save=["classifier"],
                task_type="SEQ_CLS"),
        extras={f"base_model.model.classifier.{k}": v for k, v in weight.items()},
    )  # fmt: skip
    model = peft.PeftModel.from_pretrained(classifier(), saved(tmp_path / "a", compressed))
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, torch.ones(2, 32))
    dense = classifier()
    for name, delta in dense_updates(compressed).items():
        dense.get_submodule(name).weight.data += torch.from_numpy(delta).float()
    nn.init.ones_(dense.classifier.weight)
    nn.init.ones_(dense.classifier.bias)
    torch.testing.assert_close(output(model), output(dense), rtol=1e-4, atol=1e-4)


def test_from_a_hub(tmp_path: Path, monkeypatch) -> None:
    """Both files are fetched by PEFT's own ways, and here for the groups."""
    saved(tmp_path / "a", mixed())

    @functools.wraps(hf_hub_download)  # PEFT looks at the names of its parameters
    def fetch(repo_id: str, filename: str, *, revision: str, **_: object) -> str:
        assert (repo_id, revision) == ("some/one", "v1")
        return str(tmp_path / "a" / filename)

    for module in ("peft.config", "peft.utils.save_and_load", "lotrtensor.peft.config"):
        monkeypatch.setattr(f"{module}.hf_hub_download", fetch)
    model = peft.PeftModel.from_pretrained(base(), "some/one", revision="v1")
    torch.testing.assert_close(model(X), tuned(mixed())(X))


def test_starting_a_new_adapter_from_one(tmp_path: Path) -> None:
    config = lotr.LotrConfig(r=9, init=str(saved(tmp_path / "a", mixed())))
    model = peft.get_peft_model(base(), config)
    torch.testing.assert_close(model(X), tuned(mixed())(X), rtol=1e-4, atol=1e-4)


# Refusals


def damaged(directory: Path, change) -> Path:
    file = saved(directory, mixed()) / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    return directory


def recoded(tensors, **parts):
    coded, _ = from_row(tensors["lotr_coded"].numpy(), "file")
    tensors["lotr_coded"] = torch.from_numpy(to_row(coded._replace(**parts)).copy())


DAMAGES = {
    "codes": lambda t: recoded(t, codes=b""),
    "no kinds": lambda t: recoded(t, kinds=np.zeros(0, np.int8)),
    "infinite": lambda t: recoded(t, values=np.full(99, np.inf, np.float16)),
    "a row that ends": lambda t: t.update(lotr_coded=t["lotr_coded"][:-1].clone()),
    "no row": lambda t: t.pop("lotr_coded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("in_hand", [False, True])
def test_a_damaged_file_leaves_the_model(tmp_path: Path, damage: str, in_hand: bool) -> None:
    model = base()
    before = state(model)
    options = {}
    if in_hand:
        options["config"] = lotr.LotrConfig.from_pretrained(saved(tmp_path / "whole", mixed()))
    directory = damaged(tmp_path / "a", DAMAGES[damage])
    with pytest.raises(lt.FormatError):
        peft.PeftModel.from_pretrained(model, directory, **options)
    assert list(state(model)) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


@pytest.mark.parametrize("version", [3, "2", None, True])
def test_other_versions(tmp_path: Path, version) -> None:
    edit_config(saved(tmp_path / "a", mixed()), format_version=version)
    with pytest.raises(lt.FormatError, match="format_version"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "a")


def test_plain_numbers_that_do_not_fit(tmp_path: Path) -> None:
    loaded(tmp_path / "a").save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = {k: v.clone() for k, v in safetensors.torch.load_file(file).items()}  # overwritten
    key = "base_model.model.layer.0.query.lotr_private_left"
    for change, words in (
        ({key: tensors[key][:, :1].clone()}, "private_left has shape"),
        ({key: tensors[key] * float("nan")}, "private_left"),
        (
            {key.replace("layer.0", "layer.1"): tensors[key].clone()},
            "layer.1.query.lotr_private_left",
        ),
        (
            {key.replace("layer.0", "layer.7"): tensors[key].clone()},
            "layer.7.query.lotr_private_left",
        ),
    ):
        safetensors.torch.save_file(tensors | change, file)
        for read in (lt.load, lambda d: peft.PeftModel.from_pretrained(base(), d)):
            with pytest.raises(lt.LotrError, match=words):
                read(tmp_path / "out")
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(lt.FormatError, match="is missing"):
        lt.load(tmp_path / "out")


@pytest.mark.parametrize(
    "fields", [{"private_ranks": [1]}, {"private_ranks": [-1, 0, 1]}, {"rank": [0, 3]}]
)
def test_groups_that_contradict_themselves(tmp_path: Path, fields) -> None:
    loaded(tmp_path / "a").save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    config["groups"][0].update(fields)
    edit_config(tmp_path / "out", groups=config["groups"])
    for read in (lt.load, lambda d: peft.PeftModel.from_pretrained(base(), d)):
        with pytest.raises(lt.FormatError, match=next(iter(fields))):
            read(tmp_path / "out")


def test_sums_and_swaps_are_refused(tmp_path: Path) -> None:
    model = several(tmp_path)
    with pytest.raises(lt.UnsupportedAdapterError, match="'a' has private factors"):
        model.base_model.add_weighted_adapter(["a", "c"], [0.5, 0.5], "sum", "cat")
    with pytest.raises(lt.UnsupportedAdapterError, match="private factors"):
        lotr.hotswap_adapter(model, tmp_path / "c", "a")
    with pytest.raises(lt.FormatError, match="format_version 2"):
        lotr.hotswap_adapter(model, tmp_path / "a", "c")
    model.set_adapter("a")
    torch.testing.assert_close(model(X), tuned(mixed())(X))


def test_a_config_that_was_read_without_the_tensors(tmp_path: Path) -> None:
    config = peft.PeftConfig.from_pretrained(saved(tmp_path / "a", mixed()))
    with pytest.raises(lt.FormatError, match=r"LotrConfig\.from_pretrained"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "a", config=config)
    with pytest.raises(lt.FormatError, match=r"LotrConfig\.from_pretrained"):
        peft.get_peft_model(base(), lotr.LotrConfig(format_version=2, target_modules=["up"]))


def test_another_model(tmp_path: Path) -> None:
    with pytest.raises(lt.FormatError, match="made for another model"):
        peft.PeftModel.from_pretrained(bert(), saved(tmp_path / "a", mixed()))


def test_cores_where_there_are_none(tmp_path: Path) -> None:
    config = lotr.LotrConfig.from_pretrained(saved(tmp_path / "a", private_only()))
    config.train = "cores"
    with pytest.raises(lt.OptionError, match="nothing is shared"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "a", config=config)


def test_numbers_that_the_type_does_not_hold(tmp_path: Path) -> None:
    value = mixed().groups[1]
    part = replace(value.stack.shared, step=1e9)
    compressed = adapter(replace(value, stack=replace(value.stack, shared=part)))
    model = base(torch.float16)
    before = state(model)
    with pytest.raises(lt.DataError, match="float16 does not hold"):
        peft.PeftModel.from_pretrained(
            model, saved(tmp_path / "a", compressed), autocast_adapter_dtype=False
        )
    assert list(state(model)) == list(before)
