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
    r"""AE-SAM: a SAM step where the gradient's norm lies above its trend.

    With :math:`x_t = \|g_t\|^2`, its running mean :math:`\mu_t` and deviation
    :math:`\sigma_t` (:func:`optax_sam.when.norm_above_trend`):

    .. math::
      d = \begin{cases}
        \nabla L(w + \rho\, g / \|g\|) & \text{if } x_t \ge \mu_t + c_t \sigma_t \\
        g & \text{otherwise}
      \end{cases}

    The paper lets the threshold fall over training:
    ``threshold=optax.linear_schedule(1.0, -1.0, total_steps)``. A threshold of minus
    infinity is SAM.

    Cost: 1 gradient per step and 1 per perturbed step, half of the steps with the
    paper's threshold. A dozen scalars of state.

    Examples:
      >>> import optax, optax_sam
      >>> fall = optax.linear_schedule(1.0, -1.0, transition_steps=1000)
      >>> tx = optax.chain(optax_sam.ae_sam(rho=0.05, threshold=fall), optax.sgd(0.1))

    Differs from the authors' code in:
      1. None was found. The statistics start at the first step's gradient; how the
         paper starts them is not known.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023
    """
    steps = norm_above_trend(decay, threshold, lag)
    return on_engine("ae_sam", options, ascent=l2(rho), when=steps)
