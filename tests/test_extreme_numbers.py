"""Adapters far from 1: squares, products and cores stay in the range of a type, or are refused.

Every file that is written is read by hand, in float64, and held against the dense ΔW of the source.
"""

from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from typer.testing import CliRunner

import lotrtensor as lt
from lotrtensor.adapters.lotr_group import FactoredCore, LotrGroup
from lotrtensor.adapters.rounding import exact_scale, rounded
from lotrtensor.cli.app import app
from tests.adapters_fixtures import (
    DTYPES,
    dense_lora,
    dense_lotr,
    distance,
    lotr,
    read_config,
    write_lora,
)
from tests.checkpoint_fixtures import write

NAMES = [f"layers.{k}.q" for k in range(4)]


def pairs(b_scale, a_scale, dtype="float32", r=3):
    rng = np.random.default_rng(0)
    return {
        name: (
            (rng.standard_normal((8, r)) * b_scale).astype(dtype),
            (rng.standard_normal((r, 7)) * a_scale).astype(dtype),
        )
        for name in NAMES
    }


SCALES = [(1e-30, 1e-30), (1e-30, 1.0), (1e-18, 1e-18), (1e15, 1e15), (1e30, 1e-30), (1e25, 1e25)]


@pytest.fixture(params=SCALES, ids=str)
def source(request, tmp_path):
    return write_lora(tmp_path / "lora", pairs(*request.param))


def true(path):
    return dense_lora(path, 2.0)


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_convert_writes_what_it_reports(source, tmp_path, dtype, rank):
    adapter = lt.convert(lt.load(source), rank=rank, dtype=dtype)
    adapter.save(tmp_path / "out")
    error = distance(dense_lotr(tmp_path / "out"), true(source))
    assert 0.0 < error < 1.0
    assert adapter.relative_error == pytest.approx(error, rel=1e-4)
    assert 0.0 <= adapter.lower_bound <= adapter.relative_error
    read = lt.load(tmp_path / "out")
    assert read.relative_error == pytest.approx(error, rel=1e-4)
    assert lt.compare(lt.load(source), read).relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("goal", [{"tolerance": 0.3}, {"budget": "60%"}, {"energy": 0.9}])
def test_goals_hold(source, tmp_path, goal):
    adapter = lt.convert(lt.load(source), **goal)
    adapter.save(tmp_path / "out")
    error = distance(dense_lotr(tmp_path / "out"), true(source))
    assert adapter.relative_error == pytest.approx(error, rel=1e-4)
    assert error <= goal.get("tolerance", 1.0) * (1 + 1e-6)
    assert error**2 <= 1 - goal.get("energy", 0.0) + 1e-6


def test_export_and_truncation_of_both_forms(source, tmp_path):
    lora, deltas = lt.load(source), true(source)
    full = lt.convert(lora, rank=(8, 7))
    full.to_lora().save(tmp_path / "exported")
    assert distance(dense_lora(tmp_path / "exported", 1.0), deltas) < 1e-5
    best = {}
    for name, delta in deltas.items():
        u, values, v = np.linalg.svd(delta)
        best[name] = values[0] * np.outer(u[:, 0], v[0])
    lt.truncate(lora, rank=1).save(tmp_path / "lora-1")
    assert distance(dense_lora(tmp_path / "lora-1", 1.0), best) < 1e-5
    small = lt.truncate(full, rank=2)
    small.save(tmp_path / "lotr-2")
    error = distance(dense_lotr(tmp_path / "lotr-2"), deltas)
    assert lt.compare(lora, small).relative_error == pytest.approx(error, rel=1e-4)


def test_the_command_line_says_the_same(source, tmp_path):
    assert lotr("convert", source, "-o", tmp_path / "out", "--rank", 2).code == 0
    assert lotr("inspect", tmp_path / "out").code == 0
    assert lotr("verify", source, tmp_path / "out").code == 0
    assert lotr("export", tmp_path / "out", "-o", tmp_path / "back").code == 0
    assert distance(dense_lora(tmp_path / "back", 1.0), dense_lotr(tmp_path / "out")) < 1e-5


