"""Sphinx configuration. Build with: sphinx-build -W -b html docs docs/_build/html"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generated_pages  # noqa: E402

project = "convexlearn"
author = "the convexlearn developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "notebooks/README.md"]
html_theme = "furo"
html_title = "convexlearn"
html_show_sphinx = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autosummary_generate = False

generated_pages.write(HERE)
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)


def setup(app):
    """Docstrings are plain text with code in single backticks; constructors show their own arguments."""
    app.connect("autodoc-process-docstring", generated_pages.to_restructured_text)
    app.connect("autodoc-process-signature", generated_pages.constructor_signature)
