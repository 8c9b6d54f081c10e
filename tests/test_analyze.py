"""What an analysis says of an adapter: true, complete, honest about the better alternative."""

import itertools
import json
from importlib.resources import files

import numpy as np
import pytest
import safetensors.numpy

from adapters_fixtures import (
    assert_refused,
    bert_pairs,
    document,
    lotr,
    read_config,
    write_adapter,
    write_lora,
)
from lotrtensor import LoraAdapter, analyze, compare, compress, convert, load, truncate
from lotrtensor.adapters.sizes import budget_parameters
from lotrtensor.analysis import Choice, Kind, representations, similarity
from lotrtensor.analysis.recommend import recommend
from lotrtensor.analysis.representations import thinned


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Twelve layers whose slices share most of their energy."""
    return load(write_lora(tmp_path_factory.mktemp("adapter") / "lora"))


@pytest.fixture(scope="module")
def analysis(lora):
    return analyze(lora)


@pytest.fixture(scope="module")
def bundled_analysis():
    """The adapter that comes with the package: large enough that a file's index is small."""
    lora = load(files("lotrtensor") / "data" / "amazon-sentiment")
    return lora, analyze(lora)


def rows(analysis, name, measured=False):
    found = [c for c in analysis.choices if (c.representation, c.measured) == (name, measured)]
    assert found
    return found


