"""Merging into checkpoints of experts, and extracting from them, one expert at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
import transformers  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.torch as lotr  # noqa: E402
from lotrtensor.adapters.formats.checkpoint import Checkpoint  # noqa: E402
from tests.adapters_fixtures import document  # noqa: E402
from tests.moe_models import MODELS, TARGETS, logits, randomise, tiny  # noqa: E402


def adapted(name):
    base = tiny(name, torch.float32)
    model = lotr.apply_lotr(copy.deepcopy(base), target_parameters=TARGETS, rank=2)
    return base, randomise(model)


def save_fused(model, directory):
    """Save a model with its parameters as it has them: fused experts as 3-D tensors."""
    directory.mkdir()
    model.config.save_pretrained(directory)
    tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def load(model, directory):
    """The class's own loader, which joins experts that are stored one by one."""
    found = type(model).from_pretrained(directory, dtype=torch.float32).eval()
    found.set_experts_implementation("eager")
    return found


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", MODELS)
def test_fused_experts_are_merged_slice_by_slice_and_extracted_again(name, tmp_path):
    base, model = adapted(name)
    save_fused(base, tmp_path / "base")
    adapter = lotr.to_adapter(model)
    changed = lt.merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert any(key.endswith("gate_up_proj") for key in changed)
    merged = load(base, tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)
    for form in ("lotr", "lora"):
        found = lt.extract(tmp_path / "base", tmp_path / "merged", rank=2, form=form)
        assert lt.compare(adapter, found).relative_error < 1e-3
        assert lt.extraction_error(tmp_path / "base", tmp_path / "merged", found) < 1e-3
        assert sorted(found.config["target_parameters"]) == sorted(
            f"{path}.{parameter}"
            for path in {m.name.rsplit(".", 2)[0] for m in adapter.to_lora().modules}
            for parameter in ("gate_up_proj", "down_proj")
        )
    loaded = lotr.load_lotr(
        copy.deepcopy(base), lt.extract(tmp_path / "base", tmp_path / "merged", rank=2)
    )
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-2, atol=1e-2)


# Their experts do not run without numbers in transformers 5.3.
@pytest.mark.filterwarnings("ignore:.* does not take a run without numbers")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_update_of_fused_experts_is_merged_into_experts_stored_one_by_one(name, tmp_path):
    base, model = adapted(name)
    base.save_pretrained(tmp_path / "base")
    stored = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    assert not any(key.endswith("gate_up_proj") for key in stored)
    changed = lt.merge(tmp_path / "base", lotr.to_adapter(model), tmp_path / "merged")
    assert len(changed) == 3 * sum(len(g.modules) for g in lotr.to_adapter(model).groups) // 2
    merged = load(base, tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)
    for form in ("lotr", "lora"):  # under the names that the model has
        found = lt.extract(tmp_path / "base", tmp_path / "merged", rank=2, form=form)
        assert lt.compare(lotr.to_adapter(model), found).relative_error < 1e-3
        assert lt.extraction_error(tmp_path / "base", tmp_path / "merged", found) < 1e-3
        assert found.config["target_modules"] == []
    loaded = lotr.load_lotr(
        copy.deepcopy(base), lt.extract(tmp_path / "base", tmp_path / "merged", rank=2)
    )
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-2, atol=1e-2)


def test_one_expert_is_read_at_a_time(tmp_path, monkeypatch):
    base, model = adapted("mixtral")
    save_fused(base, tmp_path / "base")
    lt.merge(tmp_path / "base", lotr.to_adapter(model), tmp_path / "merged")
    shapes = []
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint,
        "read",
        lambda self, name: shapes.append(len(self.tensors[name].shape)) or read(self, name),
    )
    lt.extract(tmp_path / "base", tmp_path / "merged", rank=2)
    assert shapes
    assert set(shapes) == {2}


