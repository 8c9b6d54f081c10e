"""LoRA files of fused experts, held against the ΔW that PEFT's own layers build."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import safetensors.numpy  # noqa: E402

import lotrtensor as lt  # noqa: E402
from tests.adapters_fixtures import document  # noqa: E402
from tests.moe_models import TARGETS, experts_of, logits, randomise, tiny, with_dense  # noqa: E402
from tests.peft_models import THIRD_PARTY  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(THIRD_PARTY),
    # PEFT looks for patterns of parameters among the modules.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]


def trained(name="mixtral", targets=TARGETS, r=4, **options):
    base = tiny(name)
    config = peft.LoraConfig(r=r, lora_alpha=6, target_parameters=list(targets), **options)
    return base, randomise(peft.get_peft_model(copy.deepcopy(base), config))


def deltas_of(model):
    """ΔW_e, m × n, of every expert, as PEFT's wrappers build it."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            dense = module.get_delta_weight("default").double()
            transposed = getattr(module.get_base_layer(), "is_transposed", False)
            experts = path.replace(".base_layer", "")
            for e, delta in enumerate(dense.mT if transposed else dense):
                found[f"{experts}.{e}.{module.parameter_name}"] = delta.detach()
    return found


def dense(adapter):
    return {m.name: torch.from_numpy(m.B.astype(float) @ m.A) for m in adapter.to_lora().modules}


def agree(found, expected, rtol=1e-5):
    assert set(found) == set(expected)
    for name in expected:
        error = float((found[name] - expected[name]).norm())
        assert error <= rtol * float(expected[name].norm()), name


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "targets",
    [
        TARGETS,
        TARGETS[:1],
        TARGETS[1:],
        ["gate_up_proj", "down_proj"],
        ["down_proj"],
        [
            f"model.layers.{i}.mlp.experts.{p}"
            for i in (0, 1)
            for p in ("down_proj", "gate_up_proj")
        ],
    ],
)
def test_a_lora_of_parameters_is_read_as_peft_computes_it(name, targets, tmp_path):
    _, model = trained(name, targets, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "lora")
    adapter = lt.load(tmp_path / "lora")
    found = dense(adapter)
    assert {n for n in found if "experts" not in n} == {
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }
    experts = {n: x for n, x in found.items() if "experts" in n}
    agree(experts, deltas_of(model))
    assert all(m.rank == 4 for m in adapter.modules)


