"""What Sphinx is told; `docs/site/make.py` writes the sources and calls it, with warnings as errors."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from course_utils.links import read_release  # noqa: E402

project = "Circuits from Scratch"
copyright = "The Circuits from Scratch authors, MIT licence"
release = read_release(ROOT).version
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
html_theme = "furo"
html_title = project
html_static_path = [str(Path(__file__).parent / "static"), str(ROOT / "build/site/static")]
html_extra_path = [str(ROOT / "build/site/extra")]  # notebooks to be downloaded
html_favicon = str(Path(__file__).parent / "static" / "favicon.svg")
html_css_files = ["site.css"]
html_js_files = [("figures.js", {"defer": "defer"}), ("reach.js", {"defer": "defer"})]
html_show_sphinx = False
html_copy_source = False

nb_execution_mode = "off"  # make.py ran them
nb_merge_streams = True
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

nitpicky = True  # a link to nowhere is an error; the types in signatures are no links
nitpick_ignore_regex = [("py:.*", ".*")]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"

CODE = re.compile(r"(`+[^`]+`+)")


def docstring_as_rst(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with code in single backticks, and blocks of code that are indented."""
    result: list[str] = []
    block = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not block and result and not result[-1]:
            result += ["::", ""]
            block = True
        elif line and not indented:
            block = False
        if not block:
            parts = CODE.split(line)
            parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
            line = "".join(parts)
        result.append(line)
    lines[:] = result


def scripts_where_needed(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """The large scripts that draw, on those pages only that have something to draw."""
    body = context.get("body", "")
    if '<figure class="plotly-figure"' in body:
        app.add_js_file("plotly.min.js", loading_method="defer", priority=400)
        app.add_js_file("plotly-template.js", loading_method="defer", priority=400)
    if '<figure class="attention-view"' in body:
        app.add_js_file("circuitsvis.js", loading_method="defer", priority=400)


def captions_are_no_headings(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx calls the sidebar's captions headings, and leaves out of which level."""
    context["furo_navigation_tree"] = context["furo_navigation_tree"].replace(' role="heading"', "")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", docstring_as_rst)
    app.connect("html-page-context", scripts_where_needed)
    app.connect("html-page-context", captions_are_no_headings, priority=900)  # furo has made the sidebar by then
