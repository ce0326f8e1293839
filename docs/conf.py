"""How `make docs` builds the site: the pages of this folder, generated parts filled in, nothing read from a network."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import attnopt  # noqa: E402

project = "attnopt"
author = "the attnopt authors"
project_copyright = author
release = version = attnopt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "generated", "outside"]
exclude_patterns = ["_build", "_ext"]

# Links to a heading are written as a forge makes them: masks.md#the-contract.
myst_heading_anchors = 4
smartquotes = False
highlight_language = "none"

# In docstrings, `word` is code, as it is in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
# A type in a signature is a link where this site has an entry for it, and plain text where it has none. Docstrings name
# no class by a role.
nitpick_ignore_regex = [("py:class", ".*")]

html_theme = "furo"
html_title = f"attnopt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
