"""Weight deltas of checkpoints to an adapter."""

import json
import re
import tracemalloc
import warnings

import numpy as np
import pytest

from lotrtensor import (
    DataError,
    FormatError,
    LoraAdapter,
    LotrWarning,
    OptionError,
    RankError,
    extract,
)
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.verbs._extract import extraction_error
from tests.adapters_fixtures import (
    assert_refused,
    dense_lotr,
    distance,
    lotr,
    lotr_process,
    read_arrays,
)
from tests.checkpoint_fixtures import (
    D,
    F,
    deltas,
    model,
    pair,
    read,
    tune,
    write,
)

unconverged = pytest.mark.filterwarnings("ignore:.*did not converge:lotrtensor.errors.LotrWarning")


# ---------------------------------------------------------------- goals


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("group_by", ["type", "none"])
@unconverged
def test_a_tolerance_is_not_exceeded(tmp_path, tolerance, group_by):
    """Of the file against the true deltas."""
    base_dir, tuned_dir, base, tuned = pair(tmp_path)
    adapter = extract(base_dir, tuned_dir, tolerance=tolerance, group_by=group_by)
    adapter.save(tmp_path / "adapter")
    error = distance(dense_lotr(tmp_path / "adapter"), deltas(base, tuned))
    assert error <= tolerance
    assert adapter.relative_error == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert adapter.lower_bound <= adapter.relative_error


@pytest.mark.parametrize("budget", ["30%", "60%", "2KB", "700p"])
@unconverged
def test_a_budget_is_not_exceeded(tmp_path, budget):
    """Bytes of the tensors; shares are of the deltas of the modules compared."""
    base_dir, tuned_dir, base, _ = pair(tmp_path)
    extract(base_dir, tuned_dir, budget=budget).save(tmp_path / "adapter")
    stored = sum(x.nbytes for x in read_arrays(tmp_path / "adapter").values())
    whole = sum(x.nbytes for x in base.values() if x.ndim == 2)
    limits = {"30%": 0.3 * whole, "60%": 0.6 * whole, "2KB": 2000, "700p": 2800}
    assert stored <= limits[budget]


def test_an_energy_is_kept(tmp_path):
    """1 − error²."""
    base_dir, tuned_dir, base, tuned = pair(tmp_path)
    extract(base_dir, tuned_dir, energy=0.95).save(tmp_path / "adapter")
    assert 1 - distance(dense_lotr(tmp_path / "adapter"), deltas(base, tuned)) ** 2 >= 0.95


@pytest.mark.parametrize("goal", [{}, {"rank": 2, "tolerance": 0.1}, {"rank": 0}, {"budget": "3p"}])
def test_goals_are_checked(tmp_path, goal):
    """As by convert; extract has no default."""
    base_dir, tuned_dir, _, _ = pair(tmp_path)
    with pytest.raises(RankError):
        extract(base_dir, tuned_dir, **goal)


def test_a_pattern_chooses_modules(tmp_path):
    """Only paths in which it occurs."""
    base_dir, tuned_dir, _, _ = pair(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LotrWarning)
        adapter = extract(base_dir, tuned_dir, rank=2, modules=r"layer\.[02]\..*query")
    assert [n for g in adapter.groups for n in g.modules] == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.2.attention.self.query",
    ]


# ---------------------------------------------------------------- what an adapter cannot hold


@pytest.mark.parametrize(
    "key", ["encoder.layer.1.intermediate.dense.bias", "embeddings.LayerNorm.weight"]
)
def test_changed_vectors_are_told_by_name(tmp_path, key):
    """Biases and norms that were trained are not part of the adapter."""
    base, tuned = model(), tune(model(), rank=2)
    tuned[key] = tuned[key] + np.float32(0.5)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    with pytest.warns(LotrWarning, match=re.escape(key)):
        extract(tmp_path / "base", tmp_path / "tuned", rank=4)
    arguments = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--rank", 4, "--json"]
    found = lotr_process("extract", *arguments, "-o", tmp_path / "adapter")
    assert found.code == 0, found.err
    assert key in found.err
    assert json.loads(found.out)["groups"]


