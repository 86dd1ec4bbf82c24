"""What docstrings say, as the Markdown that the pages show also where nothing runs."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import optax_sam
from optax_sam.method import _sections as sections

ROOT = Path(__file__).parents[1]
# The modules with a page of their own in reference/api/.
MODULES = ["optax_sam"]
MODULES += [f"optax_sam.{x}" for x in ("ascent", "when", "blend", "sharpness", "plots")]
MODULES += [f"optax_sam.{x}" for x in ("linen", "nnx", "equinox")]
# A docstring's code, roles, formulas and links.
INLINE = re.compile(
    r"``(?P<code>.+?)``|:math:`(?P<math>.+?)`|:\w+:`~?(?P<role>[^`]+)`"
    r"|`(?P<text>[^`<]+?)\s*<(?P<url>[^>]+)>`_",
    re.DOTALL,
)


def markdown(text):
    """A paragraph of a docstring, on one line."""

    def inline(found):
        if found["math"]:  # a bar would end the cell of a table
            latex = found["math"].replace(r"\|", r"\Vert ").replace("|", r"\vert ")
            return f"${latex}$"
        if found["url"]:
            return f"[{found['text']}]({found['url']})"
        return f"`{found['code'] or found['role']}`"

    return " ".join(INLINE.sub(inline, text).split())


def section(function, title):
    """The text of one section of a docstring, or nothing."""
    return textwrap.dedent(sections(function).get(title, "")).strip()


def summary(obj):
    """The first paragraph of a docstring."""
    return markdown(inspect.cleandoc(obj.__doc__).partition("\n\n")[0])


def code(references):
    """References, with links to the repositories that they name."""
    name = r"(?<=[ ,])([A-Za-z][\w-]+/[A-Za-z][\w-]+)"
    return re.sub(name, r"[\1](https://github.com/\1)", markdown(references))


def differences(function):
    """What a docstring lists of differences from the authors' code."""
    text = section(function, "Differs from the authors' code in")
    return [markdown(x) for x in re.split(r"^\d+\. ", text, flags=re.MULTILINE) if x]


def public(module):
    """The functions and classes that a module offers, by name, classes last."""
    module = importlib.import_module(module)
    found = [(name, getattr(module, name)) for name in sorted(module.__all__)]
    functions_first = sorted(found, key=lambda x: isinstance(x[1], type))
    return {name: obj for name, obj in functions_first if callable(obj)}


def pages_of_methods():
    """The page in docs/methods of each public name that one of them documents."""
    directive = r"auto(?:function|class):: (optax_sam\.\w+)"
    pages = sorted((ROOT / "docs/methods").glob("*.md"))
    found = {page: re.findall(directive, page.read_text()) for page in pages}
    return {name: page.name for page, names in found.items() for name in names}


def names(module):
    """A table of what a module offers."""
    pages, rows = pages_of_methods(), []
    for name, obj in public(module).items():
        cell = f"`{module}.{name}`"
        if page := pages.get(f"{module}.{name}"):
            cell = f"[{cell}](../../methods/{page})"
        rows.append(f"| {cell} | {summary(obj)} |")
    return "\n".join(["| name | what it is |", "| --- | --- |", *rows])


def modules():
    """A table of the modules."""
    rows = []
    for name in MODULES:
        page, module = name.rpartition(".")[2], importlib.import_module(name)
        rows.append(f"| [`{name}`](api/{page}.md) | {summary(module)} |")
    return "\n".join(["| module | what it holds |", "| --- | --- |", *rows])


def method(name):
    """A method in short: what it does, an example, its paper."""
    function = getattr(optax_sam, name)
    example, *_ = section(function, "Examples").split("\n\n")
    # As it stands in the docstring, where lines are shorter than the formatter's.
    example = f"<!-- fmt: off -->\n\n```pycon\n{example}\n```\n\n<!-- fmt: on -->"
    paper = code(section(function, "References"))
    return f"{summary(function)}\n\n{example}\n\n**Paper.** {paper}"
