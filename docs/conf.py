"""Sphinx builds docs/*.md (MyST) and the reference from the docstrings: ``python -m sphinx -W -b html docs build/docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jepa_scale

project = "jepa_scale"
release = jepa_scale.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]

myst_heading_anchors = 4  # as GitHub makes them, so that links work in both
nitpicky = False  # types of other packages have no pages here

autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "model_config"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are listed once, not as objects beside those that autodoc finds

html_theme = "furo"
html_title = "jepa_scale"
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"

OPTIONAL = ("config", "performance", "clusters", "security")  # have a place in the index, and may not be there


def leave_out(app, docname, source):
    """Takes pages that are not there out of the index."""
    missing = [name for name in OPTIONAL if not (Path(app.srcdir) / f"{name}.md").exists()]
    if docname == "index":
        source[0] = "\n".join(line for line in source[0].split("\n") if line not in missing)


def setup(app):
    app.connect("source-read", leave_out)
