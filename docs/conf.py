"""Sphinx configuration: MyST pages, and the API from the package's docstrings."""

import importlib
import inspect
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from sphinx.ext.autodoc.preserve_defaults import update_defvalue
from sphinx.util import logging

import optax_sam

DOCS = Path(__file__).resolve().parent
BENCHMARKS = DOCS.parent / "benchmarks"
sys.path.append(str(DOCS))
import errors  # noqa: E402
import excerpts  # noqa: E402

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
# Roles without a target are warnings too, as broken links are.
nitpicky = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = False  # see defaults_as_written
# Signatures would spell out aliases such as optax.ScalarOrSchedule over three lines.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
# As fields of the class: listed apart, they would clash with the real attributes.
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = ["Cost", "Differs from the authors' code in"]

# Each module's section lists its __all__; modules that are absent are left out.
MODULES = ["", ".ascent", ".when", ".blend", ".sharpness", ".plots"]
MODULES += [".linen", ".nnx", ".equinox"]


def modules():
    """The names of the public modules that are there."""
    names = [f"optax_sam{suffix}" for suffix in MODULES]
    return [name for name in names if find_spec(name) is not None]


def on_pages_of_methods():
    """The names that the pages of the methods document, so that the API does not."""
    pages = sorted((DOCS / "methods").glob("*.md"))
    directive = r"auto(?:function|class):: optax_sam\.(\w+)"
    return [name for page in pages for name in re.findall(directive, page.read_text())]


def from_here(link):
    """A link of the benchmarks' README, seen from the page that shows it."""
    text, target = link.groups()
    path = (BENCHMARKS / target).resolve()
    if path.is_dir():
        return text
    # What is no page is handed out as a file.
    kind = "" if path.is_relative_to(DOCS) else "path:"
    return f"[{text}]({kind}{os.path.relpath(path, DOCS / 'results')})"


def fill_in(_app, docname, source):
    """Replace the markers: of modules, errors, excerpts from tables, and a file."""
    if docname == "reference/api":
        excluded = f"   :exclude-members: {', '.join(on_pages_of_methods())}\n"
        sections = [
            f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n"
            + (excluded if name == "optax_sam" else "")
            + "```\n"
            for name in modules()
        ]
        source[0] = source[0].replace("<!-- modules -->", "\n".join(sections))
    if docname == "guide/troubleshooting":
        source[0] = source[0].replace("<!-- errors -->", errors.listing())
    excerpt = lambda found: getattr(excerpts, found[1])(found[2].split("; "))
    source[0] = re.sub(r"<!-- (measured|published): (.*) -->", excerpt, source[0])
    if docname == "results/benchmarks":
        readme = BENCHMARKS / "README.md"
        source[0] = re.sub(r"\[([^]]*)\]\(([^)#:]+)\)", from_here, readme.read_text())
    else:
        source[0] = source[0].replace(
            "../../benchmarks/README.md", "../results/benchmarks.md"
        )
    # A number and its error on one line.
    source[0] = source[0].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def defaults_as_written(_app, obj, bound):
    """Show defaults as the source has them, also where a decorator wrote them in."""
    preserving = SimpleNamespace(config=SimpleNamespace(autodoc_preserve_defaults=True))
    whole = vars(obj).get("__signature__") if inspect.isfunction(obj) else None
    if whole and obj.__name__ not in optax_sam.method.METHODS:
        return  # put together from two functions, with plain values for defaults
    if whole:
        del obj.__signature__
    update_defvalue(preserving, obj, bound)
    if whole:
        update_defvalue(preserving, optax_sam.sharpness_aware, False)
        known = dict(inspect.signature(optax_sam.sharpness_aware).parameters)
        known |= inspect.signature(obj).parameters
        written = lambda x: known.get(x.name, x).default
        parameters = [x.replace(default=written(x)) for x in whole.parameters.values()]
        obj.__signature__ = whole.replace(parameters=parameters)


def skip_tuple_fields(_app, _what, _name, obj, skip, _options):
    """Leave out NamedTuple fields: the class docstring documents them."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field")


def public_names():
    """All names that have to be documented, with the methods of public classes."""
    for module in map(importlib.import_module, modules()):
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
                " the __all__ of a module of MODULES or on a page of docs/methods."
            )


def setup(app):
    """Register the functions above."""
    app.connect("source-read", fill_in)
    app.connect("autodoc-before-process-signature", defaults_as_written)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("env-check-consistency", require_documentation)
