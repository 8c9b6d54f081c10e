"""Training on the bases of a pack: cores alone, saved in kilobytes, and added without loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import safetensors.numpy  # noqa: E402

import lotrtensor as lt  # noqa: E402
import lotrtensor.peft as lotr  # noqa: E402
from adapters_fixtures import lotr as lotr_command  # noqa: E402
from adapters_fixtures import snapshot  # noqa: E402
from lotrtensor.adapters.formats.coded_row import from_row, to_row  # noqa: E402
from pack_fixtures import contents, dense, dense_error, family, strangers  # noqa: E402
from tests.test_peft_pack import Base, X, base, state  # noqa: E402


@pytest.fixture
def packed(tmp_path: Path) -> lt.Pack:
    return lt.pack(family(5), tmp_path / "pack", tolerance=0.1, share="adapters")


def fresh(packed: lt.Pack, **options) -> torch.nn.Module:
    config = lotr.LotrConfig(init=str(packed.path), train="cores", **options)
    return peft.get_peft_model(base(), config)


def train(model: torch.nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1.0).square().mean().backward()
        optimizer.step()


def updates(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Dense ΔW of every layer, by hand."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, lotr.LotrLayer):
            left, right = (getattr(layer.lotr_shared["default"], s) for s in ("left", "right"))
            parts = [x.detach().double() for x in (left, layer.lotr_core["default"], right.T)]
            found[name] = layer.lotr_scale["default"] * torch.linalg.multi_dot(parts).numpy()
    return found


def test_a_new_adapter_starts_from_zero_on_the_bases(packed: lt.Pack) -> None:
    model = fresh(packed)
    torch.testing.assert_close(model(X), base()(X))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == sum(np.prod(cell.basis.rank) for cell in packed.cells)
    layer = model.base_model.model.layers[1]["dense"]
    cell = next(c for c in packed.cells if c.modules == ("layers.1.dense",))
    left, right = layer.lotr_shared["default"].left, layer.lotr_shared["default"].right
    np.testing.assert_allclose(left.detach(), cell.basis.factors[0], atol=1e-7)
    np.testing.assert_allclose(right.detach(), cell.basis.factors[1], atol=1e-7)


@pytest.mark.parametrize("share", ["adapters", "both"])
def test_cores_are_saved_and_added_without_loss(tmp_path: Path, share: str) -> None:
    packed = lt.pack(family(5), tmp_path / "pack", tolerance=0.1, share=share)
    model = fresh(packed)
    train(model)
    before = contents(packed.path)
    lotr.save_cores(model, packed, tmp_path / "mine")
    assert contents(packed.path) == before
    size = sum(path.stat().st_size for path in (tmp_path / "mine").iterdir())
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size < 3 * numbers + 1000
    row = packed.add("mine", tmp_path / "mine")
    assert row.uses_bases and row.relative_error < 1e-4 and row.bytes < 3 * numbers + 600
    found, expected = dense(packed.member("mine").updates()), updates(model)
    assert set(found) == set(expected)
    lost2 = sum(np.linalg.norm(found[name] - expected[name]) ** 2 for name in found)
    norm2 = sum(np.linalg.norm(x) ** 2 for x in expected.values())
    assert np.sqrt(lost2 / norm2) <= row.relative_error + 1e-6
    # What the file holds is what the pack holds, to the bit.
    lt.pack(family(5), tmp_path / "again", tolerance=0.1, share=share).add("x", tmp_path / "mine")
    again = dense(lt.Pack(tmp_path / "again").member("x").updates())
    assert all(np.array_equal(again[name], found[name]) for name in found)
    loaded = lotr.load_pack(base(), packed, ["mine"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), model(X), rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_the_pack(packed: lt.Pack, tmp_path: Path) -> None:
    model = fresh(packed)
    train(model)
    lotr.save_cores(model, packed, tmp_path / "mine")
    packed.add("mine", tmp_path / "mine")
    more = lotr.load_pack(base(), packed, ["mine"], train="cores")
    train(more)
    lotr.save_cores(more, packed, tmp_path / "more", adapter_name="mine")
    assert packed.add("more", tmp_path / "more").relative_error < 1e-4
    packed.check()


def test_the_command_adds_it(packed: lt.Pack, tmp_path: Path) -> None:
    model = fresh(packed)
    train(model)
    lotr.save_cores(model, packed, tmp_path / "mine")
    done = lotr_command("add", packed.path, tmp_path / "mine", "--json")
    assert done.code == 0
    assert json.loads(done.out)["adapters"][-1]["relative_error"] < 1e-4
    lora = lt.Pack(packed.path).unpack("mine")
    found = lt.LoraAdapter(lora.modules, {}, np.dtype("float32"))
    assert dense_error(lt.Pack(packed.path).member("mine").updates(), found) < 1e-3


def test_a_head_that_is_trained_is_carried(packed: lt.Pack, tmp_path: Path) -> None:
    model = fresh(packed, modules_to_save=["score"])
    train(model)
    lotr.save_cores(model, packed, tmp_path / "mine")
    packed.add("mine", tmp_path / "mine")
    with torch.no_grad():
        again = lotr.load_pack(base(), packed, ["mine"])
        torch.testing.assert_close(again(X), model(X), rtol=1e-3, atol=1e-3)


def test_target_modules_choose_among_the_bases(packed: lt.Pack, tmp_path: Path) -> None:
    model = fresh(packed, target_modules=["query"])
    assert set(updates(model)) == {"layers.0.query", "layers.1.query"}
    train(model)
    lotr.save_cores(model, packed, tmp_path / "mine")
    assert packed.add("mine", tmp_path / "mine").relative_error < 1e-4
    assert set(dense(packed.member("mine").updates())) == {"layers.0.query", "layers.1.query"}
    assert set(updates(fresh(packed, exclude_modules=["query"]))) == {
        "layers.0.dense",
        "layers.1.dense",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_the_stated_error_is_that_of_the_model(
    packed: lt.Pack, tmp_path: Path, dtype: torch.dtype, autocast: bool, rslora: bool
) -> None:
    """Half-precision bases are rounded, with PEFT's cast to float32 or without."""
    config = lotr.LotrConfig(init=str(packed.path), train="cores", use_rslora=rslora)
    model = peft.get_peft_model(Base().to(dtype), config, autocast_adapter_dtype=autocast)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.01 * torch.randn_like(parameter))
    lotr.save_cores(model, packed, tmp_path / "mine")
    row = packed.add("mine", tmp_path / "mine")
    found, expected = dense(packed.member("mine").updates()), updates(model)
    lost2 = sum(np.linalg.norm(found[name] - expected[name]) ** 2 for name in found)
    norm2 = sum(np.linalg.norm(x) ** 2 for x in expected.values())
    assert np.sqrt(lost2 / norm2) == pytest.approx(row.relative_error, rel=0.01, abs=1e-7)
    assert row.relative_error < (1e-4 if autocast or dtype == torch.float32 else 0.01)


