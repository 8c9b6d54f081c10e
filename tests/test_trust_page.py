"""The page of promises names tests that are there."""

import json
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


def test_what_it_says_of_trials_is_what_was_recorded():
    page = " ".join((ROOT / "docs/trust.md").read_text("utf-8").split())
    found = json.loads((ROOT / "docs/mutation.json").read_text("utf-8"))
    left = [entry["verdict"].partition(":")[0] for entry in found["left"]]
    material = found["tried"] - found["immaterial"]
    assert material == found["killed"] + left.count("tested since") + left.count("gap")
    assert f"Of {found['tried']} changes, drawn at random, {found['killed']} were noticed" in page
    rest = f"of the {len(left)} others {found['immaterial']} change no result"
    assert rest in page
    assert f"in one of {found['mutations']:,} ways" in page
    share = f"{found['killed'] / material:.0%}"
    assert f"So {found['killed']} of {material} were noticed ({share})" in page
    since, gaps = left.count("tested since"), left.count("gap")
    assert f"{since} more have a test since, and {gaps} have none" in page
    fuzz = json.loads((ROOT / "docs/fuzz.json").read_text("utf-8"))
    assert fuzz["failures"] == 0
    assert f"Of {fuzz['runs']:,} changed files" in page
    assert f"{fuzz['results']:,} were read and {fuzz['refusals']:,} refused" in page
    faults = json.loads((ROOT / "docs/faults.json").read_text("utf-8"))
    assert f"Of {faults['points']:,} points none did otherwise" in page
    assert faults["points"] == sum(row["points"] for row in faults["commands"])
    assert not any(row["failures"] for row in faults["commands"])
    for row in faults["commands"]:
        assert f"| {row['command']} | {row['points']} | {len(row['failures'])} |" in page
