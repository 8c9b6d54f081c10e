"""Pytest plugin that puts LoTR beside LoRA in PEFT's tests, and writes down what became of them."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import signal
import sys
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from lotrtensor.peft import LotrConfig
from tests.peft_matrix import cases
from tests.peft_matrix.suite import fetch

METHOD = os.environ.get("PEFT_MATRIX_METHOD", "lotr")
RESULTS = Path(os.environ["PEFT_MATRIX_RESULTS"]) if "PEFT_MATRIX_RESULTS" in os.environ else None
SECONDS = 300
"""Time that one test may take."""


class _AlwaysKnown(defaultdict[str, int]):
    """PEFT asks the hub for a model once and is offline then; make it so from the start."""

    def __contains__(self, key: object) -> bool:
        return True


def _no_data_set(name: str, *args: Any, **options: Any) -> Any:
    raise LookupError(f"the data set {name} is on a model hub, and this run is offline")


def pytest_configure(config: pytest.Config) -> None:
    """Load PEFT's helpers, with a stand-in for the package ``datasets`` if it is not installed.

    They import it at the top, but the tests that stay here use none of it.
    """
    folder = fetch()
    sys.path.insert(0, str(folder.parent))
    stands_in = importlib.util.find_spec("datasets") is None
    if stands_in:
        stub = types.ModuleType("datasets")
        stub.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        stub.load_dataset = _no_data_set  # type: ignore[attr-defined]
        sys.modules["datasets"] = stub
    # Its assertions then say what they found, and exclusions can tell them apart.
    pytest.register_assert_rewrite(f"{folder.name}.testing_common")
    helpers = importlib.import_module(f"{folder.name}.testing_utils")
    helpers._HUB_MODEL_ACCESSES = _AlwaysKnown(int)  # type: ignore[attr-defined]
    if stands_in:
        del sys.modules["datasets"]


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Put the cases in once a module is there and its tests are not yet made."""
    if not isinstance(collector, pytest.Module):
        return
    module = collector.obj
    lists = {id(value) for value in vars(module).values() if isinstance(value, list | tuple)}
    rows = {
        id(getattr(module, name)): added
        for name, added in cases.LISTS.get(collector.path.stem, {}).items()
    }
    for owner in (module, *(v for v in vars(module).values() if isinstance(v, type))):
        for function in filter(inspect.isfunction, list(vars(owner).values())):
            for place, mark in enumerate(getattr(function, "pytestmark", ())):
                if mark.name == "parametrize" and isinstance(mark.args[1], list | tuple):
                    values = mark.args[1]
                    added = rows.get(id(values), ()) if id(values) in lists else _twins(values)
                    function.pytestmark[place] = pytest.mark.parametrize(
                        mark.args[0], [*values, *added], **mark.kwargs
                    ).mark


def _twins(values: Iterable[Any]) -> list[Any]:
    """LoTR in place of LoRA, for a list that stands in a decorator."""
    return [found for value in values if (found := cases.twin(value)) is not None]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of one method."""
    mine = [item for item in items if _method(item) == METHOD]
    config.hook.pytest_deselected(items=[item for item in items if _method(item) != METHOD])
    items[:] = mine


def _method(item: pytest.Item) -> str | None:
    values = list(getattr(getattr(item, "callspec", None), "params", {}).values())
    if any(isinstance(value, str) and value in cases.LEFT_OUT for value in values):
        return None
    for value in values:
        if value is LotrConfig or type(value) is LotrConfig:
            return "lotr"
    for value in values:
        if type(value) is LoraConfig:
            return "lora"
        if value is LoraConfig and all(map(_is_plain, values)):
            return "lora"
    return None


_PLAIN = {
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_rslora",
}


def _is_plain(value: Any) -> bool:
    """Whether a LoRA case has no option but those that LoTR has as well."""
    return not isinstance(value, dict) or set(value) <= _PLAIN


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    """Run a test from a fixed seed, for a limited time.

    PEFT's tests ask for LoRA by name where few methods can do a thing: what they let LoRA do, LoTR
    has to do, so that the name stands for it while a case of its own runs.
    """
    torch.manual_seed(0)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with pytest.MonkeyPatch.context() as patch:
            if METHOD == "lotr":
                common = sys.modules.get(f"{item.module.__package__}.testing_common")
                for module in filter(None, (item.module, common)):
                    patch.setattr(module, "LoraConfig", LotrConfig, raising=False)
            return (yield)
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"the test took more than {SECONDS} seconds")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a line to the results as soon as a test is over, so that a stopped run loses nothing."""
    if RESULTS is None or not (report.when == "call" or report.outcome != "passed"):
        return
    message = ""
    if report.skipped:
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected failure"
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr)
    line = {"test": report.nodeid, "outcome": report.outcome, "message": message}
    with RESULTS.open("a") as lines:
        lines.write(json.dumps({**line, "seconds": round(report.duration, 2)}) + "\n")
