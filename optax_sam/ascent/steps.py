"""Several normalized ascent steps, projected onto the ball or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.parts import Step, ascent_rule
from optax_sam.schedules import at, check_integer, check_schedule
from optax_sam.trees import add, norm, rescale

# XLA's CPU backend runs backward convolutions in a loop many times slower than in the
# entry computation, so short loops are unrolled.
_UNROLL_LIMIT = 8


def n_step(
    rho: optax.ScalarOrSchedule,
    num_steps: int,
    *,
    step_size: optax.ScalarOrSchedule | None = None,
    project: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Several normalized ascent steps, kept inside the ball of radius ``rho``.

    .. math::
      \delta_0 = 0, \qquad
      \delta_{i+1} = \Pi_\rho\big(\delta_i + s\, g_i / \|g_i\|\big), \qquad
      g_i = \nabla L(w + \delta_i), \qquad e = \delta_n

    The gradient at ``w`` is given. A perturbed step costs ``n`` gradients for the ``n``
    ascent steps and 1 for the perturbed gradient.

    Args:
      rho: radius of the ball, at least 0, or a schedule.
      num_steps: number ``n`` of ascent steps, at least 1; up to 8 are unrolled,
        more run in a loop (slow for convolutions on CPU).
      step_size: length ``s`` of one step; ``None`` means ``rho``.
      project: whether to project onto the ball after each step. Without it the offset
        can reach ``n * s``, as in ``optax.contrib.sam`` with
        ``sync_period = n + 1``.

    Returns:
      A transformation from a gradient to an offset; it needs ``params`` and
      ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``step_size`` is negative, or ``num_steps`` is traced
        or below 1.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.n_step(0.1, num_steps=3)
      >>> grad_fn = jax.grad(lambda w: (w**2).sum())
      >>> w = jnp.array([3.0, 4.0])
      >>> e, _ = rule.update(grad_fn(w), rule.init(w), w, grad_fn=grad_fn)
      >>> print(jnp.linalg.norm(e))
      0.1

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2021; projected as in Andriushchenko and
      Flammarion, `Towards Understanding Sharpness-Aware Minimization
      <https://arxiv.org/abs/2206.06232>`_, 2022
    """
    rho = check_schedule("rho", rho, 0.0)
    check_integer("num_steps", num_steps, 1)
    if step_size is not None:
        step_size = check_schedule("step_size", step_size, 0.0)

    def update(g: Any, state: Any, params: Any, step: Step, /, **extra: Any) -> Any:
        radius = at(rho, step.count)
        length = radius if step_size is None else at(step_size, step.count)

        def climb(delta: Any, g: Any) -> Any:
            delta = add(delta, rescale(g, norm(g), length))
            if not project:
                return delta
            size = norm(delta)
            return jax.tree.map(
                lambda x, inner: jnp.where(size > radius, x, inner),
                rescale(delta, size, radius),
                delta,
            )

        # The first step starts at the centre of the ball, so it needs a projection
        # only if it is longer than the radius.
        delta = rescale(g, norm(g), jnp.minimum(length, radius) if project else length)
        again = lambda _, delta: climb(delta, extra["grad_fn"](add(params, delta)))
        return repeated(again, num_steps, delta), state

    return ascent_rule(update, needs=("params", "grad_fn"))


def repeated(step: Callable[[Any, Any], Any], num_steps: int, delta: Any) -> Any:
    """The offset after all steps; ``delta`` is the offset after the first one."""
    if num_steps > _UNROLL_LIMIT:
        return jax.lax.fori_loop(1, num_steps, step, delta)
    for i in range(1, num_steps):
        delta = step(i, delta)
    return delta
