"""VaSSO: perturbs along an average gradient (Li and Giannakis, arXiv 2309.15639)."""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from optax_sam.method import Options, method, on_engine
from optax_sam.methods.friendly_sam import FriendlyState, begun
from optax_sam.parts import Step, ascent_rule
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import norm, rescale, weighted


def averaged(
    rho: optax.ScalarOrSchedule, theta: optax.ScalarOrSchedule = 0.9
) -> optax.GradientTransformationExtraArgs:
    """The ascent of :func:`optax_sam.vasso`: along an average of the gradients.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      theta: weight of a new gradient in the average, in ``[0, 1]``, or a schedule; 1
        is the l2 ball. The authors' runs have 0.4 to 0.9.

    Returns:
      A transformation from a gradient to an offset of norm ``rho``, with one pytree
      like the parameters as state. 1e-7 is added to the norm of the average.

    Raises:
      ValueError: if ``rho`` is negative or ``theta`` is not in ``[0, 1]``.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.averaged(1.0, theta=0.5)
      >>> w = jnp.zeros(2)
      >>> e, state = rule.update(jnp.array([3.0, 0.0]), rule.init(w), w)
      >>> e, state = rule.update(jnp.array([3.0, 8.0]), state, w)
      >>> print(e)
      [0.6 0.8]
    """
    rho = check_schedule("rho", rho, 0.0)
    theta = check_schedule("theta", theta, 0.0, 1.0)

    def update(g: Any, state: Any, params: Any, step: Step, /, **extra: Any) -> Any:
        g = optax.tree.cast_like(g, state.average)
        weight = jnp.where(state.started, at(theta, step.count), 1)
        m = weighted(1 - weight, state.average, weight, g)
        started = jnp.ones_like(state.started)
        e = rescale(m, norm(m), at(rho, step.count), eps=1e-7)
        return e, FriendlyState(step.mean(m), started)

    return ascent_rule(update, begun)


@method(averaged)
def vasso(
    rho: optax.ScalarOrSchedule = 0.1,
    *,
    theta: optax.ScalarOrSchedule = 0.9,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: perturbs along an average of the gradients, which varies less.

    .. math::
      m_t = (1 - \theta)\, m_{t-1} + \theta\, g_t, \qquad
      d = \nabla L\Big(w + \rho\, \frac{m_t}{\|m_t\|}\Big)

    from :math:`m_0 = g_0`, so the first step is SAM's. ``theta=1`` is SAM.
    :func:`optax_sam.friendly_sam` subtracts such an average from the gradient instead.
    If ``when`` skips steps, the average is over the gradients of the perturbed steps.

    Cost: 2 gradients per perturbed step, 1 on others; one pytree like the parameters
    and a few scalars of state.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.vasso(rho=0.1), optax.sgd(0.1))

    Differs from the authors' code in:
      1. With ``axis_name`` each device adds its own gradient to the shared average, and
         perturbs along the result; the state keeps the mean over the devices.

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023; code: BingcongLi/VaSSO
    """
    return on_engine("vasso", options, ascent=averaged(rho, theta))