def test_every_changed_vector_is_told(tmp_path):
    """Not the first alone."""
    base, tuned = model(), tune(model(), rank=2)
    keys = [f"encoder.layer.{i}.attention.self.query.bias" for i in range(3)]
    for key in keys:
        tuned[key] = tuned[key] * np.float32(2)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    with pytest.warns(LotrWarning) as caught:
        extract(tmp_path / "base", tmp_path / "tuned", rank=4)
    text = " ".join(str(w.message) for w in caught)
    assert "3 tensors" in text
    assert any(key in text for key in keys)


def test_tensors_of_one_side_are_told(tmp_path):
    """A new head, a dropped pooler."""
    base, tuned = model(), tune(model(), rank=2)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned | {"classifier.weight": np.ones((2, D), np.float32)})
    with pytest.warns(LotrWarning, match="classifier.weight"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=4)


def test_equal_vectors_are_not_told(tmp_path):
    """No warning without a reason."""
    pair(tmp_path, rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(tmp_path / "base", tmp_path / "tuned", rank=6)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, side):
    """The key of the tensor, not the number of a slice."""
    both = {"base": model(), "tuned": tune(model(), rank=2)}
    key = "encoder.layer.1.attention.self.query.weight"
    both[side][key] = both[side][key].copy()
    both[side][key][3, 4] = value
    for name, tensors in both.items():
        write(tmp_path / name, tensors)
    with pytest.raises(DataError, match=re.escape(key)):
        extract(tmp_path / "base", tmp_path / "tuned", rank=2)


def test_checkpoints_that_do_not_fit(tmp_path):
    """Other shapes, no common weights, no difference, a pattern that matches nothing."""
    base = write(tmp_path / "base", model())
    key = "encoder.layer.0.attention.self.query.weight"
    other = write(tmp_path / "other", model() | {key: np.ones((D, D + 1), np.float32)})
    foreign = write(tmp_path / "foreign", {"x.weight": np.ones((2, 2), np.float32)})
    same = write(tmp_path / "same", model())
    for tuned, more, parts in (
        (other, [], (key, "(12, 13)", "(12, 12)")),
        (foreign, [], ("foreign",)),
        (same, [], ("same weights",)),
        (same, ["--modules", "nothing"], ("nothing",)),
        (same, ["--modules", "("], ("regular expression",)),
        (tmp_path / "absent", [], ("absent",)),
    ):
        arguments = ["--base", base, "--tuned", tuned, "-o", tmp_path / "out", "--rank", 2]
        assert_refused(lotr("extract", *arguments, *more), *parts)
        assert not (tmp_path / "out").exists()


