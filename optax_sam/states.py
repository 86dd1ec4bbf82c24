"""Finds the states of our methods in an optimizer's state, and checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

State = TypeVar("State")
Class = TypeVar("Class", bound=type)

# The states of the methods, in the order in which they are defined.
OURS: list[type] = []


def registered(kind: Class) -> Class:
    """Registers a class as a state of our methods, so that readers find it."""
    OURS.append(kind)
    return kind


def nodes(tree: Any, *types: type) -> list[Any]:
    """The nodes of some types in a pytree, in its order."""
    wanted = lambda x: isinstance(x, types)
    # Without paths: they cost five times as much, and dispatch asks on every step.
    return list(filter(wanted, jax.tree.leaves(tree, is_leaf=wanted)))


def paths(tree: Any, *types: type) -> list[str]:
    """The paths of these nodes."""
    wanted = lambda x: isinstance(x, types)
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=wanted)[0]
    return [jax.tree_util.keystr(path) for path, x in found if wanted(x)]


def the_state(kind: type[State], method: str, opt_state: Any, example: str) -> State:
    """The one state of a type in a pytree, holding arrays."""
    found = nodes(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"Expected one state of {method}, found {len(found)}; pass the opt_state of"
            f" an optimizer that has one, such as {example}."
        )
    return without_variables(found[0])


def without_variables(tree: Any) -> Any:
    """The pytree with NNX variables replaced by the arrays that they hold."""
    is_variable = lambda x: hasattr(x, "get_value") and not isinstance(x, jax.Array)
    # A variable may hold a placeholder of optax.masked, which has no leaves.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    value = lambda x: jax.tree.leaves(x, is_leaf=is_masked)[0]
    return jax.tree.map(
        lambda x: value(x) if is_variable(x) else x, tree, is_leaf=is_variable
    )


def with_dicts(tree: Any) -> Any:
    """The pytree with mappings of other kinds (``nnx.State``) replaced by dicts."""
    is_other = lambda x: isinstance(x, Mapping) and not isinstance(x, dict)
    return jax.tree.map(
        lambda x: {k: with_dicts(v) for k, v in x.items()} if is_other(x) else x,
        tree,
        is_leaf=is_other,
    )


def has_placeholders(*trees: Any) -> bool:
    """Whether some leaves are hidden by optax.masked or optax.partition."""
    is_placeholder = lambda x: isinstance(x, optax.MaskedNode)
    return any(map(is_placeholder, jax.tree.leaves(trees, is_leaf=is_placeholder)))


def check_not_masked(method: str, *trees: Any, advice: str | None = None) -> None:
    """Refuses placeholders: a transformation inside optax.masked or optax.partition."""
    if has_placeholders(*trees):
        advice = advice or (
            "grad_fn would get placeholders instead of parameters. Put it outside, and"
            " say with mask= which leaves it perturbs:"
            f" optax.chain(optax_sam.{method}(..., mask=mask),"
            " optax.partition(transforms, labels))."
        )
        raise ValueError(
            f"{method} is inside optax.masked or optax.partition, where {advice}"
        )


def check_state(method: str, kind: type, state: Any, expected: Any = None) -> None:
    """Refuses the state of another optimizer, method, rule or window.

    Args:
      method: the name of the method in errors.
      kind: the type of its state.
      state: the state that ``update`` got.
      expected: the shapes of what ``init`` makes for these parameters, to compare with
        all parts of the state; ``None`` compares the type alone.
    """
    if not isinstance(state, kind):
        raise ValueError(
            f"{method} got a state of another optimizer or of another place in the"
            f" chain: {_named(state)} where it needs {kind.__name__}. A state belongs"
            " to the transformation that made it: opt_state = tx.init(params), with"
            " the same tx. Restore a checkpoint into such a state, with"
            " target=tx.init(params); without a target it becomes dicts and lists."
        )
    difference = None if expected is None else _difference(state, expected)
    if difference is not None:
        path, have, want = difference
        part = path.split(".")[1].split("[")[0]
        raise ValueError(
            f"{method} got a state that was made with other settings or for other"
            f" parameters: at state{path} it has {have}, and the current method makes"
            f" {want}. Build the method with the settings that the state was made"
            f" with, or start this part again and keep the others: state ="
            f" state._replace({part}=method.init(params).{part}), where method is this"
            " transformation and state is its part of the optimizer's state."
        )


def _named(state: Any) -> str:
    if isinstance(state, tuple) and not hasattr(state, "_fields"):
        return f"a tuple of {', '.join(type(x).__name__ for x in state) or 'nothing'}"
    return type(state).__name__


def _difference(have: Any, want: Any, path: str = "") -> tuple[str, str, str] | None:
    """Where two states first differ in type or shape: the path, and what is there."""
    if hasattr(want, "_fields"):
        if type(have) is not type(want):
            return path, type(have).__name__, type(want).__name__
        parts = [
            (f".{name}", getattr(have, name), getattr(want, name))
            for name in want._fields
        ]
    elif isinstance(want, tuple):
        if not isinstance(have, tuple) or len(have) != len(want):
            return path, _named(have), _named(want)
        parts = [
            (f"[{i}]", *pair) for i, pair in enumerate(zip(have, want, strict=True))
        ]
    else:
        # By leaves: NNX keeps a cached pytree in a different structure from parameters.
        shapes = lambda tree: list(map(jnp.shape, jax.tree.leaves(tree)))
        if shapes(have) == shapes(want):
            return None
        show = lambda tree: ", ".join(map(str, shapes(tree)[:4])) or "nothing"
        return path, f"arrays of shapes {show(have)}", f"arrays of shapes {show(want)}"
    for name, *pair in parts:
        if (found := _difference(pair[0], pair[1], path + name)) is not None:
            return found
    return None
