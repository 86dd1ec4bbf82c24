"""Readers of an optimizer's state: decisions, plans, metrics; and of a factory.

They find sharpness-aware transformations by the type of their state. The state may be
in a chain, under ``inject_hyperparams``, ``MultiSteps`` or ``apply_if_finite``, among
NNX variables, or inside a train state.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam.engine import SharpnessAwareState
from optax_sam.parts import known_ahead, plan_of
from optax_sam.states import OURS, nodes, paths, without_variables
from optax_sam.trees import mapped


def members(tree: Any) -> list[SharpnessAwareState]:
    """The state of every transformation on the engine in a pytree."""
    return nodes(tree, SharpnessAwareState)


def _some(opt_state: Any, *types: type) -> list[Any]:
    found = nodes(opt_state, *types)
    if not found:
        raise ValueError(
            "No state of a sharpness-aware method found; pass the opt_state of an"
            " optimizer that has one, for instance"
            " optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))."
        )
    return found


def only_member(opt_state: Any) -> SharpnessAwareState:
    """The state of the one method whose decisions can be read, holding arrays."""
    found = _some(opt_state, SharpnessAwareState)
    if len(found) > 1:
        several = ", ".join(paths(opt_state, SharpnessAwareState))
        raise ValueError(
            "Several sharpness-aware transformations found, so there is no single"
            f" decision: {several}. Pass the state of one of them. If your step updates"
            " several, write jax.jit(train_step) instead of optax_sam.dispatch, or"
            " dispatch one function for each."
        )
    member = without_variables(found[0])
    if not known_ahead(member.when):
        raise ValueError(
            f"{type(member.when).__name__} decides from the next step's gradient, so"
            " nothing is known ahead. Leave the decision to the step itself"
            " (ascend=None)."
        )
    return member


def ascends_next(opt_state: optax.OptState) -> bool | jax.Array:
    """Whether the next step computes a perturbed gradient.

    Args:
      opt_state: state of an optimizer with one sharpness-aware transformation.

    Returns:
      The decision, () bool, made at the end of the step before. It is a Python ``True``
      if every step is perturbed. For a state that is stacked over seeds or devices
      there is one decision for each.

    Raises:
      ValueError: if there is no such transformation, or several, or if its rule decides
        from the next gradient.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(
      ...     optax_sam.sam(when=optax_sam.when.every_k(5, phase=1)), optax.sgd(0.1))
      >>> print(optax_sam.ascends_next(tx.init({"w": 1.0})))
      False
    """
    return only_member(opt_state).when.ascends


@functools.partial(jax.jit, static_argnums=1)
def _plan(when: Any, num_axes: int) -> tuple[jax.Array, jax.Array]:
    """The plan of a rule's state."""
    return mapped(plan_of, num_axes)(when)


def ascent_plan(opt_state: optax.OptState) -> np.ndarray:
    """The decisions for the next steps, as far as they are known already.

    It waits for the state and reads from the device once. For rules without windows 64
    steps are known. For vSAM the steps up to the next window are known, at least one;
    they depend on no future gradient.

    Args:
      opt_state: state of an optimizer with one sharpness-aware transformation.

    Returns:
      Bools on the host, (n,), the first one for the next step. For a state that is
      stacked over seeds or devices, (..., n).

    Raises:
      ValueError: as :func:`optax_sam.ascends_next`.

    Examples:
      >>> import optax_sam
      >>> method = optax_sam.sam(when=optax_sam.when.every_k(3))
      >>> print(optax_sam.ascent_plan(method.init({"w": 1.0}))[:5])
      [ True False False  True False]
    """
    member = only_member(opt_state)
    when = member.when
    if not jax.tree.leaves(when):
        decisions, known = plan_of(when)
    else:
        decisions, known = jax.device_get(_plan(when, jnp.ndim(member.count)))
    return np.asarray(decisions)[..., : int(np.min(known))]


def metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The metrics of the sharpness-aware transformations, flat, for any logger.

    With several processes call it in all of them, because it computes, and log in one.

    Args:
      opt_state: state of an optimizer with at least one sharpness-aware transformation.

    Returns:
      Scalars by name. ``ascents`` and ``rejected_ascents`` count the perturbed
      gradients so far, and those that were not finite. ``ascent_rate`` is the number
      of ascents per step. ``gradient_norm``, ``ascended_norm`` and ``survival`` (the
      share of the perturbation that survives rounding on half-precision leaves; 1 if
      there are none) describe the last perturbed step. The parts of a method add
      others (vSAM: ``samples_per_window``, ``used_in_window``, ``psf_norm``; AE-SAM:
      ``squared_norm_mean``, ``squared_norm_deviation``). MSAM has
      ``perturbation_scale`` instead, SAF ``dropped_examples``, and SAMPa only the
      rejected ascents and the norms. With several transformations the names start with
      their paths.

    Raises:
      ValueError: if there is no such transformation.

    Examples:
      >>> import optax_sam
      >>> state = optax_sam.sam(0.05).init({"w": 1.0})
      >>> int(optax_sam.metrics(state)["ascents"])
      0
    """
    measured = [kind for kind in OURS if hasattr(kind, "metrics")]
    found = _some(opt_state, *measured)
    named: dict[str, jax.Array] = {}
    for path, state in zip(paths(opt_state, *measured), found, strict=True):
        prefix = f"{path}/" if len(found) > 1 else ""
        values = without_variables(state).metrics()
        named |= {prefix + name: value for name, value in values.items()}
    return named


def static_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of a factory that ``optax.inject_hyperparams`` must not trace.

    That wrapper traces every number as a hyperparameter, and calls every function as a
    schedule. This function returns the arguments that are not annotated as a number or
    a schedule.

    Args:
      factory: a method of this library, for instance ``optax_sam.vsam``.

    Returns:
      Names for ``static_args=``.

    Examples:
      >>> import optax, optax_sam
      >>> optax_sam.static_args(optax_sam.sam)
      ('num_ascent_steps', 'when', 'mask', 'axis_name', 'ascent_dtype')
      >>> factory = optax.inject_hyperparams(
      ...     optax_sam.sam, static_args=optax_sam.static_args(optax_sam.sam))
      >>> state = factory(rho=0.05).init({"w": 1.0})
      >>> print(state.hyperparams["rho"])
      0.05
    """
    function = factory
    while isinstance(function, functools.partial):
        function = function.func
    hints = typing.get_type_hints(function)
    tunable = [
        set(typing.get_args(hint))
        for hint in (optax.ScalarOrSchedule, jax.typing.ArrayLike)
    ]

    def is_tunable(name: str) -> bool:
        # None among the types says that the argument may be left out.
        types = set(typing.get_args(hints.get(name))) - {type(None)}
        return types in tunable and name != "key"

    return tuple(
        name for name in inspect.signature(factory).parameters if not is_tunable(name)
    )