def test_merge_adds_the_update(source, tmp_path):
    import safetensors.numpy

    weights = {f"{name}.weight": np.zeros((8, 7)) for name in NAMES}
    base, deltas = write(tmp_path / "base", weights), true(source)
    for form, adapter in {
        "lora": lt.load(source),
        "lotr": lt.convert(lt.load(source), rank=(8, 7)),
    }.items():
        lt.merge(base, adapter, tmp_path / f"merged-{form}")
        merged = safetensors.numpy.load_file(tmp_path / f"merged-{form}" / "model.safetensors")
        assert distance({name: merged[f"{name}.weight"] for name in NAMES}, deltas) < 1e-5


def test_compress_measures_itself_or_refuses(source):
    lora = lt.load(source)
    try:
        small = lt.compress(lora, tolerance=0.3)
    except lt.DataError as error:
        assert "values of a compressed file do not hold" in str(error)
        return
    expected = distance({m.name: m.B @ m.A for m in small.updates()}, true(source))
    assert small.relative_error == pytest.approx(expected, rel=1e-3)


def test_torch_layers_compute_the_update(source):
    torch = pytest.importorskip("torch")
    from lotrtensor.torch import load_lotr

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = torch.nn.ModuleDict
            self.layers = torch.nn.ModuleList(
                layer({"q": torch.nn.Linear(7, 8, dtype=torch.float64)}) for _ in NAMES
            )

        def forward(self, x):
            return torch.stack([layer["q"](x) for layer in self.layers])

    net, deltas = Net(), true(source)
    for layer in net.layers:
        torch.nn.init.zeros_(layer["q"].weight)
        torch.nn.init.zeros_(layer["q"].bias)
    load_lotr(net, lt.convert(lt.load(source), rank=(8, 7), dtype="float64"))
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.stack([x.numpy() @ deltas[name].T for name in NAMES])
    with torch.no_grad():
        found = net(x).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_half_precision_beyond_its_range_is_scaled_by_a_power_of_two(tmp_path):
    path = write_lora(tmp_path / "x", pairs(2e4, 1e3, "float16"), dtype="float16")
    adapter = lt.convert(lt.load(path), rank=(8, 7))
    adapter.save(tmp_path / "out")
    scale = read_config(tmp_path / "out")["groups"][0]["scale"]
    assert np.log2(scale) == int(np.log2(scale)) > 0
    assert adapter.dtype == np.float16
    assert distance(dense_lotr(tmp_path / "out"), true(path)) < 2e-3


def test_ordinary_adapters_have_the_scale_one(tmp_path):
    for dtype in DTYPES:
        path = write_lora(tmp_path / dtype, dtype=dtype)
        assert {group.scale for group in lt.convert(lt.load(path), rank=4).groups} == {1.0}


