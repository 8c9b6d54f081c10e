"""The classes of what public functions return, and of its fields and properties, are public."""

import importlib
import inspect
import typing

import pytest

PACKAGES = ("lotrtensor", "lotrtensor.core", "lotrtensor.analysis")
"""Packages that need no framework; a class is imported from one of them."""


def exported(package):
    """The objects of a package's list."""
    module = importlib.import_module(package)
    return [getattr(module, name) for name in module.__all__]


def classes(hint):
    """The package's own classes in an annotation."""
    if inspect.isclass(hint) and hint.__module__.split(".")[0] == "lotrtensor":
        yield hint
    for part in typing.get_args(hint):
        yield from classes(part)


def annotations(value):
    """What a function returns; or what the fields, properties and methods of a class hold."""
    if inspect.isfunction(value):
        yield typing.get_type_hints(value)["return"]
        return
    yield from typing.get_type_hints(value).values()
    for name, member in vars(value).items():
        function = getattr(member, "fget", None) or getattr(member, "func", member)
        if not name.startswith("_") and inspect.isfunction(function):
            yield typing.get_type_hints(function)["return"]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_returned_is_exported(package):
    public = {value for name in PACKAGES for value in exported(name)}
    found = {
        part
        for value in exported(package)
        if callable(value)
        for hint in annotations(value)
        for part in classes(hint)
    }
    assert found - public == set()
