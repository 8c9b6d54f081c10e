"""Run PEFT's own tests with LoTR in LoRA's place, and LoRA itself as the control.

    python -m tests.peft_matrix [FILE ...]

A file that is named is run anew; the others keep what an earlier run left in the cache. The
result goes to docs/peft-matrix.json and the tables of docs/peft-matrix.md once every file is
there. Exits with 1 unless every failure is explained by exclusions.toml.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.peft_matrix import report, suite
from tests.peft_matrix.models import make_models

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "peft-matrix.md"
TABLES = "<!-- tables: written by make peft-matrix -->\n"
FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_target_parameters",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_quantization",
    "test_config",
)
METHODS = ("lora", "lotr")
PACKAGES = ("peft", "transformers", "torch")


def main(names: list[str]) -> int:
    """Run, and return the exit code."""
    unknown = sorted(set(names) - set(FILES))
    if unknown:
        print(f"{unknown[0]} is none of {', '.join(FILES)}", file=sys.stderr)
        return 2
    tests = suite.fetch()
    make_models(suite.cache() / "hub")
    results = tests.parent / "results"
    results.mkdir(exist_ok=True)
    for name in names or FILES:
        for method in METHODS:
            _run(tests, name, method, results / f"{method}-{name}.jsonl")
    missing = [f for f in FILES for m in METHODS if not (results / f"{m}-{f}.jsonl").is_file()]
    if missing:
        print(f"{missing[0]} has not been run yet; the page is as it was")
        return 1
    runs = {m: {f: report.read_lines(results / f"{m}-{f}.jsonl") for f in FILES} for m in METHODS}
    summary = report.summarize(runs, {name: version(name) for name in PACKAGES})
    _write(summary)
    complaints = report.complaints(summary)
    print("\n".join(complaints) or "every failure is explained")
    return 1 if complaints else 0


def _run(tests: Path, name: str, method: str, results: Path) -> None:
    """Run one file for one method in a process of its own; its exit code says nothing."""
    print(f"== {name}, {method}", flush=True)
    results.unlink(missing_ok=True)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        "HF_HUB_CACHE": str(suite.cache() / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PEFT_MATRIX_METHOD": method,
        "PEFT_MATRIX_RESULTS": str(results),
    }
    # An empty configuration: PEFT's own asks for plugins, ours turns warnings into errors.
    options = ["-c", os.devnull, "--rootdir", str(tests.parent), "-p", "no:cacheprovider"]
    options += ["-p", "tests.peft_matrix.plugin", "-q", "--tb=no", "-W", "ignore", "--no-summary"]
    command = [sys.executable, "-m", "pytest", *options, str(tests / f"{name}.py")]
    code = subprocess.run(command, env=os.environ | environment, cwd=ROOT, check=False).returncode
    if code == 5:  # no test of this method: LoRA is not in every list
        results.touch()
    elif code not in (0, 1):  # all passed, some failed
        sys.exit(f"pytest stopped with {code} in {name}")


def _write(summary: dict[str, object]) -> None:
    PAGE.with_suffix(".json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    before, marker, _ = PAGE.read_text("utf-8").partition(TABLES)
    PAGE.write_text(before + marker + "\n" + report.tables(summary) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
