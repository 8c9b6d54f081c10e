"""The command that runs PEFT's own tests, and the page that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

peft = pytest.importorskip("peft")

from lotrtensor.peft import LotrConfig  # noqa: E402
from tests.peft_matrix import cases, report  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "peft-matrix.md"


def summary():
    return json.loads(PAGE.with_suffix(".json").read_text("utf-8"))


def test_the_page_is_what_the_run_left() -> None:
    text = PAGE.read_text("utf-8")
    assert text.endswith("\n" + report.tables(summary()) + "\n")


def test_the_last_run_was_clean() -> None:
    found = summary()
    assert report.complaints(found) == []
    assert sum(file["passed"] for file in found["files"]) > 1000


def test_the_page_has_the_exclusions_of_today() -> None:
    written = [{k: e[k] for k in ("tests", "failure", "reason")} for e in summary()["exclusions"]]
    assert written == [vars(exclusion) for exclusion in report.read_exclusions()]


def line(test: str, outcome: str = "failed", message: str = "") -> dict[str, str]:
    return {"test": test, "outcome": outcome, "message": message}


def test_an_exclusion_covers_the_failure_that_it_expects_and_no_other(monkeypatch) -> None:
    known = report.Exclusion("*::test_merge[*conv2d*]", "has no LoTR form", "LoTR has none")
    stale = report.Exclusion("*::test_gone*", "", "nothing fails like this")
    monkeypatch.setattr(report, "read_exclusions", lambda: [known, stale])
    lines = [
        line("a.py::T::test_merge[x-conv2d-y]", message="Conv2d has no LoTR form"),
        line("a.py::T::test_merge[x-conv2d-z]", message="KeyError"),
        line("a.py::T::test_merge[x-lin0-y]", message="Linear has no LoTR form"),
        line("a.py::T::test_merge[1]", "passed"),
        line("a.py::T::test_merge[2]", "skipped", "Skipped: not for this\nmodel"),
    ]
    runs = {"lotr": {"a": lines}, "lora": {"a": [line("a.py::T::test_merge[3]", message="boom")]}}
    found = report.summarize(runs, {"peft": "1"})
    (counts,) = found["files"]
    assert [counts[name] for name in report.COUNTS] == [1, 1, 1, 2]
    assert found["skips"] == [{"test": "test_merge", "reason": "not for this", "count": 1}]
    words = report.complaints(found)
    assert len(words) == 4
    assert sum("failed: " in word for word in words) == 2
    assert sum("test_gone" in word and "take it out" in word for word in words) == 1
    assert sum("LoRA itself" in word for word in words) == 1


def test_the_last_line_of_a_test_counts(tmp_path: Path) -> None:
    lines = [line("t", "failed"), line("u", "passed"), line("t", "passed")]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert {row["test"]: row["outcome"] for row in report.read_lines(path)} == {
        "t": "passed",
        "u": "passed",
    }


def test_a_twin_stands_beside_lora() -> None:
    lora = peft.LoraConfig(target_modules=["a"], modules_to_save=["b"], init_lora_weights=False)
    name, found = cases.twin(["case", lora])
    assert (name, type(found)) == ("case", LotrConfig)
    assert (found.target_modules, found.modules_to_save) == ({"a"}, ["b"])
    assert not found.init_weights
    assert cases.twin(peft.LoraConfig) is LotrConfig
    assert cases.twin(peft.LoraConfig(target_modules=["a"], use_dora=True)) is None
    assert cases.twin(peft.IA3Config(target_modules=["a"])) is None
    assert cases.twin("case") is None
