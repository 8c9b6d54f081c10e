"""Formulas as MathML, which browsers lay out themselves: no script, no network.

The font, STIX Two Math, comes from the package ziamath: few systems have one for formulas.
"""

import shutil
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

FONT = "STIXTwoMath-Regular.ttf"


def setup(app):
    """Make MathML a renderer of formulas, and the one in use."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    app.connect("build-finished", _copy_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _copy_font(app, exception):
    if exception is None and app.builder.format == "html":
        shutil.copy(str(files("ziamath") / "fonts" / FONT), Path(app.outdir) / "_static" / FONT)


def _inline(writer, node):
    writer.body.append(_convert(node))
    raise nodes.SkipNode


def _block(writer, node):
    formula = _convert(node, as_block=True)
    writer.body.append(f'<div class="math" tabindex="0">{formula}</div>')
    raise nodes.SkipNode


def _convert(node, **options):
    """Bars of norms stay as tall as letters: browsers would stretch the first of a pair alone."""
    formula = tex2mathml(node.astext(), **options)
    return formula.replace("<mo>‖</mo>", '<mo stretchy="false">‖</mo>')
