"""Executed cells as a reader wants them: shell commands without the magic, figures with Plotly."""

from pathlib import Path

from docutils import nodes
from plotly.offline import get_plotlyjs
from sphinx.transforms import SphinxTransform

MAGIC = "%%bash\n"


class ShellCells(SphinxTransform):
    """Show a cell of commands as commands."""

    default_priority = 800

    def apply(self, **kwargs):
        """Drop the line that tells the kernel what the cell is."""
        for block in self.document.findall(nodes.literal_block):
            if block.rawsource.startswith(MAGIC) or block.astext().startswith(MAGIC):
                code = block.astext().removeprefix(MAGIC)
                fresh = nodes.literal_block(code, code, language="bash")
                fresh["classes"] = block["classes"]
                block.replace_self(fresh)


def setup(app):
    """Add both to Sphinx."""
    app.add_transform(ShellCells)
    app.connect("html-page-context", _load_plotly)
    app.connect("build-finished", _copy_plotly)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _load_plotly(app, pagename, templatename, context, doctree):
    """Put Plotly before the figures: the theme loads scripts after them."""
    body = context.get("body", "")
    if "plotly-graph-div" in body:
        source = context["pathto"]("_static/plotly.min.js", resource=True)
        context["body"] = f'<script src="{source}"></script>{body}'


def _copy_plotly(app, exception):
    if exception is None and app.builder.format == "html":
        (Path(app.outdir) / "_static" / "plotly.min.js").write_text(get_plotlyjs(), "utf-8")
