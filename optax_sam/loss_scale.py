"""Loss scaling that depends on both gradients of a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam.axes import mapped_axes, on_device
from optax_sam.engine import SharpnessAwareState
from optax_sam.methods.sampa import SAMPaState
from optax_sam.schedules import check_number
from optax_sam.states import nodes, without_variables


def update_loss_scale(
    loss_scale: Any,
    grads: Any,
    before: optax.OptState,
    after: optax.OptState,
    *,
    axis_name: Any = None,
) -> tuple[Any, jax.Array]:
    """The loss scale after a step, and whether both gradients were finite.

    The optimizer rejects a perturbed gradient that overflows. Only the count of
    rejected gradients shows this. The scaling object sees the gradient at ``w`` alone,
    so it would keep a scale that is too high for SAM. If the second result is false,
    skip the step, as always with loss scaling.

    Args:
      loss_scale: the object that :func:`optax_sam.value_and_grad` got, such as Flax's
        ``DynamicScale``. Its rule decides how the scale moves.
      grads: the gradient at ``w``, unscaled, before the optimizer saw it.
      before: the state of the optimizer before the step.
      after: the state of the optimizer after it.
      axis_name: the mapped axis, if ``grads`` are not yet averaged over it
        (m-sharpness): all devices then decide together.

    Returns:
      ``(loss_scale, finite)``: the object for the next step, and () bool.

    Raises:
      ValueError: if ``loss_scale`` has no rule for moving, or if the two states have
        different numbers of sharpness-aware transformations.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> from flax.training.dynamic_scale import DynamicScale
      >>> tx = optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))
      >>> loss_fn = lambda w, x: jnp.sum((w.astype(jnp.float16) * x) ** 2)
      >>> @jax.jit
      ... def train_step(w, opt_state, loss_scale, x):
      ...     value_and_grad = optax_sam.value_and_grad(loss_fn, loss_scale=loss_scale)
      ...     loss, grads, grad_fn = value_and_grad(w, x)
      ...     updates, after = tx.update(grads, opt_state, w, grad_fn=grad_fn)
      ...     loss_scale, finite = optax_sam.update_loss_scale(
      ...         loss_scale, grads, opt_state, after)
      ...     new = optax.apply_updates(w, updates), after
      ...     w, opt_state = optax.tree.where(finite, new, (w, opt_state))
      ...     return w, opt_state, loss_scale, finite
      >>> w, loss_scale = jnp.ones(2), DynamicScale(scale=2.0**15)
      >>> w, opt_state, loss_scale, finite = train_step(
      ...     w, tx.init(w), loss_scale, jnp.float16(1.0))
      >>> print(w, loss_scale.scale, finite)
      [1. 1.] 16384.0 False
    """
    if not hasattr(loss_scale, "value_and_grad"):
        raise ValueError(
            "update_loss_scale moves the scale by the rule of its object: give it a"
            " flax.training.dynamic_scale.DynamicScale(). A number has no rule; got"
            f" {loss_scale!r}."
        )
    check_loss_scale(loss_scale)
    rejected, more = (_rejected(state) for state in (before, after))
    if len(rejected) != len(more):
        raise ValueError(
            "before and after must be states of one optimizer, before and after its"
            f" update; they hold {len(rejected)} and {len(more)} sharpness-aware"
            " transformations."
        )
    leaves = [jnp.asarray(g) for g in jax.tree.leaves(grads)]
    failed = [jnp.any(~jnp.isfinite(g)) for g in leaves]
    failed += [jnp.any(x != y) for x, y in zip(rejected, more, strict=True)]
    finite = ~jnp.any(jnp.stack(failed)) if failed else jnp.array(True)
    axes = mapped_axes(axis_name)
    if axes.names:
        flag = on_device(finite.astype(jnp.int32), axes)
        finite = jax.lax.pmin(flag, axes.names).astype(bool)
    # The object looks at a gradient that is made here: 1 or not a number.
    factor = jnp.where(finite, 1.0, jnp.nan)
    found = loss_scale.value_and_grad(lambda x: x * factor)(jnp.ones(()))
    return found.dynamic_scale, finite


def _rejected(opt_state: Any) -> list[Any]:
    states = nodes(opt_state, SharpnessAwareState, SAMPaState)
    return [without_variables(state).num_rejected for state in states]


def check_loss_scale(loss_scale: Any) -> None:
    """Raises unless there is a scale in it."""
    scale = getattr(loss_scale, "scale", loss_scale)
    is_number = isinstance(scale, (int, float, np.number, np.ndarray, jax.Array))
    if not is_number or isinstance(scale, bool) or jnp.shape(scale) != ():
        raise ValueError(
            "loss_scale must be a number > 0, a scalar array, or an object with such a"
            " scale, such as flax.training.dynamic_scale.DynamicScale; got"
            f" {loss_scale!r}."
        )
    check_number("loss_scale", scale, 0.0, open_low=True)


def scale_of(loss_scale: Any) -> jax.Array:
    """The factor itself."""
    return jnp.asarray(getattr(loss_scale, "scale", loss_scale))