def test_a_pattern_that_takes_long_to_match_nothing(tmp_path):
    """A thousand alternatives: one sentence."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    pattern = "|".join(f"nothing{i}" for i in range(1000))
    with pytest.raises(FormatError, match="nothing999"):
        extract(base_dir, tuned_dir, rank=2, modules=pattern)


@pytest.mark.parametrize("kind", ["integers", "matrix", "block", "type"])
def test_other_tensors_that_differ_are_told(tmp_path, kind):
    """Buffers of integers, matrices that are no weights, blocks of experts, another type."""
    extra = {
        "integers": np.arange(4),
        "matrix": np.ones((3, 4), np.float32),
        "block": np.ones((2, 3, 4), np.float32),
        "type": np.full(3, 0.1, np.float32),
    }[kind]
    other = extra.astype(np.float16) if kind == "type" else extra * 2
    write(tmp_path / "base", model() | {"extra": extra})
    write(tmp_path / "same", tune(model(), rank=2) | {"extra": extra})
    write(tmp_path / "tuned", tune(model(), rank=2) | {"extra": other})
    extract(tmp_path / "base", tmp_path / "same", rank=4)
    with pytest.warns(LotrWarning, match="extra"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=4)


# ---------------------------------------------------------------- output


def test_extract_refuses_a_standing_output(tmp_path):
    """As every command does, before any work."""
    base_dir, tuned_dir, _, _ = pair(tmp_path, rank=2)
    (tmp_path / "out").mkdir()
    arguments = ["--base", base_dir, "--tuned", tuned_dir, "--rank", 2, "-o", tmp_path / "out"]
    assert_refused(lotr("extract", *arguments), "exists", "--force")
    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------- memory


@unconverged
def test_few_slices_are_in_memory(tmp_path):
    """Twenty deltas of a mebibyte each: the peak is that of a few."""
    size, slices = 512, 20
    rng = np.random.default_rng(0)
    one = rng.standard_normal((size, size), np.float32)
    base = {f"h.{i}.q.weight": one for i in range(slices)}
    tuned = {key: one + np.float32(0.01 * (i + 1)) * one[::-1] for i, key in enumerate(base)}
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    tracemalloc.start()
    extract(tmp_path / "base", tmp_path / "tuned", rank=4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 8 * one.nbytes


@unconverged
@pytest.mark.parametrize("goal", [{"rank": 4}, {"tolerance": 0.5}])
def test_a_lora_takes_the_memory_of_a_few_slices(tmp_path, goal):
    """Beside its own factors."""
    size, slices = 256, 20
    rng = np.random.default_rng(0)
    one = rng.standard_normal((size, size), np.float32)
    tuned = {f"h.{i}.q.weight": one * np.float32(i + 2) for i in range(slices)}
    for i, x in enumerate(tuned.values()):
        x[:, :4] += 100 * (i + 1)
    write(tmp_path / "base", {key: one for key in tuned})
    write(tmp_path / "tuned", tuned)
    both = tmp_path / "base", tmp_path / "tuned"
    tracemalloc.start()
    adapter = extract(*both, form="lora", dtype="float32", **goal)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    factors = sum(module.B.nbytes + module.A.nbytes for module in adapter.modules)
    assert peak <= 3 * factors + 10 * one.nbytes


# ---------------------------------------------------------------- resized, renamed, and nothing


@pytest.mark.parametrize("rows", [(20, 23), (23, 20)])
@pytest.mark.parametrize("form", ["lotr", "lora"])
def test_the_rows_in_common_of_a_resized_vocabulary(tmp_path, rows, form):
    """Refused; on request with the base's shape, zero where the tuned one has no row."""
    rng = np.random.default_rng(0)
    for name, count in zip(("base", "tuned"), rows, strict=True):
        write(tmp_path / name, {"embed_tokens.weight": rng.random((count, D), np.float32)})
    both = tmp_path / "base", tmp_path / "tuned"
    with pytest.raises(FormatError, match=r"resized.*--resized common-rows"):
        extract(*both, rank=D, form=form)
    with pytest.warns(LotrWarning, match=r"3 rows more; the 20 rows in common"):
        adapter = extract(*both, rank=D, form=form, resized="common-rows", dtype="float32")
    (module,) = (adapter if form == "lora" else adapter.to_lora()).modules
    before, after = (read(path)[0]["embed_tokens.weight"] for path in both)
    expected = np.zeros((rows[0], D))
    expected[:20] = after[:20].astype(float) - before[:20]
    assert pytest.approx(expected, abs=1e-5) == (module.B @ module.A).T
    if form == "lora":
        error = extraction_error(*both, adapter, resized="common-rows")
        assert error == pytest.approx(0, abs=1e-6)


