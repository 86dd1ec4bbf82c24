"""What a rule is, and the two functions that most rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optax_sam.step import Step


class When(NamedTuple):
    """A rule that decides on which steps the second gradient is taken.

    Attributes:
      init: ``init(params) -> state``.
      now: ``now(state, g, step) -> (decision, state)`` for this step. A Python bool
        compiles no conditional. It sees every gradient, also those that are not
        finite, and what it stores of one must go through ``step.mean``.
      observe: ``observe(state, g, g_s, step) -> state``, called on ascended steps
        whose gradients are finite. What it stores of a gradient must go through
        ``step.mean``.
      advance: ``advance(state, ascended) -> state``, called at the end of every
        step; ``ascended`` says what was decided, also where ``ascend=`` overruled.
    """

    init: Callable[[Any], Any]
    now: Callable[[Any, Any, Step], tuple[bool | jax.Array, Any]]
    observe: Callable[[Any, Any, Any, Step], Any]
    advance: Callable[[Any, jax.Array], Any]


def refreshed(state: Any, moved: Any) -> Any:
    """A state with the settings of another, those of the rule as it is now.

    A state made under other settings keeps its clock and its decision, and takes the
    settings of the rule that goes on with it. What of it are settings, its class says.
    """
    if hasattr(state, "rule"):
        return state._replace(rule=refreshed(state.rule, moved.rule))
    names = getattr(state, "settings", ())
    return state._replace(**{name: getattr(moved, name) for name in names})


def kept(state: Any, g: Any, step: Step) -> tuple[jax.Array, Any]:
    """The decision that the state has kept from the step before."""
    del g, step
    return state.ascends, state


def unmoved(state: Any, ascended: jax.Array) -> Any:
    """Nothing changes at the end of a step."""
    del ascended
    return state


def unobserved(state: Any, g: Any, g_s: Any, step: Step) -> Any:
    """Nothing is learnt from the gradients."""
    del g, g_s, step
    return state
