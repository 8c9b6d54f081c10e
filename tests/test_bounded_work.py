"""Time and memory follow the size of what is read, whatever its names, ranks and numbers are."""

import ctypes
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

import lotrtensor as lt
from lotrtensor.adapters.grouping import layer_order
from lotrtensor.analysis.sharing import MOST
from lotrtensor.cli.app import app
from tests.adapters_fixtures import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    dense_lotr,
    distance,
    document,
    lotr,
    write_lora,
)
from tests.memory import peak_of


def factored(path, m, n, p, q, slices, r=1):
    """A native directory whose cores are products of ``r`` columns."""
    import safetensors.numpy

    rng = np.random.default_rng(0)
    names = [f"layers.{k}.q" for k in range(slices)]
    tensors = {
        "base_model.lotr_left.g": rng.standard_normal((m, p), np.float32),
        "base_model.lotr_right.g": rng.standard_normal((n, q), np.float32),
    }
    for name in names:
        key = f"{PREFIX}{name}.lotr_core"
        tensors[key + "_left"] = rng.standard_normal((p, r), np.float32)
        tensors[key + "_right"] = rng.standard_normal((r, q), np.float32)
    path.mkdir()
    safetensors.numpy.save_file(tensors, path / WEIGHTS)
    group = {"name": "g", "modules": names, "shape": [m, n], "rank": [p, q], "scale": 0.5}
    group |= {"slice_ranks": [r] * slices, "embedding": False, "fit": None}
    config = {"peft_type": "LOTR", "format_version": 1, "groups": [group]}
    (path / CONFIG).write_text(json.dumps(config))
    return path


