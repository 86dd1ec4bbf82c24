"""AE-SAM: an adaptive policy to employ SAM (Jiang et al., arXiv 2304.14647)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.engine import sharpness_aware
from optax_sam.when import norm_above_trend


def ae_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    decay: ArrayLike = 0.9,
    threshold: optax.ScalarOrSchedule = 0.0,
    lag: int = 0,
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
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

    Cost: 1 gradient per step and 1 per ascent; half of the steps ascend with the
    paper's threshold. A dozen scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      decay: ``delta`` of the running statistics, in ``[0, 1)``.
      threshold: ``c_t`` in standard deviations, or a schedule of the step.
      lag: 0 decides from the step's own gradient; 1 from that of the step before,
        which lets :func:`optax_sam.dispatch` avoid the conditional.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if an argument is out of its range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> fall = optax.linear_schedule(1.0, -1.0, transition_steps=50)
      >>> tx = optax.chain(optax_sam.ae_sam(rho=0.05, threshold=fall), optax.sgd(0.1))
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(50):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 0.1)
      True

    Differs from the authors' code in:
      1. None was found. The first statistics are those of the first gradient; how the
         paper starts them is not known.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023
    """
    return sharpness_aware(
        ascent.l2(rho),
        norm_above_trend(decay, threshold, lag),
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="ae_sam",
    )
