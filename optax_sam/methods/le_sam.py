"""LE-SAM: a budget for the loss instead of a radius (Wang et al., arXiv 2605.10183)."""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Step, offset_rule
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import EPS, norm, rescale


def loss_budget(
    sigma: optax.ScalarOrSchedule, max_rho: optax.ScalarOrSchedule = 0.5
) -> optax.GradientTransformationExtraArgs:
    r"""The ascent of :func:`optax_sam.le_sam`: the radius follows the gradient norm.

    Args:
      sigma: how much the loss should rise along the gradient, at least 0, or a
        schedule. The authors let it fall to zero along a cosine in the last epochs.
      max_rho: the largest radius, at least 0, or a schedule. It is the radius for
        gradients shorter than ``sigma / max_rho``, as in SAM.

    Returns:
      A transformation from a gradient to an offset; a zero gradient gives a zero
      offset.

    Raises:
      ValueError: if ``sigma`` or ``max_rho`` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.loss_budget(1.0)
      >>> g = jnp.array([3.0, 4.0])
      >>> e, _ = rule.update(g, rule.init(g))
      >>> print(e, e @ g)
      [0.12       0.16000001] 1.0
    """
    sigma = check_schedule("sigma", sigma, 0.0)
    max_rho = check_schedule("max_rho", max_rho, 0.0)

    def offset(g: Any, params: Any, step: Step) -> Any:
        length = norm(g)
        budget, limit = at(sigma, step.count), at(max_rho, step.count)
        return rescale(g, length, jnp.minimum(budget / (length + EPS), limit))

    return offset_rule(offset)


@method(loss_budget)
def le_sam(
    sigma: optax.ScalarOrSchedule = 0.05,
    *,
    max_rho: optax.ScalarOrSchedule = 0.5,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""LE-SAM: perturbs until the loss has risen by a given amount, to first order.

    .. math::
      \rho_t = \min\Big(\frac{\sigma}{\|g\|},\, \rho_{\max}\Big), \qquad
      d = \nabla L\Big(w + \rho_t\, \frac{g}{\|g\|}\Big)

    To first order the loss rises by :math:`\rho_t \|g\| = \sigma`, whatever the
    gradient's norm is. Curvature adds to the rise. For short gradients the radius is at
    its cap, and the method is SAM with ``rho=max_rho``.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Examples:
      >>> import optax, optax_sam
      >>> fall = optax.cosine_decay_schedule(0.05, decay_steps=1000)
      >>> tx = optax.chain(optax_sam.le_sam(sigma=fall), optax.sgd(0.1))

    Differs from the authors' code in:
      1. Their code was announced only: the formula is the paper's, and the defaults are
         ours. At a gradient of norm 1 the radius is SAM's default.

    References:
      Wang et al., `Fix the Loss, Not the Radius: Rethinking the Adversarial
      Perturbation of Sharpness-Aware Minimization
      <https://arxiv.org/abs/2605.10183>`_, 2026
    """
    return on_engine("le_sam", options, ascent=loss_budget(sigma, max_rho))
