"""The parts of a method, what they know of a step, and what they may store.

A method on the engine has three parts: an ascent, which is an ordinary
``optax.GradientTransformationExtraArgs`` (:func:`ascent_rule` makes one), a
:class:`When` and a :class:`Blend`. A fourth, :class:`Descent`, is the same for nearly
all methods.

**The state of a part** is a pytree of arrays, a named tuple as a rule. It may offer:

- ``metrics()``: scalars by name, which :func:`optax_sam.metrics` adds to the engine's
  scalars;
- ``ascends`` (for a when): whether the next step is perturbed, () bool, decided at the
  end of the step before. Without it nothing is known ahead;
- ``plan()`` (for a when with ``ascends``): the decisions of the next steps and the
  number of them that are known, ``(decisions, known)``;
- ``settings`` (for a when): the names of the fields that ``advance`` rewrites from the
  current rule, so that a state made under other settings takes the current ones;
- ``rule`` (for a when that contains another rule): the state of that rule.

The engine looks for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam.checks import check_grad_fn
from optax_sam.keys import draw

# How many decisions of a rule without windows are read ahead at once.
LOOKAHEAD = 64


class Step(NamedTuple):
    """The current step, as the engine shows it to ascents, whens and blends.

    Attributes:
      count: number of steps taken before this one, () int32; schedules are read here.
        ``None`` for a part that is used alone and needs no count.
      mean: averages a pytree over the devices of ``axis_name``; without that axis the
        identity. Everything that a part stores from a gradient must go through it, so
        that all devices store the same.
      device: the number of this device, () int32, or ``None`` if there is one only. A
        shard of :func:`optax_sam.micro_sharpness` counts as a device.
    """

    count: Any = None  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    mean: Callable[[Any], Any] = lambda tree: tree
    device: Any = None

    def key(self, raw: jax.Array) -> jax.Array:
        """The generator of this step, equal on all devices: a function, not a state.

        Args:
          raw: raw key data, (2,) uint32.

        Returns:
          A typed key.
        """
        return draw(raw, self.count)

    def device_key(self, raw: jax.Array) -> jax.Array:
        """The generator of this step on this device.

        Args:
          raw: raw key data, (2,) uint32.

        Returns:
          A typed key; on a single device :meth:`key` itself.
        """
        key = self.key(raw)
        return key if self.device is None else jax.random.fold_in(key, self.device)


class OwnGradient(NamedTuple):
    """The result of an ascent that computes another gradient than the one at ``w``.

    The gradient at ``w`` is then not used on perturbed steps, and XLA drops its
    computation. In an ``optax.chain``, the transformations after such an ascent change
    the gradient too.

    Attributes:
      offset: the offset ``e``.
      gradient: the gradient to use in place of the gradient at ``w``.
    """

    offset: Any
    gradient: Any


class AscentRule(optax.GradientTransformationExtraArgs):
    """An ascent that gets ``step``, and averages what it stores by ``step.mean``.

    The engine averages the state of any other transformation over the devices.
    """


def ascent_rule(
    update: Callable[..., tuple[Any, Any]],
    init: Callable[[Any], Any] = optax.init_empty_state,
    *,
    needs: tuple[str, ...] = (),
) -> AscentRule:
    """An ascent from ``update(g, state, params, step, **extra) -> (e, state)``.

    The engine passes ``step``. If you use the ascent alone, pass ``count`` instead.

    Args:
      update: the rule.
      init: makes the state of the rule from the parameters.
      needs: the arguments among ``params`` and ``grad_fn`` that the rule needs.
    """

    def transform(
        g: Any,
        state: Any,
        params: Any = None,
        /,
        *,
        step: Step | None = None,
        count: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        given = {"params": params, **extra}
        if any(given.get(name) is None for name in needs):
            call = ["params", *(f"{x}={x}" for x in needs if x != "params")]
            raise ValueError(
                f"This ascent needs {' and '.join(needs)}:"
                f" rule.update(g, state, {', '.join(call)}, count=count)."
            )
        return update(g, state, params, step or Step(count), **extra)

    return AscentRule(init, transform)


def offset_rule(
    offset: Callable[[Any, Any, Step], Any], *, needs: tuple[str, ...] = ()
) -> AscentRule:
    """An ascent without a state, from ``offset(g, params, step) -> e``."""
    return ascent_rule(
        lambda g, state, params, step, /, **extra: (offset(g, params, step), state),
        needs=needs,
    )


def _kept(state: Any, g: Any, step: Step) -> tuple[Any, Any]:
    del g, step
    return state.ascends, state


class When(NamedTuple):
    """A rule that decides on which steps to compute the perturbed gradient.

    The defaults fit a rule that keeps its decision in the state and looks at no
    gradient.

    Attributes:
      init: ``init(params) -> state``.
      now: ``now(state, g, step) -> (decision, state)`` for this step. A Python bool
        compiles no conditional. The rule sees every gradient, finite or not. Everything
        that it stores or decides from a gradient must go through ``step.mean``.
      observe: ``observe(state, g, g_s, step) -> state``, called on perturbed steps
        whose gradients are finite. Everything that it stores from a gradient must go
        through ``step.mean``.
      advance: ``advance(state, ascended) -> state``, called at the end of every
        step; ``ascended`` is the decision, also if ``ascend=`` overruled the rule.
      call: the text that shows the rule.
    """

    init: Callable[[Any], Any]
    now: Callable[[Any, Any, Step], tuple[bool | jax.Array, Any]] = _kept
    observe: Callable[[Any, Any, Any, Step], Any] = lambda state, g, g_s, step: state
    advance: Callable[[Any, jax.Array], Any] = lambda state, ascended: state
    call: str = "when.When(...)"

    def __repr__(self) -> str:
        return self.call


class AlwaysState(NamedTuple):
    """Nothing to remember."""

    @property
    def ascends(self) -> bool:
        """Every step is perturbed."""
        return True

    def plan(self) -> tuple[np.ndarray, int]:
        """Only perturbed steps, without reading from the device."""
        return np.ones(LOOKAHEAD, bool), LOOKAHEAD


def always() -> When:
    """On every step; no conditional is compiled.

    Returns:
      A rule for ``when=``.

    Examples:
      >>> import optax_sam
      >>> tx = optax_sam.sam(0.05, when=optax_sam.when.always())
    """
    return When(lambda params: AlwaysState(), call="when.always()")


def take_perturbed(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
    """The perturbed gradient, as in SAM."""
    del g, step
    return g_s, state


class Blend(NamedTuple):
    """A rule that makes one gradient out of two, or out of one and a state.

    The defaults are SAM's: the perturbed gradient if there is one, else the gradient
    at ``w``, and no state.

    Attributes:
      init: ``init(params) -> state``.
      fresh: ``fresh(g, g_s, state, step) -> (d, state)`` on perturbed steps.
        Everything that it stores from a gradient must go through ``step.mean``.
      stale: ``stale(g, state, step) -> (d, state)`` on the other steps, and if a
        perturbed gradient was not finite.
      call: the text that shows the rule.
    """

    init: Callable[[Any], Any] = optax.init_empty_state
    fresh: Callable[[Any, Any, Any, Step], tuple[Any, Any]] = take_perturbed
    stale: Callable[[Any, Any, Step], tuple[Any, Any]] = lambda g, state, step: (
        g,
        state,
    )
    call: str = "blend.Blend(...)"

    def __repr__(self) -> str:
        return self.call


class Call(NamedTuple):
    """One call of ``update``, as the stages of the engine see it.

    Attributes:
      g: the gradient at ``w``.
      params: the parameters that have a gradient.
      whole: adds the other leaves, which have no gradient, to a point.
      step: the current step.
      taken: ``taken(function, point)`` is the gradient that a function returns at a
        point. It rounds the point to ``ascent_dtype`` and checks the gradient.
      grad_fn: the caller's function.
      extra: the caller's other extra arguments.
    """

    g: Any
    params: Any
    whole: Callable[[Any], Any]
    step: Step
    taken: Callable[[Callable[[Any], Any], Any], Any]
    grad_fn: Callable[[Any], Any] | None
    extra: dict[str, Any]

    def gradient(self, point: Any) -> Any:
        """The gradient of this step's batch at a point."""
        grad_fn = self.grad_fn
        assert grad_fn is not None  # the descent has checked it
        return self.taken(lambda p: grad_fn(self.whole(p)), point)


