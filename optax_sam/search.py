"""Finding the state of a method by its type, wherever an optimizer's state keeps it."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

State = TypeVar("State")


def the_state(kind: type[State], method: str, opt_state: Any, example: str) -> State:
    """The one state of a type in a tree, holding arrays."""
    is_kind = lambda x: isinstance(x, kind)
    found = list(filter(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind)))
    if len(found) != 1:
        raise ValueError(
            f"Expected one state of {method}, found {len(found)}; pass the opt_state of"
            f" an optimizer that has one, such as {example}."
        )
    return without_variables(found[0])


def without_variables(tree: Any) -> Any:
    """The tree with NNX variables replaced by the arrays that they hold."""
    is_variable = lambda x: hasattr(x, "get_value") and not isinstance(x, jax.Array)
    return jax.tree.map(
        lambda x: jax.tree.leaves(x)[0] if is_variable(x) else x,
        tree,
        is_leaf=is_variable,
    )