def test_other_shapes_are_not_called_resized(tmp_path):
    """Columns that differ are another model's."""
    write(tmp_path / "base", {"q.weight": np.ones((4, 4), np.float32)})
    write(tmp_path / "tuned", {"q.weight": np.ones((4, 5), np.float32)})
    for resized in ("refuse", "common-rows"):
        with pytest.raises(FormatError, match="different models"):
            extract(tmp_path / "base", tmp_path / "tuned", rank=1, resized=resized)
    with pytest.raises(OptionError, match="resized is 'rows'"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1, resized="rows")


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("mlp.mixture.gate_up", r"1 tensors.*gate_up \(2 × 3 × 4\).*no LoTR form"),
        ("conv.weight", r"conv\.weight"),
        (None, "same weights"),
    ],
)
def test_nothing_differs_is_said_where_nothing_does(tmp_path, extra, parts):
    """Else what differs is named."""
    block = np.ones((2, 3, 4), np.float32)
    more = {extra: block} if extra else {}
    write(tmp_path / "base", model() | more)
    write(tmp_path / "tuned", model() | {key: 2 * x for key, x in more.items()})
    with pytest.raises(FormatError, match=parts):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1)


def test_what_a_pattern_leaves_out_is_not_nothing(tmp_path):
    """The weights that it matches are the same, others are not."""
    write(tmp_path / "base", model())
    write(tmp_path / "tuned", tune(model(), pattern="query"))
    with pytest.raises(FormatError, match=r"no weight that the pattern.*query"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=1, modules="intermediate")


def test_checkpoints_that_name_their_weights_differently(tmp_path):
    """As two releases of transformers do for one vision-language model; the base's names stay."""
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.q_proj.weight" for i in range(2)]
    before, after = ({n: rng.random((D, F), np.float32) for n in names} for _ in range(2))
    write(tmp_path / "base", {f"language_model.model.{n}": x for n, x in before.items()})
    write(tmp_path / "tuned", {f"model.language_model.{n}": x for n, x in after.items()})
    with pytest.warns(LotrWarning, match=r"is taken for language_model\.model\.layers"):
        adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=D, form="lora")
    assert len(adapter.modules) == 2
    for module in adapter.modules:
        name = module.name.removeprefix("language_model.model.") + ".weight"
        assert pytest.approx(after[name] - before[name], abs=1e-5) == module.B @ module.A


def test_some_names_that_both_have(tmp_path):
    """The rest is found under other prefixes all the same; a shape that differs is not."""
    rng = np.random.default_rng(0)
    head = {"lm_head.weight": np.eye(4, dtype=np.float32), "q.weight": rng.random((2, 2), "f4")}
    before, after = (rng.random((4, 4), np.float32) for _ in range(2))
    write(tmp_path / "base", head | {"layers.0.v.weight": before})
    write(tmp_path / "tuned", head | {"bert.layers.0.v.weight": after, "bert.q.weight": before})
    with pytest.warns(LotrWarning) as told:
        adapter = extract(tmp_path / "base", tmp_path / "tuned", rank=4, form="lora")
    assert "other names for 1 tensors; bert.layers.0.v.weight" in str(told[0].message)
    assert "1 tensors differ" in str(told[1].message)
    (module,) = adapter.modules
    assert module.name == "layers.0.v"
    assert pytest.approx(after - before, abs=1e-5) == module.B @ module.A


def test_the_error_of_large_numbers_is_summed_in_double_precision(tmp_path):
    """Squares beyond float32."""
    base = {"q.weight": np.zeros((4, 4), np.float32)}
    tuned = {"q.weight": np.diag([3e19, 4e19, 0, 0]).astype(np.float32)}
    both = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    nothing = LoraAdapter(
        (LoraModule("q", np.diag([0, 4e19, 0, 0]), np.eye(4)),), {}, np.dtype("float32")
    )
    assert extraction_error(*both, nothing) == pytest.approx(0.6)


def test_the_error_of_shared_factors_is_the_one_that_extract_states(tmp_path):
    both = write(tmp_path / "base", model()), write(tmp_path / "tuned", tune(model()))
    adapter = extract(*both, rank=4)
    assert extraction_error(*both, adapter) == pytest.approx(adapter.relative_error, rel=1e-4)
