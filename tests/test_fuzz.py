"""The fuzzer's short part: the same few hundred changed files in every run."""

import json
from pathlib import Path

import pytest

pytest.importorskip("resource")

from tests.fuzz.runs import structured
from tests.fuzz.seeds import seeds
from tests.fuzz.target import Failure, attempt, workplace

RECORD = Path(__file__).parent.parent / "docs" / "fuzz.json"


def test_every_seed_is_read_and_used():
    with workplace() as folder:
        for name, files in seeds().items():
            assert attempt(files, folder, use=True), name


def test_changed_files_end_in_a_result_or_a_refusal():
    counts, failures = structured(first=0, runs=600)
    assert not failures
    assert counts["results"] > 30
    assert counts["refusals"] > 300


def test_a_case_that_fails_is_told(monkeypatch):
    monkeypatch.setattr("tests.fuzz.target._read", lambda *_, **__: 1 / 0)
    with workplace() as folder, pytest.raises(Failure, match="ZeroDivisionError"):
        attempt({"adapter_config.json": b"{}"}, folder, use=False)


def test_the_long_run_on_record_found_nothing_that_is_left():
    record = json.loads(RECORD.read_text())
    assert record["failures"] == 0
    assert record["runs"] == record["results"] + record["refusals"] > 100_000
    assert record["command"].startswith("python -m tests.fuzz --first ")
