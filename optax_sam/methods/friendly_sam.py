"""F-SAM: friendly SAM (Li et al., arXiv 2403.12350, CVPR 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Step, ascent_rule
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import beyond_rounding, cache, norm, rescale, weighted


class FriendlyState(NamedTuple):
    """State of :func:`friendly`, and of :func:`averaged`.

    Attributes:
      average: ``m``, the average of the gradients, like the parameters, float32 or
        better.
      started: whether there was a gradient to average, () bool.
    """

    average: Any
    started: jax.Array


def begun(params: Any) -> FriendlyState:
    """The state before the first gradient."""
    return FriendlyState(cache(params), jnp.zeros((), bool))


def friendly(
    rho: optax.ScalarOrSchedule = 0.2,
    sigma: optax.ScalarOrSchedule = 1.0,
    decay: optax.ScalarOrSchedule = 0.6,
) -> optax.GradientTransformationExtraArgs:
    """The ascent of :func:`optax_sam.friendly_sam`: ``g`` minus its running average.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      sigma: share of the average that is subtracted, at least 0, or a schedule; 0 is
        the l2 ball.
      decay: the average's memory ``lambda`` per perturbed step, in ``[0, 1]``, or a
        schedule. The authors' runs have 0.6 to 0.95.

    Returns:
      A transformation from a gradient to an offset, with one pytree like the parameters
      as state. If only rounding errors remain, as on full batches of a loss without
      curvature, the offset is zero.

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
    """
    rho = check_schedule("rho", rho, 0.0)
    sigma = check_schedule("sigma", sigma, 0.0)
    decay = check_schedule("decay", decay, 0.0, 1.0)

    def update(g: Any, state: Any, params: Any, step: Step, /, **extra: Any) -> Any:
        g = optax.tree.cast_like(g, state.average)
        a = weighted(jnp.ones(()), g, -at(sigma, step.count), state.average)
        length = beyond_rounding(norm(a), norm(g))
        lam = jnp.where(state.started, at(decay, step.count), 0)
        average = weighted(lam, state.average, 1 - lam, step.mean(g))
        started = jnp.ones_like(state.started)
        return rescale(a, length, at(rho, step.count)), FriendlyState(average, started)

    return ascent_rule(update, begun)


@method(friendly)
def friendly_sam(
    rho: optax.ScalarOrSchedule = 0.2,
    *,
    sigma: optax.ScalarOrSchedule = 1.0,
    decay: optax.ScalarOrSchedule = 0.6,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""F-SAM: perturbs along the batch's noise, without the full gradient.

    .. math::
      a_t = g_t - \sigma\, m_{t-1}, \qquad
      m_t = \lambda\, m_{t-1} + (1 - \lambda)\, g_t, \qquad
      d = \nabla L\Big(w + \rho\, \frac{a_t}{\|a_t\|}\Big)

    from :math:`a_0 = m_0 = g_0`, so the first step is SAM's. The average
    :math:`m` estimates the gradient of all examples. ``sigma=0`` is SAM. If
    ``when`` skips steps, the average is over the gradients of the perturbed steps.

    Cost: 2 gradients per perturbed step, 1 on others; one pytree like the parameters
    and a few scalars of state.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.friendly_sam(rho=0.2), optax.sgd(0.1))

    Differs from the authors' code in:
      1. If the subtraction leaves only rounding errors, the offset is zero; there they
         are scaled up to the length ``rho``.
      2. Their paper updates the average before it subtracts it; their code updates it
         after, as here. For ``sigma=1`` both give the same direction.
      3. With ``axis_name`` the gradients of all devices are averaged.

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024; code: nblt/F-SAM
    """
    return on_engine("friendly_sam", options, ascent=friendly(rho, sigma, decay))
