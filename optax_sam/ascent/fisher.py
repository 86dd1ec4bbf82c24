"""The steepest point of a ball in the Fisher metric: the rule of Fisher SAM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.arguments import at
from optax_sam.ascent.rule import ascent_rule, inner, rescale, root, wide
from optax_sam.contract import check_schedule
from optax_sam.step import Step


def fisher(
    rho: optax.ScalarOrSchedule = 0.1, eta: optax.ScalarOrSchedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""The steepest point of an ellipsoid that is short where the gradient is large.

    .. math::
      F = 1 + \eta\, g^2, \qquad
      e = \rho\, \frac{F^{-1} g}{\sqrt{\langle g, F^{-1} g \rangle}}, \qquad
      \sqrt{\langle e, F e \rangle} = \rho

    with the squared gradient of the batch for the diagonal of the Fisher information.

    Args:
      rho: radius in the Fisher metric, at least 0, or a schedule.
      eta: weight of the Fisher information against the identity, at least 0, or a
        schedule; 0 is the l2 ball.

    Returns:
      A transformation from a gradient to an offset; a zero gradient gives a zero
      offset.

    Raises:
      ValueError: if ``rho`` or ``eta`` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.fisher(1.0, eta=1.0)
      >>> g = {"w": jnp.array([0.0, 1.0, 7.0])}
      >>> e, _ = rule.update(g, rule.init(g))
      >>> print(jnp.round(e["w"], 3))  # the larger entry moves less
      [0.    0.411 0.115]

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, 2022
    """
    rho = check_schedule("rho", rho, 0.0)
    eta = check_schedule("eta", eta, 0.0)

    def update(
        g: Any, state: Any, params: Any, step: Step, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        eta_now = at(eta, step.count)
        by_metric = lambda x: x / (1 + eta_now.astype(x.dtype) * jnp.square(x))
        f_inv_g = jax.tree.map(lambda x: by_metric(wide(x)), g)
        return rescale(f_inv_g, root(inner(g, f_inv_g)), at(rho, step.count)), state

    return ascent_rule(update)