OPTIONS = {
    "LoTR by type": {},
    "LoTR by shape": {"group_by": "shape"},
    "LoTR, layers in 2 clusters": {"cluster": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_converting_reaches_what_is_predicted(lora, analysis, name):
    """At most the predicted error, at most the size; not below the bound."""
    for choice in rows(analysis, name):
        made = convert(lora, budget=f"{100 * choice.budget:g}%", **OPTIONS[name])
        assert choice.bytes <= lora.bytes * choice.budget
        # convert looks for clusters of its own, which can be a little better or worse.
        slack = 1.05 if "clusters" in name else 1 + 1e-6
        assert made.relative_error <= choice.relative_error * slack
        if "clusters" not in name:
            assert made.relative_error >= choice.lower_bound * (1 - 1e-6)
        assert choice.lower_bound <= choice.relative_error


def test_truncated_lora_is_exact(lora, analysis):
    """As truncate makes it, for the best ranks and for one."""
    for choice in rows(analysis, "truncated LoRA, best ranks"):
        made = truncate(lora, budget=f"{100 * choice.budget:g}%")
        assert made.parameters == choice.parameters
        found = compare(lora, made).relative_error
        assert found == pytest.approx(choice.relative_error, rel=1e-4)
    for choice in rows(analysis, "truncated LoRA, one rank"):
        errors = {
            made.parameters: compare(lora, made).relative_error
            for made in (truncate(lora, rank=rank) for rank in (1, 2, 3))
        }
        assert errors[choice.parameters] == pytest.approx(choice.relative_error, rel=1e-4)
        assert max(size for size in errors if size <= lora.parameters * choice.budget) == (
            choice.parameters
        )


def test_a_lora_has_no_row_below_rank_1(lora, analysis):
    """And LoTR goes on."""
    smallest = sum(m + n for m, n in (module.shape for module in lora.modules))
    for name in ("truncated LoRA, best ranks", "truncated LoRA, one rank"):
        assert all(choice.parameters >= smallest for choice in rows(analysis, name))
        assert {c.budget for c in rows(analysis, name)} < {
            c.budget for c in rows(analysis, "LoTR by type")
        }


def test_measured_rows_are_made(bundled_analysis):
    """At the recommended size: the compressed adapter, and the best LoTR there."""
    lora, analysis = bundled_analysis
    (choice,) = rows(analysis, "compressed", measured=True)
    made = compress(lora, budget=int(choice.budget * lora.bytes))
    assert (choice.bytes, choice.relative_error) == (made.file_bytes, made.relative_error)
    assert choice == analysis.recommended
    (shared,) = (c for c in analysis.choices if c.measured and c.kind.family == "LoTR")
    options = OPTIONS[shared.representation]
    made = convert(lora, budget=f"{100 * choice.budget:g}%", **options)
    assert shared.bytes <= lora.bytes * shared.budget
    assert shared.relative_error == pytest.approx(made.relative_error, rel=0.05)


def test_a_tenth_of_the_bundled_adapter_is_recommended(bundled_analysis):
    """Error 0.3, where the 16-bit forms lose twice as much or do not get there."""
    lora, analysis = bundled_analysis
    assert analysis.recommended.bytes <= lora.bytes / 10
    assert analysis.recommended.relative_error <= 0.3
    assert analysis.recommendation.startswith("compressed: 10.")
    assert "truncated LoRA does not get down to that size" in analysis.recommendation


FORMS = {
    "compressed": "auto",
    "terms of single modules, in bits": "lora",
    "shared factors, in bits": "lotr",
}


@pytest.mark.parametrize("name", FORMS)
def test_compressing_reaches_what_is_predicted(bundled_analysis, name):
    """Sizes of whole files; errors within 5 percent from a quarter of the bytes on."""
    lora, analysis = bundled_analysis
    for choice in rows(analysis, name):
        if choice.budget > 0.25:
            continue
        made = compress(lora, budget=int(choice.budget * lora.bytes), form=FORMS[name])
        assert choice.bytes <= choice.budget * lora.bytes
        assert made.relative_error == pytest.approx(choice.relative_error, rel=0.05)


def test_targets_are_met_and_nothing_smaller_meets_them(lora, analysis):
    """By the representation's own curve."""
    curves = {curve.kind: curve.points for curve in analysis.curves}
    assert {target.kind for target in analysis.targets} == curves.keys()
    for target in analysis.targets:
        assert target.point.relative_error <= target.tolerance
        smaller = [p for p in curves[target.kind] if p.bytes < target.point.bytes]
        assert all(p.relative_error > target.tolerance for p in smaller)
        if target.kind is Kind.LOTR_BY_TYPE:
            made = convert(lora, tolerance=target.tolerance)
            assert made.relative_error <= target.tolerance
            assert made.bytes <= target.point.bytes


def test_targets_in_bits_are_the_sizes_of_files(bundled_analysis):
    lora, analysis = bundled_analysis
    for target in analysis.targets:
        if target.kind is Kind.COMPRESSED:
            made = compress(lora, tolerance=target.tolerance)
            assert target.point.bytes == pytest.approx(made.file_bytes, rel=0.05)


def test_curves_rise_in_size_and_fall_in_error(analysis):
    for curve in analysis.curves:
        sizes = [point.bytes for point in curve.points]
        errors = [point.relative_error for point in curve.points]
        assert all(a < b for a, b in itertools.pairwise(sizes))
        assert all(a >= b for a, b in itertools.pairwise(errors))
        assert len(sizes) > 2


def test_steps_are_sizes_that_conversion_keeps(lora, analysis):
    """From the smallest of a form that is drawn to the adapter's own size; groups add up."""
    sizes = [step.bytes for step in analysis.steps]
    assert sizes == sorted(set(sizes))
    drawn = {Kind.COMPRESSED, Kind.LOTR_BY_TYPE}
    assert sizes[0] == min(c.points[0].bytes for c in analysis.curves if c.kind in drawn)
    assert all(step.lotr or step.compressed for step in analysis.steps)
    assert sizes[-1] == lora.bytes
    for step in analysis.steps[5::5]:
        made = convert(lora, budget=step.bytes)
        assert step.lotr.bytes <= step.bytes
        assert made.relative_error <= step.lotr.relative_error * (1 + 1e-6)
        assert made.relative_error >= step.lotr.lower_bound * (1 - 1e-6)
    for step in analysis.steps[5:]:
        assert sum(group.bytes for group in step.lotr.groups) == step.lotr.bytes
        assert_modules_add_up(analysis, step.lotr, 1e-6)


def assert_modules_add_up(analysis, point, rel):
    """The squared errors of modules are those of their groups, and of the whole."""
    whole = 0.0
    for group, at in zip(analysis.groups, point.groups, strict=True):
        pairs = zip(at.slice_errors, group.modules, strict=True)
        lost2 = sum((error * module.norm) ** 2 for error, module in pairs)
        assert np.sqrt(lost2) / group.norm == pytest.approx(at.relative_error, rel=rel, abs=1e-6)
        whole += lost2
    norm2 = sum(group.norm**2 for group in analysis.groups)
    assert np.sqrt(whole / norm2) == pytest.approx(point.relative_error, rel=rel, abs=1e-6)


def test_steps_in_bits_tell_what_a_file_holds(bundled_analysis):
    """Bytes, errors and terms of every group, and the error of every module."""
    lora, analysis = bundled_analysis
    reached = [step for step in analysis.steps if step.compressed]
    assert reached
    for step in reached:
        # Between two grids the whole is interpolated, the groups are those of one grid.
        assert_modules_add_up(analysis, step.compressed, 0.03)
        assert step.compressed.bytes == step.bytes
    step = min(reached, key=lambda step: abs(step.bytes - lora.bytes / 10))
    made = compress(lora, budget=step.bytes)
    terms = [sum(row.private_ranks) for row in made.summary]
    assert [at.terms for at in step.compressed.groups] == pytest.approx(terms, rel=0.1)
    errors = [row.relative_error for row in made.summary]
    assert [at.relative_error for at in step.compressed.groups] == pytest.approx(errors, rel=0.06)


def test_alternatives_of_a_step_are_of_its_size(lora, analysis):
    """What truncate makes of the same number of bytes."""
    step = analysis.steps[-1]
    found = compare(lora, truncate(lora, budget=step.bytes)).relative_error
    errors = step.alternatives
    assert errors[Kind.LORA_BEST_RANKS] == pytest.approx(found, rel=1e-4, abs=1e-6)
    assert Kind.LORA_BEST_RANKS not in analysis.steps[0].alternatives


def test_groups_hold_the_dense_spectra(lora, analysis):
    """Singular values of the unfoldings, and norms, by SVD of the dense tensor."""
    for group in analysis.groups:
        modules = {module.name: module for module in lora.modules}
        dense = np.stack([modules[row.name].B @ modules[row.name].A for row in group.modules])
        left = np.linalg.svd(np.concatenate(list(dense), axis=1), compute_uv=False)
        right = np.linalg.svd(np.concatenate(list(dense), axis=0), compute_uv=False)
        assert group.left_values[:3] == pytest.approx(left[:3], rel=1e-4)
        assert group.right_values[:3] == pytest.approx(right[:3], rel=1e-4)
        norms = [row.norm for row in group.modules]
        assert norms == pytest.approx(np.linalg.norm(dense, axis=(1, 2)), rel=1e-4)
        assert [row.layer for row in group.modules] == [str(k) for k in range(12)]


def in_another_gauge(adapter):
    """The same products from other factors."""
    rng = np.random.default_rng(7)
    modules = []
    for module in adapter.modules:
        mix = rng.normal(size=(module.rank,) * 2) + 3 * np.eye(module.rank)
        b, a = module.B @ mix, np.linalg.solve(mix, module.A)
        modules.append(type(module)(module.name, b, a))
    return LoraAdapter(tuple(modules), adapter.config, adapter.dtype)


def test_nothing_depends_on_the_gauge(lora, analysis):
    """Errors, overlaps and similarity come from the products alone."""
    again = in_another_gauge(lora)
    other = analyze(again)
    mine, its = analysis.recommended, other.recommended
    assert its.kind == mine.kind
    # A file of 600 bytes is a byte or two larger where columns have other signs.
    assert its.bytes == pytest.approx(mine.bytes, rel=0.02)
    assert its.relative_error == pytest.approx(mine.relative_error, rel=0.02)
    for a, b in zip(analysis.groups, other.groups, strict=True):
        assert b.left_overlap == pytest.approx(a.left_overlap, abs=1e-4)
        assert b.right_overlap == pytest.approx(a.right_overlap, abs=1e-4)
    found = similarity([lora, again])
    assert found.cosine == pytest.approx(1.0, abs=1e-6)


def test_similarity_is_the_dense_cosine(tmp_path):
    """Whole and by kind; a module that only one has counts as zero there."""
    one, two = bert_pairs(3, 2, 0), bert_pairs(3, 2, 1)
    two = {name: pair for name, pair in two.items() if "layer.2" not in name}
    adapters = [load(write_lora(tmp_path / str(i), pairs)) for i, pairs in enumerate((one, two))]
    dense = [{m.name: m.B @ m.A for m in adapter.modules} for adapter in adapters]
    names = [name for name in dense[0] if name in dense[1]]
    product = sum(np.sum(dense[0][name] * dense[1][name]) for name in names)
    norms = [np.sqrt(sum(np.sum(x**2) for x in part.values())) for part in dense]
    found = similarity(adapters)
    assert found.cosine[0, 1] == pytest.approx(product / (norms[0] * norms[1]), rel=1e-5)
    assert np.diag(found.cosine) == pytest.approx(1.0)
    assert found.shared.tolist() == [[9, 6], [6, 6]]
    assert len(found.by_kind) == 3


def test_adapters_of_unlike_models_have_no_similarity(tmp_path):
    """NaN, null in the document; never a number."""
    one = {"a.0.q": (np.ones((4, 1), np.float32), np.ones((1, 3), np.float32))}
    two = {"a.0.q": (np.ones((5, 1), np.float32), np.ones((1, 3), np.float32))}
    paths = [write_lora(tmp_path / str(i), pairs) for i, pairs in enumerate((one, two))]
    assert np.isnan(similarity([load(path) for path in paths]).cosine[0, 1])
    found = document("analyze", *paths)
    assert found["similarity"]["cosine"] == [[1.0, None], [None, 1.0]]


KINDS = {"LoTR by type": Kind.LOTR_BY_TYPE, "compressed": Kind.COMPRESSED}


def choice(name, budget, error, measured=False):
    kind = KINDS.get(name, Kind.LORA_BEST_RANKS)
    return Choice(kind, name, budget, int(1000 * budget), error, None, None, measured)


def test_the_recommendation_never_hides_the_better_one():
    """The smallest error first, whichever form it has, and the other forms beside it."""
    both = [choice("LoTR by type", 0.25, 0.25), choice("truncated LoRA, best ranks", 0.25, 0.21)]
    found = recommend(both, 1000)
    assert found.text == (
        "truncated LoRA, best ranks: 4.0 × smaller, error 0.21; "
        "LoTR by type reaches 0.25 at that size"
    )
    assert found.choice.representation == "truncated LoRA, best ranks"
    better = recommend([*both, choice("LoTR by type", 0.25, 0.20, measured=True)], 1000)
    assert better.text.startswith("LoTR by type: 4.0 × smaller, error 0.2; truncated LoRA")
    alone = recommend([*both, choice("LoTR by type", 0.12, 0.29)], 1000)
    assert "truncated LoRA does not get down to that size" in alone.text
    bits = recommend([*both, choice("compressed", 0.25, 0.05)], 1000)
    assert bits.text == (
        "compressed: 4.0 × smaller, error 0.05; truncated LoRA, best ranks reaches 0.21 at that "
        "size; LoTR by type reaches 0.25 at that size"
    )


def test_an_adapter_that_is_not_redundant_is_told_so():
    found = recommend([choice("LoTR by type", 0.5, 0.7)], 1000)
    assert found.choice is None
    assert "not redundant" in found.text
    assert recommend([], 1000).choice is None


@pytest.mark.parametrize("points", [2, 5, 96])
def test_thinning_keeps_the_ends(points):
    sizes = sorted({int(1.05**i) + i for i in range(300)})
    kept = thinned(sizes, points)
    assert kept[0] == 0
    assert kept[-1] == len(sizes) - 1
    assert len(kept) <= points
    assert thinned(sizes[:2], points) == [0, 1]


def test_a_single_module_can_be_analysed(tmp_path):
    """One slice, rank 1: nothing to share, and no division by zero."""
    rng = np.random.default_rng(0)
    b, a = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 1), (1, 3)))
    found = analyze(load(write_lora(tmp_path / "one", {"a.q": (b, a)})))
    assert {c.kind for c in found.curves} == {
        *(Kind.COMPRESSED, Kind.TERMS_IN_BITS, Kind.SHARED_IN_BITS),
        *(Kind.LOTR_BY_TYPE, Kind.LORA_BEST_RANKS, Kind.LORA_ONE_RANK),
    }
    # A file in bits has an index, which is more than these few numbers.
    assert all(c.kind.family != "bits" for c in found.choices)
    assert all(step.compressed is None for step in found.steps)
    assert [step.lotr.bytes for step in found.steps] == [32]  # more than the 28 of the adapter


