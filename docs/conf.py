"""Sphinx configuration: MyST pages, and the API from the package's docstrings."""

import sys
from importlib.util import find_spec
from pathlib import Path

import optax_sam

sys.path.insert(0, str(Path(__file__).parent))
import errors  # noqa: E402

project = "optax_sam"
author = "The optax_sam maintainers"
copyright = author
version = release = optax_sam.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"optax_sam {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The README and CONTRIBUTING also link to files that are no part of these pages.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Signatures would spell out aliases such as optax.ScalarOrSchedule over three lines.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
# As fields of the class: listed apart, they would clash with the real attributes.
napoleon_use_ivar = True
napoleon_custom_sections = ["Cost", "Differs from the authors' code in"]

# Each module's section lists its __all__; modules that are absent are left out.
MODULES = ["", ".ascent", ".when", ".blend", ".sharpness", ".plots", ".linen", ".nnx"]


def fill_in_modules(_app, docname, source):
    """Replace the marker in api.md by one section for each public module."""
    if docname != "api":
        return
    names = [f"optax_sam{suffix}" for suffix in MODULES]
    sections = [
        f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
        for name in names
        if find_spec(name) is not None
    ]
    source[0] = source[0].replace("<!-- modules -->", "\n".join(sections))


def fill_in_errors(_app, docname, source):
    """Replace the marker in troubleshooting.md by the package's own messages."""
    if docname == "troubleshooting":
        source[0] = source[0].replace("<!-- errors -->", errors.listing())


def skip_tuple_fields(_app, _what, _name, obj, skip, _options):
    """Leave out NamedTuple fields: the class docstring documents them."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field")


def setup(app):
    """Register the three functions above."""
    app.connect("source-read", fill_in_modules)
    app.connect("source-read", fill_in_errors)
    app.connect("autodoc-skip-member", skip_tuple_fields)
