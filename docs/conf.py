"""Settings of the site: ``make docs``. The source folder is the repository, so links work in both.

A page is a Markdown file or a notebook, and reads the same on GitHub. Nothing is fetched from the
network and no notebook is run: their outputs are kept (docs/tutorial/run.py).
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version as installed
from typing import Any

from sphinx.application import Sphinx

from vitrail.cli import COMMANDS

project, author = "Vitrail", "The Vitrail authors"
copyright = author
version = release = installed("vitrail")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**", "records/README.md", "records/**/README.md", "CHANGELOG.md", "CONTRIBUTING.md",
    "visualize_attention_map.ipynb",
]  # fmt: skip
exclude_patterns = [
    "docs/tutorial/output", "docs/**/.ipynb_checkpoints", "docs/conf.py", ".*", "data", "dist",
    "examples", "model", "output", "site", "src", "tests", "tools", "venv",
]  # fmt: skip

nb_execution_mode = "off"
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes", "Source"]

html_theme = "pydata_sphinx_theme"
html_title = "Vitrail"
html_extra_path = ["root"]  # index.html, which leads to docs/index.html
html_static_path = ["static"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {  # pages without pages below them
    name: [] for name in (
        "docs/faq", "docs/glossary", "docs/architecture", "docs/design", "docs/log",
        "CHANGELOG", "CONTRIBUTING",
    )
}  # fmt: skip
html_theme_options = {
    "logo": {"text": "Vitrail"},
    "header_links_before_dropdown": 4,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

TREES = {
    "docs/index": (
        "Tutorial <tutorial/README>", "How-to guides <how-to/index>",
        "Reference <reference/index>", "Questions <faq>", "glossary", "architecture", "design",
        "log", "../records/README", "../CHANGELOG", "../CONTRIBUTING",
    ),
    "docs/tutorial/README": ("[0-9]-*",),
    "docs/how-to/index": (
        "presets", "own-pictures", "see-through-it", "trust-a-prediction", "any-vit",
        "weights-in-and-out", "run-it-elsewhere", "serve", "*", "../../visualize_attention_map",
    ),
    "docs/reference/index": ("commands", "settings", "classifier", "*"),
    "records/README": ("*/README",),
}  # fmt: skip
"""The pages below a page, which need no list of them for GitHub."""

PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<text>[^"]*)"\s+src="(?P<light>[^"]+)"[^>]*>\s*</picture>'
)
"""How a picture with a dark variant is written for GitHub."""


def _prepare(_app: Sphinx, name: str, source: list[str]) -> None:
    """Add the pages below; let the site's own switch choose between light and dark pictures."""
    if name in TREES:
        pages = "\n".join(TREES[name])
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n\n{pages}\n```\n"
    if name == "docs/reference/commands":
        source[0] += "".join(f"\n## {each}\n\n```text\n{_help(each)}```\n" for each in COMMANDS)
    source[0] = PICTURE.sub(
        r"![\g<text>](\g<light>){.only-light}\n![\g<text>](\g<dark>){.only-dark}", source[0]
    )


def _help(command: str) -> str:
    """Return what ``vitrail COMMAND --help`` prints."""
    words = [sys.executable, "-m", "vitrail", command, "--help"]
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def setup(app: Sphinx) -> dict[str, Any]:
    """Read pages with the changes above."""
    app.connect("source-read", _prepare)
    return {"parallel_read_safe": True}