def test_an_expert_that_does_not_differ_stays_with_those_of_its_parameter(tmp_path):
    base = tiny("mixtral", torch.float32)
    save_fused(base, tmp_path / "base")
    with torch.no_grad():
        base.model.layers[1].mlp.experts.down_proj[2] += 1
    save_fused(base, tmp_path / "tuned")
    found = lt.extract(tmp_path / "base", tmp_path / "tuned", rank=1)
    assert [group.modules for group in found.groups] == [
        tuple(f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(4))
    ]
    lora = lt.extract(tmp_path / "base", tmp_path / "tuned", rank=1, form="lora")
    lora.save(tmp_path / "lora")
    deltas = [np.abs(m.B @ m.A).max() for m in lt.load(tmp_path / "lora").modules]
    np.testing.assert_allclose(deltas, [0, 0, 1, 0], atol=1e-5)


def write(directory, **tensors):
    directory.mkdir()
    named = {key.replace("__", "."): value for key, value in tensors.items()}
    safetensors.torch.save_file(named, directory / "model.safetensors")
    return directory


def test_the_layout_is_told_by_shapes_or_asked_for(tmp_path):
    rng = torch.Generator().manual_seed(0)
    up, down = (torch.randn(3, *s, generator=rng) for s in ((4, 12), (6, 4)))  # in × out
    base = write(tmp_path / "base", mlp__experts__gate_up_proj=up, mlp__experts__down_proj=down)
    tuned = write(
        tmp_path / "tuned", mlp__experts__gate_up_proj=up + 1, mlp__experts__down_proj=down
    )
    found = lt.extract(base, tuned, rank=1)
    assert found.groups[0].shape == (12, 4)
    alone = [
        write(tmp_path / n, mlp__experts__gate_up_proj=x) for n, x in (("a", up), ("b", up + 1))
    ]
    with pytest.raises(lt.FormatError, match=r"experts\.gate_up_proj, 4 × 12 each.*fan-in-fan-out"):
        lt.extract(*alone, rank=1)
    assert lt.extract(*alone, rank=1, fan_in_fan_out="experts").groups[0].shape == (12, 4)
    assert lt.extract(*alone, rank=1, fan_in_fan_out="^$").groups[0].shape == (4, 12)


def test_a_square_parameter_is_merged_where_its_layout_is_told(tmp_path):
    weight = torch.zeros(2, 4, 4)
    base = write(tmp_path / "base", mlp__experts__up_proj=weight)
    modules = tuple(
        lt.LoraModule(f"mlp.experts.{e}.up_proj", np.eye(4)[:, :1], np.eye(4)[1:2]) for e in (0, 1)
    )
    adapter = lt.LoraAdapter(modules, {}, np.dtype("f4"))
    with pytest.raises(lt.FormatError, match=r"up_proj, 4 × 4 each"):
        lt.merge(base, adapter, tmp_path / "out")
    for pattern, place in (("^$", (0, 1)), ("experts", (1, 0))):
        lt.merge(base, adapter, tmp_path / "out", fan_in_fan_out=pattern, force=True)
        merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
        assert merged["mlp.experts.up_proj"][1][place] == 1


def test_the_commands_take_experts(tmp_path):
    base, model = adapted("gpt_oss")
    save_fused(base, tmp_path / "base")
    lotr.save_lotr(model, tmp_path / "lotr")
    document("merge", tmp_path / "lotr", "--base", tmp_path / "base", "-o", tmp_path / "merged")
    found = document(
        "extract",
        "--base",
        tmp_path / "base",
        "--tuned",
        tmp_path / "merged",
        "-o",
        tmp_path / "again",
        "--rank",
        2,
    )
    assert "experts" in str(found)
    assert lt.compare(lt.load(tmp_path / "lotr"), lt.load(tmp_path / "again")).relative_error < 1e-3