class Descent(NamedTuple):
    """The gradient to use as the perturbed one, at the perturbed weights.

    Attributes:
      gradient: ``gradient(w_e, call) -> g_s``; the gradient of the batch, unless a
        method computes it on some examples (ESAM) or combines several (GAM).
      check: ``check(method, grad_fn, extra)`` raises unless ``update`` got what
        ``gradient`` needs.
    """

    gradient: Callable[[Any, Call], Any] = lambda w_e, call: call.gradient(w_e)
    check: Callable[[str, Any, dict[str, Any]], None] = lambda method, grad_fn, extra: (
        check_grad_fn(method, grad_fn)
    )


def refreshed(state: Any, moved: Any) -> Any:
    """A state with the ``settings`` of another one, made by the current rule.

    A state made under other settings keeps its clock and its decision.
    """
    new = {name: getattr(moved, name) for name in getattr(state, "settings", ())}
    if hasattr(state, "rule"):
        new["rule"] = refreshed(state.rule, moved.rule)
    return state._replace(**new)


def metrics_of(*states: Any) -> dict[str, jax.Array]:
    """The ``metrics()`` of the states of some parts, together."""
    values: dict[str, jax.Array] = {}
    for state in states:
        values |= state.metrics() if hasattr(state, "metrics") else {}
    return values


def known_ahead(state: Any) -> bool:
    """Whether a when's state holds the next step's decision."""
    return hasattr(state, "ascends")


def plan_of(state: Any) -> tuple[Any, Any]:
    """The ``plan()`` of a when's state; without a plan, its decision alone."""
    if hasattr(state, "plan"):
        return state.plan()
    return jnp.reshape(state.ascends, 1), 1
