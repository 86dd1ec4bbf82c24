"""The errors of the package, read from its source: for a page that cannot fall behind.

A message is what the code says, with ``<name>`` or ``...`` where a value is filled in.
Texts that several messages share are looked up by their names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1] / "optax_sam"


class Error(NamedTuple):
    """One ``raise``: its module, line, type and message."""

    module: str
    line: int
    kind: str
    message: str


def errors() -> list[Error]:
    """Every error that the package raises with a message, by module and line."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
    shared = {
        name: value
        for tree in trees.values()
        for name, value in _texts(tree.body)
        if not name.startswith("_")
    }
    found = []
    for path, tree in trees.items():
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        for scope, statement in _raises(tree, dict(_texts(tree.body))):
            call = statement.exc
            if not isinstance(call, ast.Call):
                continue  # it was raised before
            kind = ast.unparse(call.func).rpartition(".")[2]
            if kind == "AttributeError":
                continue  # in Python's own words
            kind = "ValueError" if kind == "MissingArgument" else kind
            message = _text(call.args[0], shared | scope) if call.args else ""
            message = re.sub(r"(\.\.\.)+", "...", message)
            module = module.removesuffix(".__init__")
            found.append(Error(module, statement.lineno, kind, message))
    return found


def _raises(node: ast.AST, scope: dict) -> Iterator[tuple[dict, ast.Raise]]:
    """Each ``raise`` with the texts that are assigned to names around it."""
    if isinstance(node, ast.FunctionDef):
        scope = scope | dict(_texts(ast.walk(node)))
    if isinstance(node, ast.Raise) and node.exc is not None:
        yield scope, node
    for child in ast.iter_child_nodes(node):
        yield from _raises(child, scope)


def _texts(statements) -> Iterator[tuple[str, ast.expr]]:
    """Names that stand for an expression."""
    for statement in statements:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name):
                yield target.id, statement.value


def _text(node: ast.expr, names: dict) -> str:
    """The text of an expression, as far as it is known before it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, names) for value in node.values)
    if isinstance(node, ast.FormattedValue):  # with !r it shows a value, not a text
        return _text(node.value, {} if node.conversion == ord("r") else names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names) + _text(node.right, names)
    if isinstance(node, ast.BoolOp):
        last = node.values[-1]  # a constant stands in for a place that has no name
        return "..." if isinstance(last, ast.Constant) else _text(last, names)
    if isinstance(node, ast.IfExp):  # the longer form
        return max(_text(node.body, names), _text(node.orelse, names), key=len)
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    if name in names:
        # A name that is assigned from itself has nothing more to say.
        return _text(names[name], {x: y for x, y in names.items() if x != name})
    public = isinstance(node, ast.Name) and not node.id.startswith("_")
    return f"<{node.id}>" if public else "..."


def listing() -> str:
    """All messages as Markdown, by module; those in several places once."""
    by_module: dict[str, list[str]] = {}
    for error in errors():
        messages = by_module.setdefault(error.module, [])
        if error.message not in messages:
            messages.append(error.message)
    return "\n\n".join(
        f"## `{module}`\n\n" + "\n".join(f"- `{message}`" for message in messages)
        for module, messages in by_module.items()
    )
