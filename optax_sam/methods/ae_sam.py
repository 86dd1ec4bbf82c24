"""AE-SAM: an adaptive policy to employ SAM (Jiang et al., arXiv 2304.14647)."""

from __future__ import annotations

from typing import Unpack

import optax
from jax.typing import ArrayLike

from optax_sam.ascent.ball import l2
from optax_sam.method import WithoutWhen, method, on_engine
from optax_sam.when.trend import norm_above_trend


@method(l2, norm_above_trend)
def ae_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    decay: ArrayLike = 0.9,
    threshold: optax.ScalarOrSchedule = 0.0,
    lag: int = 0,
    **options: Unpack[WithoutWhen],
) -> optax.GradientTransformationExtraArgs:
    r"""AE-SAM: perturbs on the steps where the gradient's norm lies above its trend.

    With :math:`x_t = \|g_t\|^2`, its running mean :math:`\mu_t` and deviation
    :math:`\sigma_t` (:func:`optax_sam.when.norm_above_trend`):

    .. math::
      d = \begin{cases}
        \nabla L(w + \rho\, g / \|g\|) & \text{if } x_t \ge \mu_t + c_t \sigma_t \\
        g & \text{otherwise}
      \end{cases}

    The paper lets the threshold fall during the training run:
    ``threshold=optax.linear_schedule(1.0, -1.0, total_steps)``. A threshold of minus
    infinity is SAM.

    Cost: 1 gradient per step and 1 more per perturbed step; a dozen scalars of state.
    With the paper's threshold half of the steps are perturbed.

    Examples:
      >>> import optax, optax_sam
      >>> fall = optax.linear_schedule(1.0, -1.0, transition_steps=1000)
      >>> tx = optax.chain(optax_sam.ae_sam(rho=0.05, threshold=fall), optax.sgd(0.1))

    Differs from the authors' code in:
      1. We found no code by the authors. The statistics start at the first step's
         gradient; the paper does not say how it starts them.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023
    """
    steps = norm_above_trend(decay, threshold, lag)
    return on_engine("ae_sam", options, ascent=l2(rho), when=steps)