def test_embeddings_stay_embeddings(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.up = torch.nn.Embedding(50, 24), torch.nn.Linear(24, 30)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.up(self.embed_tokens(ids))

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embed_tokens

    rng, ids = np.random.default_rng(0), torch.arange(50)
    bases = {n: (rng.normal(size=(m, 3)), rng.normal(size=(3, k)), e)
             for n, m, k, e in (("embed_tokens", 24, 50, True), ("up", 30, 24, False))}  # fmt: skip
    adapters = {}
    for i in range(4):
        modules = [lt.LoraModule(n, b @ (np.eye(3) + 0.3 * rng.normal(size=(3, 3))), a, e)
                   for n, (b, a, e) in bases.items()]  # fmt: skip
        adapters[f"user-{i}"] = lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))
    packed = lt.pack(adapters, tmp_path / "pack", tolerance=0.05, share="adapters")
    config = lotr.LotrConfig(init=str(packed.path), train="cores")
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    lotr.save_cores(model, packed, tmp_path / "mine")
    packed.add("mine", tmp_path / "mine")
    assert not packed.member("mine").extras  # and its weight is none of the adapter
    torch.manual_seed(0)
    again = lotr.load_pack(Net(), packed, ["mine"])
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-3, atol=1e-3)
    lora = packed.unpack("mine")
    assert {m.name: m.embedding for m in lora.modules} == {"embed_tokens": True, "up": False}


# --- refusals