@pytest.mark.parametrize("scale", [1e-280, 1e-100, 1e100, 1e280])
def test_arrays_whose_squares_no_type_holds_are_decomposed_all_the_same(scale):
    """As long as the numbers themselves are normal ones."""
    slices = np.random.default_rng(0).standard_normal((4, 8, 7))
    usual, far = lt.tucker2(slices, 3), lt.tucker2(scale * slices, 3)
    assert far.relative_error == pytest.approx(usual.relative_error, rel=1e-9)
    dense = np.einsum("ip,kpq,jq->kij", far.tucker2.left, far.tucker2.core, far.tucker2.right)
    lost = np.linalg.norm(dense / scale - slices) / np.linalg.norm(slices)
    assert lost == pytest.approx(far.relative_error, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_small_values_of_terms_are_not_kept_in_half_precision(tmp_path, scale):
    adapter = lt.load(write_lora(tmp_path / "x", pairs(scale, scale)))
    found = lt.compress(adapter, tolerance=0.3, form="lora")
    assert found.relative_error <= 0.3
    smallest = min(float(group.stack.private[0].values.min()) for group in found.groups)
    kept = "float32" if smallest < 1e-2 else "float16"
    assert (smallest < 1e-2) == (scale < 1.0)
    assert {group.stack.value_dtype.name for group in found.groups} == {kept}


@pytest.mark.parametrize("scale", [1e80, 1e-80])
def test_float64_beyond_any_square_is_refused_by_name(tmp_path, scale):
    path = write_lora(tmp_path / "x", pairs(scale, scale, "float64"), dtype="float64")
    adapter = lt.load(path)
    calls = [
        lambda: lt.convert(adapter, rank=1),
        lambda: lt.convert(adapter, budget="100%"),
        lambda: lt.truncate(adapter, rank=1),
        lambda: lt.compress(adapter, tolerance=0.3),
        lambda: lt.analyze(adapter),
        lambda: lt.compare(adapter, adapter),
    ]
    for call in calls:
        with pytest.raises(lt.DataError, match=r"layers\.0\.q"):
            call()


@pytest.mark.parametrize("scale", [1e60, 1e-60])
def test_float64_whose_squares_hold_is_converted(tmp_path, scale):
    path = write_lora(tmp_path / "x", pairs(scale, 1.0, "float64"), dtype="float64")
    adapter = lt.convert(lt.load(path), rank=2)
    adapter.save(tmp_path / "out")
    error = distance(dense_lotr(tmp_path / "out"), true(path))
    assert adapter.relative_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("size", [1e-200, 1e-300])
def test_deltas_too_small_to_be_squared_are_refused(tmp_path, size):
    rng = np.random.default_rng(0)
    zero = {f"{name}.weight": np.zeros((6, 5)) for name in NAMES}
    tuned = {key: size * rng.standard_normal(x.shape) for key, x in zero.items()}
    both = write(tmp_path / "base", zero), write(tmp_path / "tuned", tuned)
    for form in ("lotr", "lora"):
        with pytest.raises(lt.DataError):
            lt.extract(*both, rank=1, form=form)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("form", ["lotr", "lora"])
def test_deltas_far_from_one_are_extracted(tmp_path, size, form):
    rng = np.random.default_rng(0)
    zero = {f"{name}.weight": np.zeros((6, 5), np.float32) for name in NAMES}
    tuned = {k: (size * rng.standard_normal(x.shape)).astype("f4") for k, x in zero.items()}
    both = write(tmp_path / "base", zero), write(tmp_path / "tuned", tuned)
    adapter = lt.extract(*both, rank=(6, 5) if form == "lotr" else 5, form=form)
    adapter.save(tmp_path / "out")
    dense = dense_lotr(tmp_path / "out") if form == "lotr" else dense_lora(tmp_path / "out", 1.0)
    expected = {name: tuned[f"{name}.weight"].astype(float) for name in NAMES}
    assert distance(dense, expected) < 1e-5
    assert lt.extraction_error(*both, adapter) < 1e-5


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_the_core_decomposes_float32_far_from_one(size):
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((3, 6, 5))
    B, A = rng.standard_normal((3, 6, 2)), rng.standard_normal((3, 2, 5))
    for near, far in (
        (stack.astype("f4"), (stack * size).astype("f4")),
        (lt.LowRankStack(B, A), lt.LowRankStack((B * size).astype("f4"), (A * size).astype("f4"))),
    ):
        expected, found = lt.tucker2(near, rank=2), lt.tucker2(far, rank=2)
        assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-4)
        assert np.isfinite(found.tucker2.core).all()
        assert lt.norm(far) > 0


