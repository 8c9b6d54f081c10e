"""Patterns of configs: matched as PEFT matches them, and in bounded time whatever they are."""

import json
import re
import time
import warnings

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import lotrtensor as lt
from lotrtensor.adapters.formats import patterns
from lotrtensor.adapters.formats.patterns import Patterns
from tests.adapters_fixtures import edit_config, lora_tensors, write_adapter, write_lora


def peft_first(found, path):
    """PEFT's own loop (peft.utils.other.get_pattern_key)."""
    for label, pattern in enumerate(found):
        if re.match(rf"(.*\.)?({pattern})$", path):
            return label
    return None


ATOMS = st.sampled_from(
    [*"ab.", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a]", "[]a]", "1", "_", r"\n", r"\-", "é"]
)
ASSERTIONS = st.sampled_from(["^", "$", r"\A", r"\Z", r"\b", r"\B"])
REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{,2}", "{1,}", "{}", "{a}"])


def groups(inner):
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        several.map("".join),
        several.map(lambda parts: f"({'|'.join(parts)})"),
        several.map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, REPEATS).map(
            lambda pair: f"(?P<x>{pair[0]}){pair[1]}".replace("?P<x>", "")
        ),
        st.tuples(ATOMS, REPEATS).map("".join),
    )


EXPRESSIONS = st.recursive(ATOMS | ASSERTIONS, groups, max_leaves=8)
PATHS = st.text(alphabet="ab1._é-\n", max_size=8)


@given(st.lists(EXPRESSIONS, min_size=1, max_size=4), st.lists(PATHS, min_size=1, max_size=4))
@example(["a$", "^a"], ["a\n", "b.a", "\n.a"])
@example([r"\B", r"\b", ""], ["", "a", "."])
@example(["(a|b)*", "()", "(a*)*", "(?:){3}"], ["abab", "", "b."])
@example([".a", "a.", "^.", "b.$"], ["b.a", "a\n", "ab", "\na"])
def test_the_first_match_is_that_of_peft(found, paths):
    try:
        for pattern in found:
            re.compile(f"(.*\\.)?({pattern})$")
    except re.error:
        assume(False)
    matcher = Patterns(found, "x")
    for path in paths:
        assert matcher.first(path) == peft_first(found, path), path


@given(st.text(alphabet="ab(){}[]|*+?^$\\.,0123:P<>=!-\n", max_size=12), PATHS)
def test_any_text_is_refused_or_matched_as_peft_does(pattern, path):
    try:
        found = Patterns([pattern], "x").first(path)
    except lt.FormatError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found == (None if re.match(rf"(.*\.)?({pattern})$", path) is None else 0)


HOSTILE = [
    "(a+)+b",
    "(a|a)*b",
    "(a*)*b",
    "(.*)*x",
    "(a|aa)+$b",
    "(?:a?){60}a{60}b",
    "(?:" * 3000 + "a" + ")" * 3000,
    "a{99999999999999}",
    "(a{1000}){1000}",
    "(?:){19999}" * 50,
    "((((a{30}){30}){30}){30}){30}",
    "[" + "a-z" * 10_000 + "]+",
    "(?=(a+))\\1b",
    "a*" * 500 + "b",
    "(x+x+)+y|(a+a+)+y",
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda text: text[:20])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_no_pattern_keeps_a_reader_busy(tmp_path, field, pattern):
    pairs = {"a" * 60 + str(k): (np.ones((6, 2)), np.ones((2, 5))) for k in range(20)}
    path = write_lora(tmp_path / "x", pairs, **{field: {pattern: 2}})
    start = time.perf_counter()
    try:
        lt.load(path)
    except lt.FormatError as error:
        assert field in str(error)
    assert time.perf_counter() - start < 5


def test_the_config_in_the_header_of_a_single_file_is_read_alike(tmp_path):
    import safetensors.numpy

    name = "unet." + "a" * 60
    factors = {f"{name}.lora_A.weight": np.ones((2, 5), "f4")}
    factors[f"{name}.lora_B.weight"] = np.ones((6, 2), "f4")
    for pattern in ("(a+)+b", "a+"):
        config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 8}}
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        safetensors.numpy.save_file(factors, tmp_path / "x.safetensors", metadata)
        found = lt.load(tmp_path / "x.safetensors").modules[0].B[0, 0]
        assert found == (4.0 if pattern == "a+" else 1.0)


def test_work_is_bounded_whatever_the_patterns_are(monkeypatch):
    monkeypatch.setattr(patterns, "WORK", 1000)
    with pytest.raises(lt.FormatError, match="too long to match"):
        Patterns([".*" * k + "b" for k in range(1, 100)], "x").first("a" * 100)


def test_a_pattern_for_each_of_many_modules_takes_time_in_proportion():
    """Ten times the modules take about ten times the visits: no product of the two."""

    def visits(count):
        paths = [f"model.layers.{k}.self_attn.q_proj" for k in range(count)]
        for written in (paths, ["^" + re.escape(path) for path in paths]):
            matcher = Patterns(written, "x")
            assert [matcher.first(path) for path in paths] == list(range(count))
        return patterns.WORK + patterns.SHARE * sum(map(len, paths)) - matcher._visits

    assert visits(2000) < 12 * visits(200)


def test_what_truncate_writes_for_many_modules_is_read_at_once(tmp_path):
    rng = np.random.default_rng(0)
    pairs = {}
    for k in range(1500):
        r = 1 + k % 3
        pairs[f"layers.{k}.q"] = rng.normal(size=(4, r)), rng.normal(size=(r, 4))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    config["rank_pattern"] = {"^" + re.escape(name): b.shape[1] for name, (b, _) in pairs.items()}
    path = write_adapter(tmp_path / "x", config, lora_tensors(pairs))
    start = time.perf_counter()
    small = lt.truncate(lt.load(path), budget="60%")
    small.save(tmp_path / "small", uniform=False)
    assert lt.compare(small, lt.load(tmp_path / "small")).relative_error < 1e-6
    assert time.perf_counter() - start < 20


def test_the_first_pattern_of_several_counts(tmp_path):
    name = "layers.0.q"
    path = write_lora(tmp_path / "x", {name: (np.ones((6, 2)), np.ones((2, 5)))})
    for found, alpha in (
        ({"q": 4, name: 8}, 4),
        ({name: 8, "q": 4}, 8),
        ({"k": 3, r"layers\.\d+\.q": 6}, 6),
        ({"k": 3}, 2),
    ):
        edit_config(path, lora_alpha=2, alpha_pattern=found)
        assert lt.load(path).modules[0].B[0, 0] == alpha / 2
