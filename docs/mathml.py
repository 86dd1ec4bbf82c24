"""Formulas as MathML, which browsers draw with neither a script nor a network."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

# What the converter leaves as it was, and a tilde that stands too high.
LEFT = {r"\|": "‖", r"\{": "{", r"\}": "}", r"\_": "_", "&#x0007E;": "∼"}


def mathml(latex, display="inline"):
    """A formula as an element."""
    element = convert(latex, display=display)
    for left, character in LEFT.items():
        element = element.replace(left, character)
    return element


def rendered(node, display):
    """The formulas of a node, with a warning where a command was not understood."""
    for latex in re.split(r"\n\s*\n", node.astext().strip()):
        if display == "block" and re.search(r"\\\\|&", latex):
            latex = rf"\begin{{split}}{latex}\end{{split}}"
        element = mathml(latex, display)
        if "\\" in element:
            logging.getLogger(__name__).warning(
                f"No MathML for a command in {latex!r}.", location=node
            )
        yield element


def inline(translator, node):
    translator.body += rendered(node, "inline")
    raise nodes.SkipNode


def block(translator, node):
    body = "\n".join(rendered(node, "block"))
    translator.body.append(f'<div style="overflow-x: auto">\n{body}\n</div>\n')
    raise nodes.SkipNode


def setup(app):
    """Makes ``mathml`` a renderer that ``html_math_renderer`` can name."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
