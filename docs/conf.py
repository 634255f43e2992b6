"""The site that `make docs` builds: the documents of this folder, and pages made of the installed package."""

import sys
from pathlib import Path

import xpnn

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "xpnn"
author = "xpnn's authors"
version = release = xpnn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "contents", "reference", "sources", "mathml"]
exclude_patterns = ["_ext"]

myst_enable_extensions = ["dollarmath"]  # formulas as code hosts write them: $...$, and blocks of ```math
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
highlight_language = "text"
default_role = "py:obj"  # `names` in docstrings: a link where there is one
autodoc_typehints = "none"  # the docstrings say what arguments are
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
html_math_renderer = "mathml"

html_theme = "furo"
html_title = f"xpnn {xpnn.__version__}"
html_static_path = ["_ext/site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
