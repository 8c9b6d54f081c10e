"""Docstrings say what numpydoc asks for, and the reference shows every public name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from numpydoc.validate import validate

import lotrtensor.core

PUBLIC = (
    "lotrtensor",
    "lotrtensor.analysis",
    "lotrtensor.torch",
    "lotrtensor.peft",
    "lotrtensor.tensorly",
)
CORE = tuple(
    m.name
    for m in pkgutil.walk_packages(lotrtensor.core.__path__, "lotrtensor.core.")
    if not m.ispkg
)
PAGES = Path(__file__).parent.parent / "docs" / "reference"

NOT_ASKED = {
    "ES01",  # one sentence may say all
    "SA01",  # pages of the reference bring together what belongs together
    "GL01",  # the summary stands on the first line
    "SS05",  # takes plurals for verbs: "Cores ..."
}
NOT_ASKED_OF_PARTS = {"PR01", "RT01", "YD01"}
"""Sections that the public functions have; in methods and internals a sentence may do."""

WITH_EXAMPLES = ("lotrtensor", "lotrtensor.core", "lotrtensor.torch", "lotrtensor.tensorly")
"""Packages whose public functions and classes all show an example, which runs as a doctest."""


def public_names(module):
    """The names that a module gives out: its list, or what it defines."""
    found = importlib.import_module(module)
    listed = getattr(found, "__all__", None)
    if listed is None:
        own = (inspect.isclass, inspect.isfunction)
        listed = [
            name
            for name, value in vars(found).items()
            if any(kind(value) for kind in own)
            and value.__module__ == module
            and not name.startswith("_")
        ]
    return [f"{module}.{name}" for name in listed]


def parts(name):
    """The object of a name, and its own public methods."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    methods = vars(value).items() if inspect.isclass(value) else ()
    return [value, *(f for m, f in methods if not m.startswith("_") and inspect.isfunction(f))]


def path(value):
    """Where an object is defined; a function and its module may share their shorter name."""
    return f"{value.__module__}.{value.__qualname__}"


FUNCTIONS = {
    path(value)
    for package in PUBLIC
    for name in public_names(package)
    if inspect.isfunction(value := parts(name)[0])
}
SHOWN = {path(parts(name)[0]) for package in WITH_EXAMPLES for name in public_names(package)}
NAMES = {path(part) for m in (*PUBLIC, *CORE) for name in public_names(m) for part in parts(name)}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_docstrings_are_numpydoc(name):
    found = validate(name)["errors"]
    ignored = NOT_ASKED | (set() if name in FUNCTIONS else NOT_ASKED_OF_PARTS)
    if name not in SHOWN:
        ignored |= {"EX01"}
    assert [f"{code}: {text}" for code, text in found if code not in ignored] == []


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_shows_every_public_name(package):
    page = (PAGES / f"{package.removeprefix('lotrtensor.')}.md").read_text("utf-8")
    if f"automodule:: {package}\n   :members:" in page:
        return
    shown = set(re.findall(r"^\.\. auto\w+:: (\w+)", page, flags=re.MULTILINE))
    if package != "lotrtensor":  # whose page shows what it gives out itself
        shown |= set(lotrtensor.__all__)
    assert {name.removeprefix(package + ".") for name in public_names(package)} <= shown


@pytest.mark.parametrize("module", CORE)
def test_the_reference_shows_every_algorithm(module):
    top = {path(getattr(lotrtensor, name)) for name in lotrtensor.__all__}
    own = {path(parts(name)[0]) for name in public_names(module)}
    assert own <= top or module in (PAGES / "core.md").read_text("utf-8")
