"""Formulas as MathML, which browsers lay out themselves: no script, no network."""

from docutils.utils.math.latex2mathml import tex2mathml


def setup(app):
    """Make MathML a renderer of formulas, and the one in use."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(writer, node):
    writer.body.append(tex2mathml(node.astext()))
    raise writer.skip_node


def _block(writer, node):
    formula = tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<div class="math" tabindex="0">{formula}</div>')
    raise writer.skip_node
