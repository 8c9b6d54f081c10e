"""Run by the kernel of every page: whole outputs of commands, figures with the site's Plotly."""

import os
import subprocess

import plotly.io as pio
from IPython.core.magic import register_cell_magic
from plotly.io.base_renderers import MimetypeRenderer


@register_cell_magic
def bash(line, cell):
    """Run a cell as IPython's own ``%%bash`` does, which cuts outputs every 100 bytes."""
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", cell],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    print(run.stdout, end="")
    run.check_returncode()


class SiteRenderer(MimetypeRenderer):
    """A figure as a part of a page that has loaded Plotly already."""

    def to_mimebundle(self, fig_dict):
        """Return the figure as HTML."""
        config = {"displayModeBar": False, "responsive": True}
        html = pio.to_html(
            fig_dict,
            config=config,
            include_plotlyjs=False,
            include_mathjax=False,
            full_html=False,
            validate=False,
        )
        return {"text/html": html}


pio.renderers["site"] = SiteRenderer()
pio.renderers.default = "site"
pio.templates["site"] = pio.templates["plotly_white"]
pio.templates["site"].layout.update(
    paper_bgcolor="rgba(0,0,0,0)",
    plot_bgcolor="rgba(0,0,0,0)",
    height=430,
    margin={"l": 60, "r": 20, "t": 50, "b": 50},
)
pio.templates.default = "site"

# The kernel asks commands for colours, which a page would print as codes.
for name in ("CLICOLOR_FORCE", "FORCE_COLOR"):
    os.environ.pop(name, None)
