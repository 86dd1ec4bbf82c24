"""GNP: a penalty on the gradient's norm (Zhao et al., arXiv 2202.03599, ICML 2022)."""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from optax_sam.ascent.ball import l2
from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Blend, Step
from optax_sam.schedules import at, check_schedule, shown
from optax_sam.trees import of_length, weighted


def interpolate(
    alpha: optax.ScalarOrSchedule = 0.8, *, unit_gradient: bool = False
) -> Blend:
    r"""The blend of :func:`optax_sam.gnp`: :math:`d = (1 - \alpha)\, g + \alpha\, g_s`.

    On steps without a perturbed gradient it emits the gradient at ``w``.

    Args:
      alpha: share of the perturbed gradient, at least 0, or a schedule; 0 is the base
        optimizer, 1 is SAM, more extrapolates. The weight of the penalty is
        ``alpha * rho``.
      unit_gradient: whether ``g`` enters as ``g / ||g||``. The configuration of the
        authors' code does this (``norm_perturbations``); their paper does not.

    Returns:
      A rule for ``blend=``.

    Raises:
      ValueError: if ``alpha`` is negative.

    Examples:
      >>> import optax_sam
      >>> penalized_asam = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.adaptive(1.0), blend=optax_sam.blend.interpolate(0.5))
    """
    alpha = check_schedule("alpha", alpha, 0.0)

    def fresh(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
        share = at(alpha, step.count)
        clean = of_length(g, jnp.ones(())) if unit_gradient else g
        return weighted(1 - share, clean, share, g_s), state

    return Blend(fresh=fresh, call=f"blend.interpolate({shown(alpha)})")


@method(l2, interpolate)
def gnp(
    rho: optax.ScalarOrSchedule = 0.1,
    *,
    alpha: optax.ScalarOrSchedule = 0.8,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""GNP: penalizes the gradient's norm with a share of the perturbed gradient.

    .. math::
      d = (1 - \alpha)\, g + \alpha\, \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big)
        \approx \nabla \big(L + \alpha \rho\, \|\nabla L\|\big)(w)

    to first order in :math:`\rho`, and exactly on a quadratic. ``alpha=1`` is SAM and
    ``alpha=0`` is the base optimizer. More than 1 extrapolates. Two other methods are
    settings of this one:

    - **G-RST** perturbs on random steps with an ``alpha`` above 1, so that the mean of
      ``alpha`` over all steps is 1: ``gnp(rho, alpha=2.0, when=when.bernoulli(0.5))``.
      With ``alpha=1`` it is RST, or SS-SAM.
    - **WSAM's coupled form** with weight :math:`\gamma` has
      ``alpha = gamma / (1 - gamma)``. :func:`optax_sam.wsam` is its other form.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step. The authors take 0.1 on CIFAR and 0.05 on ImageNet.

    Raises:
      ValueError: if ``rho`` or ``alpha`` is negative.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.gnp(rho=0.1, alpha=0.8), optax.sgd(0.1))

    Differs from the authors' code in:
      1. Their configuration mixes :math:`g / \|g\|` with :math:`g_s`, unlike the paper.
         ``blend.interpolate(alpha, unit_gradient=True)`` in
         :func:`optax_sam.sharpness_aware` does this.
      2. 1e-12 is added to the norm; there a zero gradient gives NaN.

    References:
      Zhao, Zhang and Hu, `Penalizing Gradient Norm for Efficiently Improving
      Generalization in Deep Learning <https://arxiv.org/abs/2202.03599>`_, 2022; code:
      zhaoyang-0204/gnp. Zhao, Zhang and Hu, `SS-SAM / Randomized Sharpness-Aware
      Training <https://arxiv.org/abs/2203.09962>`_, 2022
    """
    return on_engine("gnp", options, ascent=l2(rho), blend=interpolate(alpha))
