"""Names in docstrings: a bare one finds its object in whatever module that lives."""

from sphinx.domains.python import PythonDomain


def setup(app):
    """Add both hooks to Sphinx."""
    app.connect("missing-reference", _resolve)
    app.connect("autodoc-skip-member", _skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _resolve(app, env, node, contnode):
    """Take the object whose name ends so, the one nearest to the top where there are several."""
    domain = env.get_domain("py")
    if node.get("refdomain") != "py" or not isinstance(domain, PythonDomain):
        return None
    ending = "." + node["reftarget"]
    found = [name for name in domain.objects if name.endswith(ending)]
    if not found:
        return None
    best = min(found, key=lambda name: (name.count("."), name))
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", best, node, contnode)


def _skip_fields(app, what, name, obj, skip, options):
    """Leave out a named tuple's fields, which its docstring describes."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field") else None
