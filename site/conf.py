"""Sphinx's configuration; `site/build.py` prepares the pages and calls Sphinx."""

import re
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent  # the assembled pages, build/site/source
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "noisOut"
author = "The noisOut contributors"
copyright = "The noisOut contributors; MIT licence"
version = release = PROJECT["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_design"]
exclude_patterns = ["_static"]
nb_execution_mode = "off"  # the recorded outputs are what is shown
nb_ipywidgets_js = {}  # widgets are shown as their still images
myst_enable_extensions = ["amsmath", "attrs_inline", "attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
if (HERE / "_static" / "mathjax").exists():
    mathjax_path = "mathjax/tex-svg.js"  # else from Sphinx's usual address

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "noisOut"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/flower.svg"
html_logo = "_static/flower.svg"
html_copy_source = True  # the download button of a notebook
html_show_sphinx = False
html_theme_options = {
    "repository_url": PROJECT["urls"]["Repository"],
    "repository_branch": "main",
    "path_to_docs": "",
    "launch_buttons": {
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
        "notebook_interface": "jupyterlab",
    },
    "use_repository_button": True,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "logo": {"text": "noisOut"},
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def plain_to_rst(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in `backticks`; in reStructuredText more is markup."""
    text = re.sub(r"\n\n(?= {4})", "\n\n::\n\n", "\n".join(lines))  # an indented example
    parts = re.split(
        r"(`[^`]*`|^ *>>> .*?(?:\n\n|\Z)|^ {4}[^\n]*)", text, flags=re.DOTALL | re.MULTILINE
    )
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part)
        elif part.startswith("`"):
            parts[i] = rf"\ `{' '.join(part.split())}`\ "
    lines[:] = "".join(parts).splitlines()


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain_to_rst)