SHAPES = [(1, 1, 300, 300, 40, 1), (6, 200, 200, 210, 30, 2), (200, 200, 150, 100, 30, 1)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_cores_that_are_products_stay_products(tmp_path, sizes):
    path = factored(tmp_path / "x", *sizes)
    held = (path / WEIGHTS).stat().st_size
    assert np.prod(sizes[2:5]) * 8 > 8 * held  # what whole cores would take in float64

    def every_use():
        adapter = lt.load(path)
        lora = adapter.to_lora()
        assert lt.compare(adapter, lora).relative_error < 1e-6
        lt.truncate(adapter, rank=1)

    thin = 2 * 8 * sizes[4] * sizes[5] * (sizes[0] + sizes[1])  # factors of every module, float64
    assert peak_of(every_use) < 8 * held + 4 * thin + 2**20


@pytest.mark.parametrize("sizes", SHAPES)
def test_and_mean_what_they_say(tmp_path, sizes):
    path = factored(tmp_path / "x", *sizes)
    adapter, true = lt.load(path), dense_lotr(path)
    lora = adapter.to_lora()
    assert distance({m.name: m.B @ m.A for m in lora.modules}, true) < 1e-6
    full = lt.truncate(adapter, rank=tuple(min(side, sizes[4] * sizes[5]) for side in sizes[:2]))
    full.save(tmp_path / "full")
    assert distance(dense_lotr(tmp_path / "full"), true) < 1e-5
    assert lotr("inspect", path).code == 0
    norms = {row["name"]: row["norm"] for row in document("inspect", path)["modules"]}
    for name, delta in true.items():
        assert norms[name] == pytest.approx(np.linalg.norm(delta), rel=1e-6)


def test_a_rank_above_both_sides_takes_no_square_of_it(tmp_path):
    rng = np.random.default_rng(0)
    r = 3000
    pairs = {f"layers.{k}.q": (rng.normal(size=(2, r)), rng.normal(size=(r, 3))) for k in range(2)}
    path = write_lora(tmp_path / "x", pairs)
    held = (path / WEIGHTS).stat().st_size
    true = {
        name: 2 * b.astype("f4").astype(float) @ a.astype("f4") for name, (b, a) in pairs.items()
    }

    def every_use():
        adapter = lt.load(path)
        lt.convert(adapter, rank=(2, 3)).save(tmp_path / "lotr")
        lt.truncate(adapter, rank=2)
        assert lt.compare(adapter, lt.load(tmp_path / "lotr")).relative_error < 1e-5

    assert peak_of(every_use) < 20 * held < r * r * 4
    assert distance(dense_lotr(tmp_path / "lotr"), true) < 1e-5
    assert lt.load(tmp_path / "lotr").groups[0].slice_ranks == (2, 2)


def many(count, name):
    rng = np.random.default_rng(0)
    return lt.LoraAdapter(
        tuple(
            lt.LoraModule(name(k), rng.normal(size=(4, 1)), rng.normal(size=(1, 3)))
            for k in range(count)
        ),
        {},
        np.dtype("float32"),
    )


def unlike(k):
    return "".join(chr(97 + k // 26**j % 26) for j in range(3)) + ".q"


@pytest.mark.parametrize("name", ["layers.{}.q".format, unlike], ids=["one kind", "many kinds"])
def test_an_analysis_compares_a_bounded_number_of_modules(name):
    analysis = lt.analyze(many(MOST + 50, name))
    found = max((analysis, *analysis.groups), key=lambda part: len(part.compared))
    assert len(found.compared) == MOST
    assert found.left_overlap.shape == found.right_overlap.shape == (MOST, MOST)
    assert len(set(found.compared)) == MOST
    assert max(found.compared) == MOST + 49


def test_the_page_of_an_analysis_grows_with_the_modules(tmp_path):
    sizes = []
    for count in (100, 200, 400):
        many(count, "layers.{}.q".format).save(tmp_path / f"{count}")
        assert lotr("analyze", tmp_path / f"{count}", "-o", tmp_path / f"{count}.html").code == 0
        sizes.append((tmp_path / f"{count}.html").stat().st_size)
    assert sizes[2] - sizes[1] < 2.5 * (sizes[1] - sizes[0])


@pytest.mark.parametrize("digits", [18, 19, 5000])
def test_a_number_of_any_length_is_a_name(tmp_path, digits):
    pairs = {f"layers.{'1' * digits}.q": (np.ones((6, 2)), np.ones((2, 5)))}
    pairs["layers.2.q"] = pairs[next(iter(pairs))]
    adapter = lt.load(write_lora(tmp_path / "x", pairs))
    assert adapter.modules[0].name == "layers.2.q"
    assert lt.convert(adapter, rank=1).to_lora().modules


def test_layers_are_in_the_order_of_their_numbers():
    names = [f"layers.{k}.q" for k in (0, 2, 10, 10**17, 10**20, 10**21)]
    assert sorted(reversed(names), key=layer_order) == names


HUGE = {
    "digits": "9" * 400,
    "percent": "9" * 400 + "%",
    "bytes": "9" * 5000 + "KB",
    "integer": 10**400,
    "unprintable": 10**5000,
    "negative": -(10**400),
    "hundred": 10**100,
    "thirty": "9" * 30,
}


@pytest.mark.parametrize("budget", HUGE.values(), ids=HUGE)
def test_a_budget_of_any_length_is_refused_or_met(tmp_path, budget):
    adapter = lt.load(write_lora(tmp_path / "x"))
    for verb in (lt.convert, lt.truncate, lt.compress):
        start = time.perf_counter()
        try:
            found = verb(adapter, budget=budget)
        except lt.LotrError as error:
            assert len(str(error)) < 500
        else:
            assert found.bytes <= 4 * adapter.bytes
        assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "number", [10**400, 10**5000, -(10**5000)], ids=["400", "5000", "negative"]
)
def test_no_number_is_too_long_to_be_refused(tmp_path, number):
    adapter = lt.load(write_lora(tmp_path / "x"))
    lotr_form = lt.convert(adapter, rank=2)
    calls = [
        lambda: lt.convert(adapter, rank=number),
        lambda: lt.convert(adapter, rank=(number, 1)),
        lambda: lt.convert(adapter, tolerance=number),
        lambda: lt.convert(adapter, energy=number),
        lambda: lt.convert(adapter, cluster=-abs(number)),
        lambda: lt.truncate(adapter, rank=number),
        lambda: lt.compress(adapter, tolerance=0.3, bits=number),
        lambda: lt.tucker2(np.ones((2, 3, 4)), rank=number),
        lambda: lt.tucker2(np.ones((2, 3, 4)), tolerance=number),
        lambda: lt.tucker2(np.ones((2, 3, 4)), parameters=-abs(number)),
        lambda: lt.tucker2(np.ones((2, 3, 4)), rank=1, seed=-abs(number)),
        lambda: lt.analyze(adapter, shares=[-abs(number)]),
        lambda: lotr_form.to_lora(-abs(number)),
        lambda: adapter.to_lora(-abs(number)),
    ]
    for call in calls:
        with pytest.raises(lt.LotrError) as refused:
            call()
        assert len(str(refused.value)) < 500


def wide_lora(path, modules=24, sides=8192, r=16):
    """A LoRA directory of a few MB in bfloat16, and the bytes of its updates."""
    rng = np.random.default_rng(0)
    lora = lt.LoraAdapter(
        tuple(
            lt.LoraModule(
                f"layers.{k % 2}.q{k // 2}",
                rng.standard_normal((sides, r), np.float32),
                rng.standard_normal((r, sides), np.float32),
            )
            for k in range(modules)
        ),
        {},
        np.dtype("bfloat16"),
    )
    lora.save(path)
    return lora.bytes


USES = {
    "inspect": lambda source, out: ["inspect", source],
    "truncate": lambda source, out: ["truncate", source, "-o", out, "--budget", "50%"],
    "compress": lambda source, out: [
        *("compress", source, "-o", out, "--form", "lora", "--budget", "10%")
    ],
    "export": lambda source, out: ["export", source + "-lotr", "-o", out],
    "export compressed": lambda source, out: ["export", source + "-small", "-o", out],
    "verify compressed": lambda source, out: ["verify", source, source + "-small"],
}
TIMES = {
    **{"inspect": 4.5, "truncate": 6, "compress": 11, "export": 6},
    **{"export compressed": 6, "verify compressed": 6},
}
"""How many times the bytes of the updates a command may take; a LoRA in float32 takes two."""


@pytest.mark.parametrize("command", USES)
def test_commands_take_a_few_times_the_file(tmp_path, command):
    size = wide_lora(tmp_path / "lora")
    lora = lt.load(tmp_path / "lora")
    if command == "export":
        lt.convert(lora, rank=32).save(tmp_path / "lora-lotr")
    if command.endswith("compressed"):
        lt.compress(lora, budget="10%", form="lora").save(tmp_path / "lora-small")
    del lora
    arguments = USES[command](str(tmp_path / "lora"), str(tmp_path / "out"))
    codes = []
    run = CliRunner().invoke
    assert peak_of(lambda: codes.append(run(app, arguments).exit_code)) < TIMES[command] * size
    assert codes == [0]


FAULTS = """
import resource
from lotrtensor.cli.allocator import keep_freed_memory
KEEP
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    blocks = [bytearray(2**20) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_memory_is_kept_for_what_comes_next():
    """Four blocks of 1 MiB are a thousand pages: a hundred such in turn take the first ones'."""

    def pages(keep):
        program = [sys.executable, "-c", FAULTS.replace("KEEP", keep)]
        return int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)

    assert pages("keep_freed_memory()") < 5_000 < 50_000 < pages("")