def test_an_update_of_zeros_can_be_analysed(tmp_path):
    """No NaN in the document."""
    pairs = {f"a.{k}.q": (np.zeros((4, 2), np.float32), np.ones((2, 3), np.float32)) for k in "01"}
    text = lotr("analyze", write_lora(tmp_path / "zero", pairs), "--json")
    assert text.code == 0
    assert "NaN" not in text.out
    (entry,) = json.loads(text.out)["adapters"]
    assert {c["relative_error"] for c in entry["choices"]} <= {0.0}


def test_a_lotr_is_analysed_as_the_lora_it_exports_to(lora, tmp_path):
    made = convert(lora, rank=4)
    made.save(tmp_path / "lotr")
    found = document("analyze", tmp_path / "lotr")["adapters"][0]
    assert found["type"] == "LOTR"
    assert found["stored_bytes"] == made.bytes
    assert found["source_bytes"] == made.to_lora().bytes


# ---------------------------------------------------------------- the command


def test_the_document_repeats_the_analysis(tmp_path):
    """Every figure's numbers, to five digits."""
    path = write_lora(tmp_path / "lora")
    analysis, (entry,) = analyze(load(path)), document("analyze", path)["adapters"]
    assert entry["name"] == str(path)
    assert entry["recommendation"] == analysis.recommendation
    assert len(entry["choices"]) == len(analysis.choices)
    for row, choice_ in zip(entry["choices"], analysis.choices, strict=True):
        assert row["relative_error"] == pytest.approx(choice_.relative_error, rel=1e-4)
        assert row["bytes"] == choice_.bytes
    for step, stop in zip(entry["steps"], analysis.steps, strict=True):
        assert step["bytes"] == stop.bytes
        assert step["alternatives"].keys() == {str(kind) for kind in stop.alternatives}
        for form in ("compressed", "lotr"):
            point = getattr(stop, form)
            assert (step[form] is None) == (point is None)
            for group, at in zip(step[form]["groups"], point.groups, strict=True) if point else ():
                assert (group["p"], group["q"], group["bytes"]) == (at.p, at.q, at.bytes)
                assert group["module_errors"] == pytest.approx(list(at.slice_errors), rel=1e-4)
    for group, part in zip(entry["groups"], analysis.groups, strict=True):
        assert group["spectrum"]["left"]["value"][0] == pytest.approx(part.left_values[0], rel=1e-4)
        assert group["overlap"]["left"] == pytest.approx(part.left_overlap, abs=1e-3)
        assert len(group["rates"]["p"]) == len(part.rates)


