"""Sphinx configuration; ``make docs`` builds the site into docs/_build/html."""

import logging
import os
import sys
from pathlib import Path

import lotrtensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "lotrtensor"
author = "The lotrtensor developers"
copyright = "The lotrtensor developers"
version = release = lotrtensor.__version__

extensions = [
    "sphinx.ext.autodoc",
    "numpydoc",
    "myst_nb",
    "sphinx_copybutton",
    "any_object",
    "cells",
    "command_line",
    "mathml",
    "notebooks",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

# Whatever cannot be resolved is an error: a name in a docstring, a link, a heading.
nitpicky = True
default_role = "py:obj"
smartquotes = False  # two dashes begin an option

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say the types, in words
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True  # commands in cells leave nothing behind
nb_execution_timeout = 180
nb_execution_show_tb = True
nb_merge_streams = True

html_theme = "furo"
html_title = "lotrtensor"
html_static_path = ["_static"]
html_css_files = ["lotrtensor.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1d4ed8", "color-brand-content": "#1d4ed8"},
    "dark_css_variables": {"color-brand-primary": "#7dabff", "color-brand-content": "#7dabff"},
}
copybutton_exclude = ".linenos, .gp, .go"

logging.getLogger("traitlets").setLevel(logging.WARNING)  # nbclient tells of every page
# Cells find ``lotr`` beside this interpreter, and draw with the site's own copy of Plotly.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["LOTR_EXAMPLES"] = str(HERE.parent / "examples")
os.environ["IPYTHONDIR"] = str(HERE / "_ipython")
