"""One step to the boundary of a ball, and that step times the sizes of the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.parts import Step, offset_rule
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import norm, rescale


def l2(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""The steepest point of an l2 ball: :math:`e = \rho\, g / \|g\|`.

    The norm is global, over all leaves together.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.

    Returns:
      A transformation from a gradient to an offset of norm ``rho``; a zero gradient
      gives a zero offset.

    Raises:
      ValueError: if ``rho`` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.l2(0.5)
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> e, _ = rule.update(g, rule.init(g))
      >>> print(e["w"])
      [0.3 0.4]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    rho = check_schedule("rho", rho, 0.0)

    def offset(g: Any, params: Any, step: Step) -> Any:
        return rescale(g, norm(g), at(rho, step.count))

    return offset_rule(offset)


def weight_scaled(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""SAM's offset times the sizes of the weights: :math:`e = \rho\, |w|\, g / \|g\|`.

    big_vision's GSAM calls this offset adaptive. ASAM's ellipsoid differs
    (:func:`optax_sam.ascent.adaptive`): it multiplies by the sizes twice and divides by
    the norm of the scaled gradient.

    Args:
      rho: radius relative to the weights' sizes, at least 0, or a schedule.

    Returns:
      A transformation from a gradient to an offset; it needs ``params``.

    Raises:
      ValueError: if ``rho`` is negative, or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.weight_scaled(0.5)
      >>> w, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}
      >>> e, _ = rule.update(g, rule.init(w), w)
      >>> print(e["w"])
      [0.3 0.8]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022; code: google-research/big_vision
    """
    rho = check_schedule("rho", rho, 0.0)

    def offset(g: Any, params: Any, step: Step) -> Any:
        e = rescale(g, norm(g), at(rho, step.count))
        return jax.tree.map(lambda x, w: jnp.abs(w).astype(x.dtype) * x, e, params)

    return offset_rule(offset, needs=("params",))
