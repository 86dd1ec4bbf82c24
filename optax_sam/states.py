"""States found by their type, wherever they are in the state of an optimizer."""

from __future__ import annotations

from typing import Any

import jax


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
