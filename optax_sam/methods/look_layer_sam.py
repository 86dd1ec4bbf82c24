"""Look-LayerSAM: LookSAM with an ascent for each layer (Liu et al., 2203.02714)."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_sam.method import WithoutWhen, method, on_engine
from optax_sam.methods.looksam import reuse_normal
from optax_sam.parts import Step, offset_rule
from optax_sam.roles import by_layer, resolve_roles
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import norm, scaled
from optax_sam.when.fixed import every_k


def trust_ratio(
    rho: optax.ScalarOrSchedule, *, roles: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The ascent of :func:`optax_sam.look_layer_sam`: a ball for each layer.

    Args:
      rho: radius relative to the norm of a leaf's weights, at least 0, or a schedule
        of the step.
      roles: what each leaf is, for stacked layers: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.

    Returns:
      A transformation from a gradient to an offset whose layers have the norm
      ``rho * norm(w_l)``; it needs ``params``.

    Raises:
      ValueError: if ``rho`` is negative, or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.trust_ratio(0.1)
      >>> w = {"a": jnp.array([6.0, 8.0]), "b": jnp.array([0.0])}
      >>> g = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([3.0])}
      >>> e, _ = rule.update(g, rule.init(w), w)
      >>> print(e["a"], e["b"])
      [0. 1.] [0.3]
    """
    rho = check_schedule("rho", rho, 0.0)

    def offset(g: Any, params: Any, step: Step) -> Any:
        radius = at(rho, step.count)

        def of_layer(x: jax.Array, w: jax.Array) -> jax.Array:
            size, weights = norm(x), norm(w)
            both = (size > 0) & (weights > 0)
            ratio = jnp.where(both, weights / jnp.where(both, size, 1), 1)
            return scaled(x, radius * ratio)

        of_leaf = lambda x, w, role: by_layer(of_layer, role)(x, w)
        return jax.tree.map(of_leaf, g, params, resolve_roles(roles, params))

    return offset_rule(offset, needs=("params",))


@method(trust_ratio, every_k, reuse_normal)
def look_layer_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    k: int = 5,
    alpha: optax.ScalarOrSchedule = 0.7,
    roles: Any = None,
    **options: Unpack[WithoutWhen],
) -> optax.GradientTransformationExtraArgs:
    r"""Look-LayerSAM: LookSAM with a ball for each layer, for very large batches.

    .. math::
      e_l = \rho\, \frac{\|w_l\|}{\|g_l\|}\, g_l \quad\text{for each layer } l

    The rest is :func:`optax_sam.looksam`. A layer is a leaf, or one of the layers that
    are stacked in a leaf (``nn.scan``). The ratio is LAMB's: it is 1 where either norm
    is zero. The paper puts LAMB after it.

    Cost: 1 + 1/k gradients per step; one pytree like the parameters and a few scalars
    of state.

    Raises:
      ValueError: if ``rho`` or ``alpha`` is negative, or ``k`` is below 1 or traced.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.look_layer_sam(rho=0.05), optax.lamb(1e-3))

    Differs from the authors' code in:
      1. They published no code. The trust ratio is our reading of the paper; ports use
         :math:`\rho\, g_l / \|g_l\|`, or divide by the norm twice.

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022
    """
    rule, blend = trust_ratio(rho, roles=roles), reuse_normal(alpha)
    return on_engine(
        "look_layer_sam", options, ascent=rule, when=every_k(k), blend=blend
    )
