"""GNP: a penalty on the gradient's norm (Zhao et al., arXiv 2202.03599, ICML 2022)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.blend import interpolate
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always


def gnp(
    rho: optax.ScalarOrSchedule = 0.1,
    *,
    alpha: optax.ScalarOrSchedule = 0.8,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GNP: a penalty on the gradient's norm, from a share of the ascended gradient.

    .. math::
      d = (1 - \alpha)\, g + \alpha\, \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big)
        \approx \nabla \big(L + \alpha \rho\, \|\nabla L\|\big)(w)

    to first order in :math:`\rho`, and exactly on a quadratic. ``alpha=1`` is SAM,
    ``alpha=0`` the base optimizer; more than 1 extrapolates. Two methods of the
    literature are this one:

    - **G-RST** draws the steps that ascend, and makes up for the others by an ``alpha``
      above 1, so that its mean over the draws is 1:
      ``gnp(rho, alpha=2.0, when=when.bernoulli(0.5))``. With ``alpha=1`` that is RST,
      or SS-SAM.
    - **WSAM's coupled form** with weight :math:`\gamma` has
      ``alpha = gamma / (1 - gamma)``; see :func:`optax_sam.wsam` for the other.

    Cost: 2 gradients per ascended step, 1 on others; a few scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step. The authors take 0.1 on CIFAR and 0.05 on ImageNet.
      alpha: share of the ascended gradient, at least 0, or a schedule; the weight of
        the penalty is ``alpha * rho``.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``alpha`` is negative.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.gnp(rho=0.1, alpha=0.8), optax.sgd(0.1))
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
      1. Its configuration mixes :math:`g / \|g\|` with :math:`g_s`, unlike the paper:
         that is ``blend.interpolate(alpha, unit_gradient=True)`` in
         :func:`optax_sam.sharpness_aware`.
      2. 1e-12 is added to the norm; there nothing, so that a zero gradient gives NaN.

    References:
      Zhao, Zhang and Hu, `Penalizing Gradient Norm for Efficiently Improving
      Generalization in Deep Learning <https://arxiv.org/abs/2202.03599>`_, 2022; code:
      zhaoyang-0204/gnp. Zhao, Zhang and Hu, `SS-SAM / Randomized Sharpness-Aware
      Training <https://arxiv.org/abs/2203.09962>`_, 2022
    """
    return sharpness_aware(
        ascent.l2(rho),
        when,
        interpolate(alpha),
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="gnp",
    )