def test_ranks_by_pattern_and_rslora(tmp_path):
    options = {"rank_pattern": {"gate_up_proj": 7}, "alpha_pattern": {r".*\.down_proj": 3}}
    _, model = trained(use_rslora=True, target_modules=[], **options)
    model.save_pretrained(tmp_path / "lora")
    adapter = lt.load(tmp_path / "lora")
    assert {m.rank for m in adapter.modules if m.name.endswith("gate_up_proj")} == {7}
    agree(dense(adapter), deltas_of(model))


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_what_is_written_is_loaded_by_peft(name, uniform, tmp_path):
    base, model = trained(name, target_modules=[], rank_pattern={"down_proj": 3})
    model.save_pretrained(tmp_path / "lora")
    lt.load(tmp_path / "lora").save(tmp_path / "again", uniform=uniform)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").double()
    agree(deltas_of(again), deltas_of(model))
    assert torch.allclose(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(TARGETS)
    assert bool(config["rank_pattern"]) != uniform


def test_a_router_beside_experts_stays_a_module(tmp_path):
    base, model = trained(targets=[*TARGETS, "gate.weight"], target_modules=[])
    model.save_pretrained(tmp_path / "lora")
    adapter = lt.load(tmp_path / "lora")
    assert {m.name for m in adapter.modules if "experts" not in m.name} == {
        f"model.layers.{i}.mlp.gate" for i in (0, 1)
    }
    adapter.save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").double()
    assert torch.allclose(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_converted_and_trained_on_as_lotr_and_exported_for_peft(tmp_path):
    from lotrtensor.peft import LotrConfig

    base, model = trained("gpt_oss", target_modules=[])
    model.save_pretrained(tmp_path / "lora")
    converted = lt.convert(lt.load(tmp_path / "lora"), tolerance=0.5)
    converted.save(tmp_path / "lotr")
    assert all(group.name.count("experts") for group in converted.groups)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lotr").double()
    expected = logits(with_dense(base, dense(converted)))
    assert torch.allclose(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    fresh = peft.get_peft_model(
        copy.deepcopy(base), LotrConfig(r=8, init=str(tmp_path / "lora"), group_by="type")
    )
    fresh.save_pretrained(tmp_path / "trained")
    lora = lt.load(tmp_path / "trained").to_lora()
    lora.save(tmp_path / "back")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").double()
    assert torch.allclose(logits(back), logits(fresh), rtol=1e-4, atol=1e-4)
    assert set(experts_of(base))


def test_an_adapter_of_plain_torch_is_exported_for_peft(tmp_path):
    import lotrtensor.torch as lotr

    base = tiny("mixtral")
    model = randomise(lotr.apply_lotr(copy.deepcopy(base), target_parameters=TARGETS, rank=3))
    lotr.save_lotr(model, tmp_path / "lotr")
    lt.load(tmp_path / "lotr").to_lora().save(tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").double()
    assert torch.allclose(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(directory, tensors, **config):
    directory.mkdir()
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    safetensors.numpy.save_file(named, directory / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


HOLDER = "layers.0.mlp.experts"


def parameters(turned=False, up=(10, 6), down=(6, 5), experts=3):
    """Tensors of both parameters: with ``turned``, A and B in the place of each other's sides."""
    found = {}
    for k, ((m, n), inner) in enumerate(((up, ".base_layer"), (down, ""))):
        rows, columns = (m, n) if turned else (n, m)
        found[f"{HOLDER}{inner}.lora_A.weight"] = numbers(4 * experts, rows, seed=k)
        found[f"{HOLDER}{inner}.lora_B.weight"] = numbers(columns, 4 * experts, seed=k + 7)
    return found


def test_the_layout_of_older_peft_is_told_by_the_shapes(tmp_path):
    tensors = parameters(turned=True)
    adapter = lt.load(write(tmp_path / "a", tensors, target_parameters=TARGETS))
    for inner, parameter in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
        a = tensors[f"{HOLDER}{inner}.lora_A.weight"].reshape(3, 4, -1)
        b = tensors[f"{HOLDER}{inner}.lora_B.weight"]
        b = b.reshape(len(b), 4, 3)
        expected = np.einsum("ore,eri->eio", b, a)  # PEFT 0.18: the parameter as it is stored
        for e in range(3):
            name = f"{HOLDER}.{e}.{parameter}"
            module = next(m for m in adapter.modules if m.name == name)
            np.testing.assert_allclose(module.B @ module.A, expected[e], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "config", "error", "text"),
    [
        ({f"{HOLDER}.lora_A.weight": None}, {}, lt.FormatError, "no partner"),
        ({}, {"r": 5}, lt.FormatError, r"\(12, 6\).*rank 5"),
        ({}, {"target_parameters": ["experts.down_proj"]}, lt.UnsupportedAdapterError, "which is"),
        (
            {},
            {"target_parameters": ["experts.first", "experts.second"]},
            lt.UnsupportedAdapterError,
            "which is which",
        ),
        ({}, {"target_parameters": "experts"}, lt.FormatError, "target_parameters is 'experts'"),
    ],
)
def test_files_that_contradict_their_config_are_refused(change, config, error, text, tmp_path):
    tensors = {k: v for k, v in (parameters() | change).items() if v is not None}
    path = write(tmp_path / "a", tensors, **{"target_parameters": TARGETS, **config})
    with pytest.raises(error, match=text):
        lt.load(path)


def stacks(experts=3, r=4):
    """Factors with one A for all experts on the way up, and one B on the way down."""
    return {
        f"{HOLDER}.gate_up_proj.lora_A.weight": numbers(1, r, 6),
        f"{HOLDER}.gate_up_proj.lora_B.weight": numbers(experts, 10, r, seed=1),
        f"{HOLDER}.down_proj.lora_A.weight": numbers(experts, r, 5, seed=2),
        f"{HOLDER}.down_proj.lora_B.weight": numbers(1, 6, r, seed=3),
    }


def test_stacks_that_share_a_side_are_read_written_and_are_a_lotr_exactly(tmp_path):
    tensors = stacks()
    adapter = lt.load(write(tmp_path / "a", tensors, lora_alpha=2))
    for parameter in ("gate_up_proj", "down_proj"):
        a, b = (tensors[f"{HOLDER}.{parameter}.lora_{side}.weight"] for side in "AB")
        for e, expected in enumerate(0.5 * (b @ a)):
            module = next(m for m in adapter.modules if m.name == f"{HOLDER}.{e}.{parameter}")
            np.testing.assert_allclose(module.B @ module.A, expected, rtol=1e-5, atol=1e-6)
    adapter.save(tmp_path / "b", experts="shared-outer")
    written = safetensors.numpy.load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in written.items()} == {
        f"base_model.model.{k}": v.shape for k, v in tensors.items()
    }
    agree(dense(lt.load(tmp_path / "b")), dense(adapter))
    assert lt.convert(adapter, rank=(10, 4), group_by="up=gate_up,down=down").relative_error < 1
    up = lt.convert(adapter, tolerance=1e-5)
    assert up.relative_error < 1e-5
    assert [group.rank for group in up.groups] == [(4, 5), (10, 4)]


def test_a_lotr_is_written_as_stacks_exactly(tmp_path):
    path = write(tmp_path / "a", parameters(), target_parameters=TARGETS)
    lotr = lt.convert(lt.load(path), rank=3)
    shared = lt.shared_outer(lotr)
    shared.save(tmp_path / "b", experts="shared-outer")
    agree(dense(lt.load(tmp_path / "b")), dense(lotr))
    written = safetensors.numpy.load_file(tmp_path / "b" / "adapter_model.safetensors")
    shapes = {k.removeprefix(f"base_model.model.{HOLDER}."): v.shape for k, v in written.items()}
    assert shapes == {
        "gate_up_proj.lora_A.weight": (1, 3, 6),
        "gate_up_proj.lora_B.weight": (3, 10, 3),
        "down_proj.lora_A.weight": (3, 3, 5),
        "down_proj.lora_B.weight": (1, 6, 3),
    }
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_up_proj"]
    assert "target_parameters" not in config


def test_experts_that_share_nothing_are_no_shared_stacks(tmp_path):
    adapter = lt.load(write(tmp_path / "a", parameters(), target_parameters=TARGETS))
    with pytest.raises(lt.UnsupportedAdapterError, match=r"down_proj have a lora_B each"):
        adapter.save(tmp_path / "b", experts="shared-outer")
    assert not (tmp_path / "b").exists()
    plain = lt.LoraAdapter((lt.LoraModule("q", numbers(4, 2), numbers(2, 4)),), {}, np.dtype("f4"))
    with pytest.raises(lt.FormatError, match="no module of this adapter is an expert"):
        plain.save(tmp_path / "b", experts="parameters")
    with pytest.raises(lt.OptionError, match="experts is"):
        plain.save(tmp_path / "b", experts="some")


def test_a_module_an_expert_where_asked_for(tmp_path):
    adapter = lt.load(write(tmp_path / "a", parameters(), target_parameters=TARGETS))
    adapter.save(tmp_path / "b", experts="modules")
    written = safetensors.numpy.load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert f"base_model.model.{HOLDER}.2.down_proj.lora_B.weight" in written
    agree(dense(lt.load(tmp_path / "b")), dense(adapter))
    lt.load(tmp_path / "b").save(tmp_path / "c", experts="parameters")
    agree(dense(lt.load(tmp_path / "c")), dense(adapter))


def test_a_missing_expert_is_named(tmp_path):
    adapter = lt.load(write(tmp_path / "a", parameters(), target_parameters=TARGETS))
    some = lt.LoraAdapter(
        tuple(m for m in adapter.modules if ".1." not in m.name), adapter.config, adapter.dtype
    )
    with pytest.raises(lt.FormatError, match=r"expert 1 of .*is not among the modules"):
        some.save(tmp_path / "b")


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        (f"{HOLDER}.down_proj.lora_A.weight", (2, 4, 5), None),
        (f"{HOLDER}.gate_up_proj.lora_A.weight", (2, 4, 6), "in the place of K"),
        (f"{HOLDER}.gate_up_proj.lora_A.weight", (1, 3, 6), "with one r"),
    ],
)
def test_stacks_that_do_not_fit_together_are_refused(key, shape, text, tmp_path):
    path = write(tmp_path / "a", stacks() | {key: numbers(*shape)})
    if text is None:  # another number of experts, of another parameter
        assert len(lt.load(path).modules) == 5
        return
    with pytest.raises(lt.FormatError, match=text):
        lt.load(path)


def test_the_command_lays_experts_out(tmp_path):
    path = write(tmp_path / "a", parameters(), target_parameters=TARGETS)
    document("convert", path, "-o", tmp_path / "lotr", "--rank", 3)
    for layout in ("parameters", "modules", "shared-outer"):
        found = document("export", tmp_path / "lotr", "-o", tmp_path / layout, "--experts", layout)
        assert found["relative_error"] < 1e-6
        again = document(
            "export",
            path,
            "-o",
            tmp_path / f"{layout}-2",
            "--experts",
            layout,
            *(["--rank", 12] if layout == "shared-outer" else []),
        )
        assert again["relative_error"] < 1e-6
    rows = document("inspect", tmp_path / "lotr")
    assert "experts" in json.dumps(rows)
    document("truncate", path, "-o", tmp_path / "low", "--rank", 2)
    document("compress", path, "-o", tmp_path / "small", "--tolerance", "0.2")
    document("verify", path, tmp_path / "small")
    document("analyze", path, "-o", tmp_path / "page.html")
    assert "experts.2.down_proj" in json.dumps(document("verify", path, tmp_path / "low"))


def test_a_side_is_shared_as_well_as_any_of_its_rank(tmp_path):
    adapter = lt.load(write(tmp_path / "a", parameters(), target_parameters=TARGETS))
    shared = lt.shared_outer(adapter, rank=2)
    expected = lost2 = 0.0
    for parameter, axis in (("gate_up_proj", 0), ("down_proj", 1)):
        own = [x for name, x in dense(adapter).items() if name.endswith(parameter)]
        values = np.linalg.svd(np.concatenate(own, axis=axis), compute_uv=False)
        expected, lost2 = expected + (values**2).sum(), lost2 + (values[2:] ** 2).sum()
    error = lt.compare(adapter, shared).relative_error
    assert error == pytest.approx((lost2 / expected) ** 0.5, rel=1e-6)
    with pytest.raises(lt.RankError, match="give the rank"):
        lt.shared_outer(adapter)
    with pytest.raises(lt.RankError, match="ranks of a LoTR are its own"):
        lt.shared_outer(lt.convert(adapter, rank=2), rank=2)
    with pytest.raises(lt.RankError, match="at least 1"):
        lt.shared_outer(adapter, rank=0)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_gates_and_ways_up_that_are_apart_are_joined_for_peft(names, tmp_path):
    base = tiny("qwen3_moe")
    block = "block_sparse_moe" if names[0] == "w1" else "mlp"
    modules, expected = [], {}
    for layer, e in np.ndindex(2, 4):
        gate, up, down = (
            lt.LoraModule(
                f"model.layers.{layer}.{block}.experts.{e}.{name}",
                numbers(m, 2, seed=e + 10 * k),
                numbers(2, n, seed=e + 10 * k + 5),
            )
            for k, (name, m, n) in enumerate(zip(names, (16, 16, 32), (32, 32, 16), strict=True))
        )
        modules += [gate, up, down] if e != 2 else [up, down]
        whole = np.vstack([gate.B @ gate.A * (e != 2), up.B @ up.A])
        path = f"model.layers.{layer}.mlp.experts.{e}"
        expected[f"{path}.gate_up_proj"] = torch.from_numpy(whole).double()
        expected[f"{path}.down_proj"] = torch.from_numpy(down.B @ down.A).double()
    adapter = lt.LoraAdapter(tuple(modules), {"target_modules": ["w1"]}, np.dtype("f4"))
    adapter.save(tmp_path / "lora", experts="parameters")
    agree(dense(lt.load(tmp_path / "lora")), expected)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").double()
    dense_model = with_dense(base, expected)
    assert torch.allclose(logits(model), logits(dense_model), rtol=1e-4, atol=1e-4)