def test_products_at_the_end_of_float64_are_refused():
    for size in (1e200, 1e-200):
        with pytest.raises(lt.DataError):
            lt.tucker2(lt.LowRankStack(np.full((2, 3, 1), size), np.full((2, 1, 3), size)), rank=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_refuses_what_a_type_loses(dtype):
    for value in (1e-320, 1e308):
        x = np.array([value, 0.0])
        if dtype == "float64":
            assert rounded(x, DTYPES[dtype], "x")[0] == value
        else:
            with pytest.raises(lt.DataError, match="x has entries"):
                rounded(x, DTYPES[dtype], "x")
    assert not rounded(np.zeros(2), DTYPES[dtype], "x").any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_is_a_power_of_two_that_brings_numbers_into_the_range(dtype):
    for exponent in range(-300, 300, 7):
        largest = 1.7 * 10.0**exponent
        scale = exact_scale(largest, DTYPES[dtype])
        assert np.frexp(scale)[0] == 0.5
        stored = float(np.array(largest / scale).astype(DTYPES[dtype]))
        assert np.isfinite(stored)
        assert stored * scale == pytest.approx(largest, rel=0.01)


def test_a_native_file_beyond_any_square_is_refused(tmp_path):
    path = write_lora(tmp_path / "x", pairs(1.0, 1.0, "float64"), dtype="float64")
    lt.convert(lt.load(path), rank=2).save(tmp_path / "out")
    import json

    config = read_config(tmp_path / "out")
    config["groups"][0]["scale"] = 1e149
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lt.DataError, match="squares"):
        lt.load(tmp_path / "out").to_lora()


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e6])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-8), ("bfloat16", 1e-6)])
def test_an_export_does_not_depend_on_how_cores_are_written(condition, dtype, error):
    """Cores (L S)(S⁻¹ R): only the product has meaning."""
    rng = np.random.default_rng(0)
    turn = np.array([[1, 1], [1, 1 + 1 / condition]])
    left, right = rng.standard_normal((2, 64, 120)).astype(np.float32)
    cores = tuple(
        FactoredCore(rng.standard_normal((120, 2)) @ turn, np.linalg.inv(turn) @ outer)
        for outer in rng.standard_normal((40, 2, 120))
    )
    names = tuple(f"layers.{k}.q" for k in range(40))
    group = LotrGroup("q", names, left, right, cores, (2,) * 40)
    assert group.thin
    adapter = lt.LotrAdapter((group,), {}, np.dtype(dtype))
    assert lt.compare(adapter, adapter.to_lora()).relative_error < error


@pytest.mark.parametrize("form", ["LoTR", "compressed"])
def test_an_export_in_a_wider_type_loses_nothing(tmp_path, form):
    bundled = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")  # in bfloat16
    made = {"LoTR": lambda: lt.convert(bundled, rank=8)}
    made["compressed"] = lambda: lt.compress(bundled, budget="10%", form="lora")
    made[form]().save(tmp_path / "small")
    lora = tmp_path / "lora"
    arguments = ["export", str(tmp_path / "small"), "-o", str(lora), "--dtype", "float64"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert lt.compare(lt.load(tmp_path / "small"), lt.load(lora)).relative_error < 1e-12


@pytest.mark.parametrize("step", [1e-160, 1e160])
def test_a_compressed_update_beyond_any_square_is_refused(step):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((48, 4)), rng.standard_normal((4, 40))
    modules = tuple(
        lt.LoraModule(f"layers.{k}.q", left @ rng.standard_normal((4, 4)), right) for k in range(6)
    )
    small = lt.compress(lt.LoraAdapter(modules, {}, np.dtype("f4")), tolerance=1e-2, form="lotr")
    group = small.groups[0]
    shared = replace(group.stack.shared, step=step)
    far = replace(small, groups=(replace(group, stack=replace(group.stack, shared=shared)),))
    for use in (lambda: lt.compare(small, far), lambda: lt.similarity([far]), far.to_lora):
        with pytest.raises(lt.DataError, match=r"layers\.0\.q"):
            use()
