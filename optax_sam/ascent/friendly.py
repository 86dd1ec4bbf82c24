"""Ascent along a batch's own noise, without the full gradient: the rule of F-SAM."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam.arguments import at
from optax_sam.ascent.rule import (
    ascent_rule,
    beyond_rounding,
    cache,
    norm,
    rescale,
    weighted,
)
from optax_sam.contract import check_schedule
from optax_sam.step import Step


class FriendlyState(NamedTuple):
    """State of :func:`friendly`.

    Attributes:
      average: ``m``, the average of the gradients, like the parameters, float32 or
        better.
      started: whether there was a gradient to average, () bool.
    """

    average: Any
    started: jax.Array


def friendly(
    rho: optax.ScalarOrSchedule = 0.2,
    sigma: optax.ScalarOrSchedule = 1.0,
    decay: optax.ScalarOrSchedule = 0.6,
) -> optax.GradientTransformationExtraArgs:
    r"""Ascends along the part of a gradient that its running average does not explain.

    .. math::
      a_t = g_t - \sigma\, m_{t-1}, \qquad
      m_t = \lambda\, m_{t-1} + (1 - \lambda)\, g_t, \qquad
      e = \rho\, \frac{a_t}{\|a_t\|}

    from :math:`a_0 = m_0 = g_0`. The average estimates the gradient of all examples,
    so what is left is the noise of this batch. With the engine's ``axis_name`` it is
    the average over all devices. Where nothing but rounding is left, as
    on full batches of a loss without curvature, the offset is zero.

    Args:
      rho: radius of the ball, at least 0, or a schedule.
      sigma: how much of the average is taken out, at least 0, or a schedule; 0 is the
        l2 ball.
      decay: the average's memory ``lambda`` per step, in ``[0, 1]``, or a schedule.

    Returns:
      A transformation from a gradient to an offset, with one tree like the parameters
      as state.

    Raises:
      ValueError: if ``rho`` or ``sigma`` is negative or ``decay`` is not in
        ``[0, 1]``.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.friendly(1.0)
      >>> w = jnp.zeros(2)
      >>> e, state = rule.update(jnp.array([2.0, 0.0]), rule.init(w), w)
      >>> e, state = rule.update(jnp.array([2.0, 3.0]), state, w)
      >>> print(e)
      [0. 1.]

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024; code: nblt/F-SAM
    """
    rho = check_schedule("rho", rho, 0.0)
    sigma = check_schedule("sigma", sigma, 0.0)
    decay = check_schedule("decay", decay, 0.0, 1.0)

    def init(params: Any) -> FriendlyState:
        return FriendlyState(cache(params), jnp.zeros((), bool))

    def update(
        g: Any, state: FriendlyState, params: Any, step: Step, **extra: Any
    ) -> tuple[Any, FriendlyState]:
        del params, extra
        g = optax.tree.cast_like(g, state.average)
        a = weighted(jnp.ones(()), g, -at(sigma, step.count), state.average)
        length = beyond_rounding(norm(a), norm(g))
        lam = jnp.where(state.started, at(decay, step.count), 0)
        average = weighted(lam, state.average, 1 - lam, step.mean(g))
        started = jnp.ones_like(state.started)
        return rescale(a, length, at(rho, step.count)), FriendlyState(average, started)

    return ascent_rule(update, init)