def test_the_terminal_shows_every_form_and_the_recommendation(tmp_path):
    path = write_lora(tmp_path / "lora")
    found = lotr("analyze", path)
    assert found.code == 0, found.err
    for name in (*OPTIONS, "truncated LoRA, best ranks", "truncated LoRA, one rank"):
        assert name in found.out
    assert analyze(load(path)).recommendation in " ".join(found.out.split())


def test_several_adapters_are_compared(tmp_path):
    paths = [write_lora(tmp_path / name, bert_pairs(3, 2, k)) for k, name in enumerate("ab")]
    found = document("analyze", *paths)
    assert [entry["name"] for entry in found["adapters"]] == [str(path) for path in paths]
    assert found["similarity"]["cosine"][0][0] == 1.0
    assert "cosine" in lotr("analyze", *paths).out


def test_names_from_files_are_text_in_the_terminal(tmp_path):
    """Markup of the terminal's in a name is shown as it is."""
    rng = np.random.default_rng(0)
    b, a = (rng.normal(size=s).astype(np.float32) for s in ((4, 2), (2, 3)))
    path = write_lora(tmp_path / "[bold]x[/]", {"a.0.q": (b, a), "a.1.q": (b, a)})
    assert "[bold]x[/]" in "".join(lotr("analyze", path).out.split())


