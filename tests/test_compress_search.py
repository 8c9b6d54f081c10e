"""The search for a size or an error: small adapters, where the index is most of the file."""

import re
import warnings
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lotrtensor as lt
from lotrtensor.verbs._compression_job import CompressionJob, compression_job

SEEDS = st.integers(0, 10**6)


def some_adapter(seed):
    """Groups of unlike sizes and scales, of falling spectra, with much or little in common."""
    rng = np.random.default_rng(seed)
    modules = []
    for kind in "qvo"[: rng.integers(1, 4)]:
        count, m, n = (int(rng.integers(*ends)) for ends in ((1, 7), (16, 120), (16, 120)))
        common, own = int(rng.integers(0, 4)), int(rng.integers(1, 5))
        scale, decay = 10 ** rng.uniform(-1, 1), rng.uniform(0, 2)
        left, right = rng.normal(size=(m, common)), rng.normal(size=(common, n))
        for k in range(count):
            terms = scale * rng.normal(size=(m, own)) * np.arange(1.0, own + 1) ** -decay
            b = np.hstack([left @ rng.normal(size=(common, common)), terms])
            a = np.vstack([right, rng.normal(size=(own, n))])
            modules.append(lt.LoraModule(f"layers.{k}.{kind}", b, a))
    return lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))


def compressed(adapter, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.LotrWarning)  # where nothing is left
        return lt.compress(adapter, **options)


@settings(max_examples=30)
@given(SEEDS)
def test_more_bytes_are_used_and_lose_less(seed):
    adapter = some_adapter(seed)
    smallest = compressed(adapter, tolerance=0.99).file_bytes
    before = 1.0
    for times in (1.05, 1.3, 2.0, 4.0):
        made = compressed(adapter, budget=int(times * smallest))
        assert made.file_bytes <= times * smallest
        assert made.relative_error <= 1.01 * before
        before = made.relative_error
    assert before < 0.95 or made.file_bytes > 0.9 * times * smallest


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([1.2, 2.0, 4.0]))
def test_no_form_alone_is_better_at_a_size(seed, times):
    adapter = some_adapter(seed)
    budget = int(times * compressed(adapter, tolerance=0.9).file_bytes)
    best = compressed(adapter, budget=budget).relative_error
    for form in ("lora", "lotr"):
        try:
            alone = compressed(adapter, budget=budget, form=form).relative_error
        except lt.RankError:
            continue
        assert best <= alone * (1 + 1e-9), form


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([0.1, 0.3, 0.7]))
def test_no_form_alone_is_smaller_at_an_error(seed, tolerance):
    adapter = some_adapter(seed)
    best = compressed(adapter, tolerance=tolerance)
    assert best.relative_error <= tolerance
    for form in ("lora", "lotr"):
        alone = compressed(adapter, tolerance=tolerance, form=form)
        assert alone.relative_error <= tolerance
        assert best.file_bytes <= alone.file_bytes, form


def test_a_budget_that_the_codes_do_not_fill_is_used_all_the_same():
    """Found by search: every file on the way was too large by the index, and nothing was left."""
    rng = np.random.default_rng(19)
    left, right = rng.normal(size=(47, 4)), rng.normal(size=(4, 43))
    modules = []
    for k in range(4):
        own = 0.04 * rng.normal(size=(47, 2)), rng.normal(size=(2, 43))
        b, a = np.hstack([left @ rng.normal(size=(4, 4)), own[0]]), np.vstack([right, own[1]])
        modules.append(lt.LoraModule(f"layers.{k}.q", b, a))
    adapter = lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))
    made = lt.compress(adapter, budget=1440)
    assert made.file_bytes <= 1440
    assert made.relative_error < 0.02


def test_a_target_within_a_jump_of_the_predictions_takes_few_files(monkeypatch):
    """A step finer by one in a hundred does what no target of the predictions leads to."""
    job = compression_job(some_adapter(0))
    place, made = job.coarsest / 20.3, []

    def predict(self, step):
        size = 300_000 * (place / step) ** 0.5 * (1.2 if step < place else 1.0)
        return size, 3e3 / size

    def at(self, step):
        size, error = self.predict(step)
        made.append(step)
        size = int(0.935 * size)
        return SimpleNamespace(file_bytes=size, relative_error=error)

    monkeypatch.setattr(CompressionJob, "predict", predict)
    monkeypatch.setattr(CompressionJob, "at", at)
    monkeypatch.setattr(CompressionJob, "weighted_error", lambda self, found: None)
    budget = 339_110
    found = job._found_of_bytes(budget, budget)
    assert 0.99 * budget <= found.file_bytes <= budget
    assert len(made) <= 5
    made.clear()
    found = job._found_within(0.0089)
    assert found.relative_error <= 0.0089
    assert len(made) <= 4


@pytest.mark.parametrize("form", ["lora", "auto"])
def test_the_smallest_error_that_a_refusal_names_is_in_reach(form):
    adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    with pytest.raises(lt.RankError, match="smallest error reached") as refused:
        lt.compress(adapter, tolerance=1e-6, form=form)
    named = re.search(r"reached is ([\d.e-]+)", str(refused.value))
    within = 1.01 * float(named[1])
    assert lt.compress(adapter, tolerance=within, form=form).relative_error <= within
