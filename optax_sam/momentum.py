"""Where an optimizer keeps its momentum.

At evaluation only the state is available, so the search uses the state alone. It looks
for subtrees like the parameters, by the names of their fields. ``probe.py`` then runs
the optimizer to see whether such a subtree is a momentum.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax

# Fields that hold a first moment, in Optax and in the code of others.
_NAMES = (
    *("mu", "m", "m1", "trace", "ema", "exp_avg", "mom", "momentum", "momenta"),
    *("momentum_buffer", "velocity", "moment1", "first_moment"),
)
# Fields of a second momentum; and of a mean that belongs to a variance.
_ALSO = (("ScaleByAdemamixState", "m2"),)
_NOT = (("ScaleByRStdDevState", "mu"), ("ScaleByRStdDevWithCountState", "mu"))

PLAIN = "optax_sam.msam(optax.sgd(0.1, momentum=0.9), rho=3.0)"
OTHERWISE = (
    "A transformation before the optimizer needs no momentum:"
    " optax.chain(optax_sam.sam(0.05), optimizer)."
)
FREEZE = (
    "To freeze leaves, write optax.chain(optax.masked(optax.set_to_zero(), frozen),"
    " optax_sam.msam(optax.sgd(0.1, momentum=0.9)))."
)


class Momentum(NamedTuple):
    """A subtree of an optimizer's state that is like some or all parameters.

    Attributes:
      label: its name in errors, such as ``TraceState.trace``.
      named: whether its field has the name of a first moment.
      where: maps the index of a parameter's leaf to the index of the state's leaf.
    """

    label: str
    named: bool
    where: dict[int, int]


def take(state: Any, where: tuple[int, ...], params: Any) -> Any:
    """The momentum, in the structure of the parameters."""
    leaves = jax.tree.leaves(state)
    return jax.tree.unflatten(jax.tree.structure(params), [leaves[i] for i in where])


def locate(state: Any, params: Any) -> tuple[int, ...]:
    """The leaves of the momentum in an optimizer's state, in the order of ``params``.

    Raises:
      ValueError: if some parameter has no momentum or several, with a remedy.
    """
    where = {i: j for part in parts(state, params) for i, j in part.where.items()}
    return tuple(where[i] for i in range(len(where)))


def parts(state: Any, params: Any) -> list[Momentum]:
    """The momentum: one subtree, or one for each part of ``optax.partition``.

    Raises:
      ValueError: if some parameter has no momentum or several, with a remedy.
    """
    if not jax.tree.leaves(params):
        return []
    found, others = _subtrees(state, params)
    chosen = [m for m in found if m.named] or found
    covers = collections.Counter(i for m in chosen for i in m.where)
    several = max(covers.values(), default=0) > 1
    if not chosen or (several and not chosen[0].named):
        _refuse_none(state, found, others)
    if several:
        _refuse_several(chosen)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    without = [jax.tree_util.keystr(x) for i, x in enumerate(paths) if i not in covers]
    if without:
        raise ValueError(
            "msam needs a momentum of all parameters, but the inner optimizer keeps"
            f" none for {and_more(without)}: optax.masked or optax.partition keeps"
            f" these leaves from {labels(chosen)}. Give each part of an"
            f" optax.partition a momentum. {FREEZE}"
        )
    return chosen


def _subtrees(state: Any, params: Any) -> tuple[list[Momentum], list[str]]:
    """Subtrees like the parameters; and those that have only the name of a momentum."""
    leaves, structure = jax.tree.flatten(state)
    numbered = jax.tree.unflatten(
        jax.tree.structure(params), range(len(jax.tree.leaves(params)))
    )
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    found: list[Momentum] = []
    others: list[str] = []

    def cover(node: Any) -> dict[int, int]:
        """The leaves of the parameters that a node matches, if it is like them."""
        mine, kind = jax.tree.flatten(node, is_leaf=is_masked)
        try:
            theirs = kind.flatten_up_to(numbered)  # type: ignore[attr-defined]
        except (ValueError, TypeError):
            return {}
        pairs = [(i, j) for i, j in zip(theirs, mine, strict=True) if not is_masked(j)]
        for i, j in pairs:
            if not isinstance(i, int) or jnp.shape(leaves[j]) != shapes[i]:
                return {}
            if not jnp.issubdtype(jnp.result_type(leaves[j]), jnp.inexact):
                return {}
        return dict(pairs)

    def visit(node: Any, label: str, named: bool) -> None:
        if where := cover(node):
            found.append(Momentum(label, named, where))
            return
        if named and not is_masked(node) and jax.tree.leaves(node):
            others.append(label)
        children, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        for path, child in children:
            if not path:  # a leaf
                return
            name = getattr(path[0], "name", getattr(path[0], "key", None))
            owner = type(node).__name__
            own = isinstance(name, str) and not isinstance(node, dict)
            if name in ("hyperparams", "hyperparams_states"):
                continue  # inject_hyperparams: one may be called momentum
            pair = (owner, name)
            visit(
                child,
                f"{owner}.{name}" if own else f"{label}{jax.tree_util.keystr(path)}",
                pair in _ALSO or (str(name).lower() in _NAMES and pair not in _NOT),
            )

    visit(jax.tree.unflatten(structure, range(len(leaves))), "its state", False)
    return found, others


# Errors.


def labels(momenta: list[Momentum]) -> str:
    """Their names, for errors."""
    return ", ".join(m.label for m in momenta)


def and_more(names: list[str]) -> str:
    """Three names, and how many there are beside them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))