FIELDS = {
    "target_modules": (["query", "dnese"], lt.FormatError, "'dnese'"),
    "layers_to_transform": ([0], lt.UnsupportedAdapterError, "layers_to_transform"),
    "target_parameters": (["nothing.here"], lt.UnsupportedAdapterError, "target_parameters"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_choose_nothing_are_refused(packed: lt.Pack, field: str) -> None:
    value, error, words = FIELDS[field]
    with pytest.raises(error, match=words):
        fresh(packed, **{field: value})


def test_cores_that_are_not_finite(packed: lt.Pack, tmp_path: Path) -> None:
    model = fresh(packed)
    with torch.no_grad():
        model.base_model.model.layers[1]["dense"].lotr_core["default"][0, 0] = float("nan")
    with pytest.raises(lt.DataError, match=r"layers\.1\.dense is NaN"):
        lotr.save_cores(model, packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tolerance", [-5, "x"])
def test_a_tolerance_that_is_none(packed: lt.Pack, tmp_path: Path, tolerance: object) -> None:
    lotr.save_cores(fresh(packed), packed, tmp_path / "mine")
    with pytest.raises(lt.LotrError, match="tolerance"):
        packed.add("mine", tmp_path / "mine", tolerance=tolerance)


def test_other_bases_are_refused(packed: lt.Pack, tmp_path: Path) -> None:
    model = fresh(packed)
    train(model)
    lotr.save_cores(model, packed, tmp_path / "mine")
    other = lt.pack(family(5, seed=3), tmp_path / "other", tolerance=0.1, share="adapters")
    apart = lt.pack(strangers(2), tmp_path / "apart", tolerance=0.3, share="none")
    for pack in (other, apart):
        before = snapshot(pack.path)
        with pytest.raises(lt.FormatError, match="trained on the bases of another pack"):
            pack.add("mine", tmp_path / "mine")
        with pytest.raises(lt.FormatError, match="are not those of"):
            lotr.save_cores(model, pack, tmp_path / "out")
        assert snapshot(pack.path) == before
    assert not (tmp_path / "out").exists()
    with pytest.raises(lt.FormatError, match="no bases of modules"):
        fresh(apart)


def test_factors_that_trained_are_no_bases(packed: lt.Pack, tmp_path: Path) -> None:
    config = lotr.LotrConfig(init=str(packed.path))  # trains all
    model = peft.get_peft_model(base(), config)
    train(model, 2)
    train(model, 2)
    with pytest.raises(lt.FormatError, match="save_pretrained"):
        lotr.save_cores(model, packed, tmp_path / "out")


def test_private_parts_are_refused(packed: lt.Pack, tmp_path: Path) -> None:
    packed.add("other", family(6, own=0.5)["user-5"], tolerance=0.1)
    model = lotr.load_pack(base(), packed, ["other"])
    assert any(any(g.private_ranks) for g in model.base_model.plans("other"))
    with pytest.raises(lt.UnsupportedAdapterError, match="private part"):
        lotr.save_cores(model, packed, tmp_path / "out", adapter_name="other")


def test_a_directory_of_cores_is_no_adapter(packed: lt.Pack, tmp_path: Path) -> None:
    lotr.save_cores(fresh(packed), packed, tmp_path / "mine")
    for load in (lt.load, lambda path: peft.PeftModel.from_pretrained(base(), path)):
        with pytest.raises(lt.FormatError, match="lotr add puts there"):
            load(str(tmp_path / "mine"))
    with pytest.raises(lt.FormatError, match="exists"):
        lotr.save_cores(fresh(packed), packed, tmp_path / "mine")


def marked(row: np.ndarray, mark: str | None = None, **fields) -> np.ndarray:
    coded, rest = from_row(row, "row")
    fields |= {"bases": mark} if mark is not None else {}
    return to_row(coded._replace(records=coded.records | fields), rest)


def coreless(row: np.ndarray) -> np.ndarray:
    coded, _ = from_row(row, "row")
    kept = {k: v for k, v in coded.records.items() if k not in ("weight", "step")}
    return to_row(coded._replace(records=kept))


ROWS = {
    "no row": (lambda row: None, "missing or no row"),
    "numbers": (lambda row: row.astype("float32"), "missing or no row"),
    "an end": (lambda row: row[:-1], None),
    "more": (lambda row: np.append(row, np.uint8(0)), None),
    "other bases": (lambda row: marked(row, "0" * 32), "another pack"),
    "no bases": (lambda row: marked(row, ""), "another pack"),
    "no cores": (coreless, "has no core"),
    "a huge step": (lambda row: marked(row, step=10**400), "weight and step"),
}


@pytest.mark.parametrize("damage", ROWS)
def test_damaged_cores(packed: lt.Pack, tmp_path: Path, damage: str) -> None:
    change, words = ROWS[damage]
    model = fresh(packed)
    train(model, 2)
    lotr.save_cores(model, packed, tmp_path / "mine")
    file = tmp_path / "mine" / "adapter_model.safetensors"
    row = change(safetensors.numpy.load_file(file)["lotr_coded"])
    safetensors.numpy.save_file({} if row is None else {"lotr_coded": row}, file)
    before = snapshot(packed.path)
    with pytest.raises(lt.FormatError, match=words):
        packed.add("mine", tmp_path / "mine")
    assert snapshot(packed.path) == before


def test_what_is_no_lotr_model(packed: lt.Pack, tmp_path: Path) -> None:
    lora = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["query"]))
    for model in (base(), lora):
        with pytest.raises(lt.UnsupportedAdapterError, match="without LoTR"):
            lotr.save_cores(model, packed, tmp_path / "out")
    for name in ("b", ["b"]):
        with pytest.raises(lt.FormatError, match=r"no adapter .*'b'.*; it has default"):
            lotr.save_cores(fresh(packed), packed, tmp_path / "out", adapter_name=name)


def test_a_model_without_the_modules(packed: lt.Pack) -> None:
    config = lotr.LotrConfig(init=str(packed.path), train="cores")
    model = Base(layers=0).double()
    before = state(model)
    with pytest.raises(lt.FormatError, match="no bases of modules"):
        peft.get_peft_model(model, config)
    assert list(state(model)) == list(before)
