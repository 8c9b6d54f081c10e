"""What the pages of the documentation show is run: as cells when it is built, or by a test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.bench.families import Point, others, table

ROOT = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in ROOT.rglob("*.md") if "_build" not in page.parts)

OUTSIDE = (
    "pip install",
    "vllm serve",
    "python -m sglang.launch_server",
    "python convert_lora_to_gguf.py",
    "llama-cli",
)
"""Commands that need a network, a server or another project."""
OURS = ("make ", ".venv-test/bin/python -m pytest")
RUN_BY_A_TEST = {"howto/image-models.md", "reference/cli.md", "training.md"}
"""Pages whose commands other tests run."""


def blocks(page):
    """Languages and lines of the fenced blocks of a page that are no cells."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text.strip().splitlines()) for language, text in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_is_run_or_needs_what_is_not_here(page):
    name = str(page.relative_to(ROOT))
    if name in RUN_BY_A_TEST:
        return
    languages = {language for language, _ in blocks(page)}
    assert not languages & {"python", "pycon", "ipython3", "bash"}, "make it a code-cell"
    for language, lines in blocks(page):
        if language in ("sh", "console"):
            assert all(line.startswith(OUTSIDE + OURS) for line in lines), lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_with_cells_have_a_kernel(page):
    text = page.read_text("utf-8")
    assert ("{code-cell}" in text) == text.startswith("---\nfile_format: mystnb\n")


def test_the_table_of_speed_is_what_was_measured():
    """Row by row, as ``make bench`` left it in bench.json."""
    page = (ROOT / "benchmarks.md").read_text("utf-8")
    core = page[page.index("| case |") :].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in core.splitlines()]
    header, rows = lines[0][:-1], lines[2:]
    measured = json.loads((ROOT / "bench.json").read_text("utf-8"))
    assert len(rows) == len(measured)
    for row, values in zip(rows, measured, strict=True):
        for name, cell in zip(header, row, strict=False):
            value = values.get(name)
            text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else value
            assert cell.strip() == text
        assert row[-1] == f"{values['peak_bytes'] / 2**20:.0f}"


def test_the_tables_of_experts_are_what_was_measured():
    """Row by row, from bench-experts.json and experts.json."""
    page = (ROOT / "howto" / "mixture-of-experts.md").read_text("utf-8")
    for row in json.loads((ROOT / "bench-experts.json").read_text("utf-8")):
        names = ("frozen_seconds", "lotr_seconds", "lora_seconds", "lotr_to_frozen", "lora_to_lotr")
        cells = [row["implementation"], row["rank"], *(row[name] for name in names)]
        cells += [f"{row[name]:,}" for name in ("lotr_numbers", "lora_numbers")]
        cells += [row[name] for name in ("lotr_peak_mib", "lora_peak_mib")]
        assert f"| {' | '.join(map(str, cells))} |" in page
    found = json.loads((ROOT / "experts.json").read_text("utf-8"))
    for row in found["rows"]:
        kept = f"{row['perplexity']:.3f} ± {row['deviation']:.3f}"
        cells = [row["name"], f"{row['numbers']:,}", f"{row['lr']:g}", kept, row["seconds_a_step"]]
        assert f"| {' | '.join(map(str, cells))} |" in page
    assert f"{found['before']:.3f}" in page
    assert f"{found['base_steps']} steps" in page


def test_the_tables_of_packs_are_what_was_measured():
    """Row by row, as ``python -m tests.bench.families`` left it in families.json; and the claim."""
    page = (ROOT / "howto" / "packs.md").read_text("utf-8")
    content = json.loads((ROOT / "families.json").read_text("utf-8"))
    for lines in (table(content), others(content)):
        assert "\n".join(lines) in page
    points = [Point(**row) for row in content["points"]]
    packs = [p for p in points if p.form == "pack"]
    for other in points:
        if other.form in ("vlora", "lorashare"):
            own = [p for p in packs if p.family == other.family]
            assert any(p.bytes < other.bytes and p.error < other.error for p in own), other


def test_the_table_of_what_packs_keep_is_what_was_measured():
    from tests.evidence.families import table
    from tests.evidence.tables import read

    page = (ROOT / "howto" / "packs.md").read_text("utf-8")
    assert "\n".join(table(read(ROOT / "evidence" / "families.jsonl"))) in page


def test_the_tables_of_crowds_are_what_was_measured():
    from tests.bench.crowd import crowd_table, table

    page = (ROOT / "howto" / "packs.md").read_text("utf-8")
    models = json.loads((ROOT / "crowd.json").read_text("utf-8"))["models"]
    for model in models.values():
        assert "\n".join(table(model["rows"])) in page
        assert model["slopes"]["cpu_seconds"] <= 1.1
    assert "\n".join(crowd_table(models["a layer of 8 B"]["rows"])) in page


def test_the_table_of_peers_is_what_was_measured():
    from tests.bench.peers import table

    page = (ROOT / "benchmarks.md").read_text("utf-8")
    assert "\n".join(table(json.loads((ROOT / "peers.json").read_text("utf-8")))) in page


def test_the_table_of_commands_is_what_was_measured():
    from tests.bench.bench_commands import table

    page = (ROOT / "benchmarks.md").read_text("utf-8")
    measured = json.loads((ROOT / "bench-commands.json").read_text("utf-8"))
    assert {"--help", "convert, bundled", "convert, 8B shape"} <= {row["case"] for row in measured}
    for row in measured:
        if row["limit"]:
            # Each is a median of its own, of runs that differ by as much as the spread.
            ratio = row["seconds"] / row["limit"]
            assert 0.3 < row["times_limit"] / ratio < 3
    assert table(measured) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_formulas_are_of_what_the_renderer_knows(page):
    """A command that it does not know stops the build of all pages, minutes after it began."""
    tex2mathml = pytest.importorskip("docutils.utils.math.latex2mathml").tex2mathml
    text = re.sub(r"^(`{3,}|:{3,}).*?^\1\s*$", "", page.read_text("utf-8"), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    inline = r"(?<!\$)\$([^$\n]+)\$(?!\$)"
    for formula in re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL) + re.findall(inline, text):
        assert tex2mathml(formula.strip())


def test_the_table_of_faults_is_what_was_measured():
    page = (ROOT / "trust.md").read_text("utf-8")
    found = json.loads((ROOT / "faults.json").read_text("utf-8"))
    for row in found["commands"]:
        assert f"| {row['command']} | {row['points']} | {len(row['failures'])} |" in page
    assert f"Of {found['points']:,} points none did otherwise" in page
    assert not any(row["failures"] for row in found["commands"])
