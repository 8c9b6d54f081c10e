"""The page of promises names tests that are there."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def promised():
    """Rows of the table: promise, files, number of tests, defects found, defects left."""
    promises = (ROOT / "docs/trust.md").read_text("utf-8").partition("## Faults")[0]
    return re.findall(
        r"^\| (?!promise|---)(.+?) \| (.+?) \| (\d+) \| (\d*) \| 0 \|$", promises, re.M
    )


def test_every_promise_names_a_test_that_is_there():
    rows = promised()
    assert len(rows) > 10
    for promise, kept_by, *_ in rows:
        named = re.findall(r"`(tests/\w+\.py)`", kept_by)
        assert named, promise
        for name in named:
            assert "def test_" in (ROOT / name).read_text()


def test_there_are_at_least_as_many_tests_as_it_says(request):
    """In the files that this session has collected: all, when all tests are run."""
    if request.config.option.markexpr or request.config.option.keyword:
        pytest.skip("some tests of the files were deselected")
    collected = Counter(f"tests/{item.path.name}" for item in request.session.items)
    for promise, kept_by, count, *_ in promised():
        files = re.findall(r"`(tests/\w+\.py)`", kept_by)
        if all(collected[name] for name in files):
            assert sum(collected[name] for name in files) >= int(count), promise
