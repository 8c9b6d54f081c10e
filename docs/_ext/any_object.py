"""Names in docstrings: a bare one finds its object in whatever module that lives."""

import importlib
import pkgutil
from functools import cache
from operator import attrgetter

from sphinx.domains.python import PythonDomain


def setup(app):
    """Add both hooks to Sphinx."""
    app.connect("missing-reference", _resolve)
    app.connect("autodoc-skip-member", _skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _resolve(app, env, node, contnode):
    """Link to the object whose name ends so, the one nearest to the top where there are several.

    What exists but is not in the reference stays without a link; what does not exist is an error.
    """
    domain = env.get_domain("py")
    if node.get("refdomain") != "py" or not isinstance(domain, PythonDomain):
        return None
    ending = "." + node["reftarget"]
    found = [name for name in domain.objects if name.endswith(ending)]
    if not found:
        return contnode if _exists(node["reftarget"]) else None
    best = min(found, key=lambda name: (name.count("."), name))
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", best, node, contnode)


@cache
def _modules():
    package = importlib.import_module("lotrtensor")
    names = [m.name for m in pkgutil.walk_packages(package.__path__, "lotrtensor.")]
    return {name: importlib.import_module(name) for name in names}


@cache
def _exists(name):
    """Whether a name is a module, or that of something in one."""
    return name in _modules() or any(_has(m, name) for m in _modules().values())


def _has(module, name):
    try:
        attrgetter(name.removeprefix(module.__name__ + "."))(module)
    except AttributeError:
        return False
    return True


def _skip_fields(app, what, name, obj, skip, options):
    """Leave out a named tuple's fields, which its docstring describes."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field") else None
