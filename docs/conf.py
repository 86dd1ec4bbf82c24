"""Sphinx configuration: MyST pages, and the API from the package's docstrings."""

import importlib
import os
import re
import sys
from pathlib import Path

from sphinx.util import logging

import optax_sam

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS))
import docstrings  # noqa: E402

project = "optax_sam"
author = "The optax_sam maintainers"
copyright = author
version = release = optax_sam.__version__

# The last three lie beside this file.
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "links",
    "mathml",
    "signatures",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["diff.css"]
html_title = f"optax_sam {release}"
html_math_renderer = "mathml"
# What is copied is the program, without prompts and output.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Docstrings' roles without a target are warnings too, as broken links are.
nitpicky = True

autodoc_member_order = "bysource"
# See signatures.py, which writes types beside the arguments. Signatures would spell out
# aliases such as optax.ScalarOrSchedule over three lines.
autodoc_preserve_defaults = False
autodoc_typehints = "none"
napoleon_numpy_docstring = False
# As fields of the class: listed apart, they would clash with the real attributes.
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = ["Cost", "Differs from the authors' code in"]

# A directive in a comment, which GitHub does not show.
HIDDEN = re.compile(r"^<!-- (\{[\w-]+\}.*?)-->", re.DOTALL | re.MULTILINE)
# A method in short, for those who read the file; here its docstring stands in full.
SHORT = re.compile(r"^<!-- method .*?<!-- end -->\n", re.DOTALL | re.MULTILINE)
# Files that pages include whole.
INCLUDED = {
    DOCS.parent / "benchmarks/README.md": DOCS / "results/benchmarks.md",
    DOCS.parent / "CHANGELOG.md": DOCS / "reference/changelog.md",
    DOCS.parent / "CONTRIBUTING.md": DOCS / "reference/contributing.md",
}


def relinked(text, folder, here, start=""):
    """A text whose links begin in a folder, with links for the page in another one.

    What is no page is handed out as a file.
    """

    def link(found):
        name, target, anchor = found[1], (folder / found[2]).resolve(), found[3] or ""
        if target.is_dir():
            return name
        target = INCLUDED.get(target, target)
        path = os.path.relpath(target, here)
        inside = target.is_relative_to(DOCS)
        return f"[{name}]({path}{anchor})" if inside else f"[{name}](path:{path})"

    return re.sub(rf"\[([^]]*)\]\(({start}[^)#:\s]+)(#[^)\s]*)?\)", link, text)


def fill_in(_app, docname, source):
    """Bring directives out of their comments, and links to where a file is shown."""
    here = (DOCS / docname).parent
    text = relinked(SHORT.sub("", source[0]), here, here, r"\.\./")
    if docname == "results/benchmarks":
        file = DOCS.parent / "benchmarks/README.md"
        _, _, readme = file.read_text().partition("\n")
        readme = relinked(readme, file.parent, here)
        text = text.replace("<!-- the README of benchmarks -->", readme)
    # Methods have pages of their own.
    elsewhere = ", ".join(x.rpartition(".")[2] for x in docstrings.pages_of_methods())
    text = HIDDEN.sub(r"```\1```", text).replace("PAGES_OF_METHODS", elsewhere)
    # A number and its error on one line.
    source[0] = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def public_names():
    """All names that have to be documented, with the methods of public classes."""
    for module in map(importlib.import_module, docstrings.MODULES):
        for name in module.__all__:
            obj = getattr(module, name)
            if not callable(obj):
                continue  # a submodule, or the version
            yield f"{module.__name__}.{name}"
            for attribute, value in vars(obj).items() if isinstance(obj, type) else ():
                function = getattr(value, "fget", value)  # of a property
                # Fields of tuples, and what is inherited, are of other modules.
                ours = getattr(function, "__module__", None) == obj.__module__
                if ours and not attribute.startswith("_"):
                    yield f"{module.__name__}.{name}.{attribute}"


def require_documentation(_app, env):
    """Warn, which fails the build, of a public name that no page documents."""
    documented = env.domains.python_domain.objects
    for name in public_names():
        if name not in documented:
            logging.getLogger(__name__).warning(
                f"{name} is public and on no page: write its docstring, and name it in"
                " the __all__ of a module with a page, or on a page of docs/methods."
            )


def setup(app):
    """Register the functions above."""
    app.connect("source-read", fill_in)
    app.connect("env-check-consistency", require_documentation)