def quantised(form, stack):
    """A stack of experts as quantised checkpoints hold it: bytes, and scales beside them."""
    if form == "scaled float8":
        return {"": stack.to(torch.float8_e4m3fn), "_scale_inv": torch.ones(len(stack), 1, 1)}
    packed = (stack[..., None, :8].abs() * 255).to(torch.uint8)
    return {"_blocks": packed, "_scales": packed[..., 0]}


@pytest.mark.parametrize("form", ["scaled float8", "MXFP4"])
def test_quantised_experts_are_called_that(form, tmp_path):
    for seed, side in enumerate(("base", "tuned")):
        base = tiny("qwen3_moe", torch.float32, seed)
        save_fused(base, tmp_path / side)
        tensors = {}
        for key, value in base.state_dict().items():
            parts = quantised(form, value) if "mlp.experts" in key else {"": value}
            tensors |= {key + end: part.contiguous() for end, part in parts.items()}
        path = tmp_path / side / "model.safetensors"
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    _, model = adapted("qwen3_moe")
    with pytest.raises(lt.DataError, match=r"mlp\.experts.*is quantised"):
        lt.merge(tmp_path / "base", lotr.to_adapter(model), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(lt.DataError, match=r"mlp\.experts.*is quantised"):
        lt.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    with pytest.warns(lt.LotrWarning, match="are not part of the adapter"):
        found = lt.extract(tmp_path / "base", tmp_path / "tuned", rank=32, modules="q_proj")
    assert all("q_proj" in name for group in found.groups for name in group.modules)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_adapter_of_experts_one_by_one_for_fused_ones_names_the_way_out(name, tmp_path):
    """The way out is walked: export anew, and merge and load what comes of it."""
    base = tiny(name, torch.float32)
    save_fused(base, tmp_path / "base")
    inside = 48 if name == "mixtral" else 16
    gate, up, down = (
        ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )
    holder = "block_sparse_moe" if name == "mixtral" else "mlp"
    rng = np.random.default_rng(0)
    modules = tuple(
        lt.LoraModule(
            f"model.layers.{layer}.{holder}.experts.{expert}.{part}",
            rng.standard_normal((32 if part == down else inside, 2)) / 8,
            rng.standard_normal((2, inside if part == down else 32)) / 8,
        )
        for layer in range(2)
        for expert in range(4)
        for part in (gate, up, down)
    )
    apart = lt.LoraAdapter(modules, {}, np.dtype("float32"))
    with pytest.raises(lt.FormatError, match=r"one by one.*lotr export --experts parameters"):
        lt.merge(tmp_path / "base", apart, tmp_path / "merged")
    with pytest.raises(lt.FormatError, match=r"one by one.*lotr export --experts parameters"):
        lotr.load_lotr(copy.deepcopy(base), lt.convert(apart, tolerance=1e-6))
    apart.save(tmp_path / "apart", experts="modules")
    out = ["-o", tmp_path / "fused"]
    document("export", tmp_path / "apart", *out, "--experts", "parameters")
    fused = lt.load(tmp_path / "fused")
    lt.merge(tmp_path / "base", fused, tmp_path / "merged")
    merged = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    deltas = {module.name: torch.from_numpy(module.B @ module.A).float() for module in modules}
    for layer in range(2):
        for expert in range(4):
            path = f"model.layers.{layer}.{holder}.experts.{expert}"
            own = f"model.layers.{layer}.mlp.experts"
            both = torch.cat([deltas[f"{path}.{gate}"], deltas[f"{path}.{up}"]])
            for key, delta in (("gate_up_proj", both), ("down_proj", deltas[f"{path}.{down}"])):
                found = merged[f"{own}.{key}"][expert] - base.state_dict()[f"{own}.{key}"][expert]
                torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-5)
    loaded = copy.deepcopy(base)
    lotr.load_lotr(loaded, lt.convert(fused, tolerance=1e-6))
    torch.testing.assert_close(
        logits(loaded), logits(load(base, tmp_path / "merged")), rtol=1e-3, atol=1e-3
    )