# Optimizers that keep no momentum of the weights, and what to write instead.
_REMEDIES = {
    "ScheduleFreeState": (
        "optax.contrib.schedule_free keeps iterates (ScheduleFreeState.z) in its place."
        " Write optax.chain(optax_sam.sam(0.05), optax.contrib.schedule_free_sgd(0.1)),"
        " or schedule_free_adamw."
    ),
    "LookaheadState": (
        "optax.lookahead (LookaheadState) mixes the weights with slow ones, which would"
        f" not know of the perturbation. {OTHERWISE}"
    ),
    "GaLoreState": (
        "optax.contrib.galore (GaLoreState) keeps a momentum of projected gradients."
        f" {OTHERWISE}"
    ),
}


def _special(state: Any) -> str:
    """What to write instead of an optimizer with such a state, if it is a known one."""
    is_kind = lambda x: type(x).__name__ in _REMEDIES
    found = filter(is_kind, jax.tree.leaves(state, is_leaf=is_kind))
    return next((_REMEDIES[type(x).__name__] for x in found), "")


def remedy(state: Any) -> str:
    """What to write instead of an optimizer with such a state."""
    return _special(state) or f"Write for instance {PLAIN}. {OTHERWISE}"


def _refuse_none(state: Any, found: list[Momentum], others: list[str]) -> NoReturn:
    why = ""
    if others and not _special(state):
        why = (
            f" like the parameters: {', '.join(others)} is kept in another structure or"
            " in other shapes. Leave out what reshapes, such as optax.flatten"
        )
    elif found and not _special(state):
        why = (
            f" that it can tell from {labels(found)}. Keep your momentum in a"
            " field called mu, m, trace, ema, exp_avg, momentum or velocity"
        )
    raise ValueError(
        "msam needs a momentum to perturb along, but the inner optimizer keeps none"
        f"{why}. {remedy(state)}"
    )


def _refuse_several(chosen: list[Momentum]) -> NoReturn:
    advice = "Leave one of them."
    if any(m.label.startswith("ScaleByAdemamixState") for m in chosen):
        advice = (
            "AdEMAMix steps along both; its simplified form keeps one:"
            " optax_sam.msam(optax.contrib.simplified_ademamix(learning_rate))."
        )
    raise ValueError(
        "msam needs one momentum to perturb along, but the inner optimizer keeps"
        f" several: {labels(chosen)}. {advice} {OTHERWISE}"
    )