def test_a_bad_adapter_among_good_ones_is_refused(tmp_path):
    good = write_lora(tmp_path / "good")
    assert_refused(lotr("analyze", good, tmp_path / "missing"), "missing")
    config = read_config(good) | {"use_dora": True}
    tensors = safetensors.numpy.load_file(good / "adapter_model.safetensors")
    bad = write_adapter(tmp_path / "dora", config, tensors)
    assert_refused(lotr("analyze", bad, good), "DoRA")


def test_budgets_are_those_of_convert(lora, analysis):
    """A share of the bytes means the same in both."""
    for found in rows(analysis, "LoTR by type"):
        share = f"{100 * found.budget:g}%"
        assert found.parameters <= budget_parameters(share, lora.dtype.itemsize, lora.bytes)


@pytest.mark.parametrize("types_fit", [True, False], ids=["by type exact", "nothing exact"])
@pytest.mark.filterwarnings("ignore::lotrtensor.errors.LotrWarning")
def test_groups_too_large_for_the_exact_problem(lora, analysis, monkeypatch, types_fit):
    """Looked at along leading directions: no better than it is, and no row beyond what was seen."""
    monkeypatch.setattr(representations, "JOINED_FLOPS", 0)
    monkeypatch.setattr(representations, "JOINED", 12)
    if not types_fit:
        monkeypatch.setattr("lotrtensor.core.fit.tuning.EXACT_FLOPS", 0)
        monkeypatch.setattr(representations, "WIDEST", 4)
    found = analyze(lora)
    names = {curve.representation for curve in found.curves}
    assert ("LoTR by shape" in names) == types_fit
    name = "LoTR by shape" if types_fit else "LoTR by type"
    exact = {choice.budget: choice for choice in rows(analysis, name)}
    assert len(rows(found, name)) > 1
    for choice_ in rows(found, name):
        assert choice_.relative_error >= exact[choice_.budget].lower_bound * (1 - 1e-6)
    for step in found.steps:
        if step.lotr:
            assert step.lotr.lower_bound <= step.lotr.relative_error
