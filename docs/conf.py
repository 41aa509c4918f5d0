"""Sphinx: the documentation of qconv. `make docs` builds it, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from qconv import __version__

project = "qconv"
version = release = __version__
copyright = "the qconv authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "from_code",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_ext"]
smartquotes = False  # it makes one dash of an option's two
html_theme = "furo"
html_title = "qconv"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"navigation_with_keys": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
nitpicky = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
