"""Run by the kernel of every page: figures on a clear ground, with the site's copy of Plotly."""

import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer


class SiteRenderer(MimetypeRenderer):
    """A figure as a part of a page that has loaded Plotly already."""

    def to_mimebundle(self, fig_dict):
        """Return the figure as HTML."""
        config = {"displaylogo": False, "responsive": True}
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
