"""The page of promises names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_promise_names_a_test_that_is_there():
    promises = (ROOT / "docs/trust.md").read_text().partition("## Faults")[0]
    rows = re.findall(r"^\| (?!promise|---)(.+?) \| (.+?) \|$", promises, re.M)
    assert len(rows) > 10
    for promise, kept_by in rows:
        named = re.findall(r"`(tests/\w+\.py)`", kept_by)
        assert named, promise
        for name in named:
            assert "def test_" in (ROOT / name).read_text()
