"""States found by their type, wherever they are in the state of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import optax

State = TypeVar("State")


def nodes(tree: Any, *types: type) -> list[Any]:
    """The nodes of some types in a tree, in its order."""
    wanted = lambda x: isinstance(x, types)
    # Without paths: they cost five times as much, and dispatch asks on every step.
    return list(filter(wanted, jax.tree.leaves(tree, is_leaf=wanted)))


def paths(tree: Any, *types: type) -> list[str]:
    """The paths of these nodes."""
    wanted = lambda x: isinstance(x, types)
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=wanted)[0]
    return [jax.tree_util.keystr(path) for path, x in found if wanted(x)]


def the_state(kind: type[State], method: str, opt_state: Any, example: str) -> State:
    """The one state of a type in a tree, holding arrays."""
    found = nodes(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"Expected one state of {method}, found {len(found)}; pass the opt_state of"
            f" an optimizer that has one, such as {example}."
        )
    return without_variables(found[0])


def without_variables(tree: Any) -> Any:
    """The tree with NNX variables replaced by the arrays that they hold."""
    is_variable = lambda x: hasattr(x, "get_value") and not isinstance(x, jax.Array)
    # One may hold a placeholder of optax.masked, which has no leaves.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    value = lambda x: jax.tree.leaves(x, is_leaf=is_masked)[0]
    return jax.tree.map(
        lambda x: value(x) if is_variable(x) else x, tree, is_leaf=is_variable
    )


def with_dicts(tree: Any) -> Any:
    """The tree with mappings of other kinds (``nnx.State``) replaced by dicts."""
    is_other = lambda x: isinstance(x, Mapping) and not isinstance(x, dict)
    return jax.tree.map(
        lambda x: {k: with_dicts(v) for k, v in x.items()} if is_other(x) else x,
        tree,
        is_leaf=is_other,
    )
