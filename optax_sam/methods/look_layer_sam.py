"""Look-LayerSAM: LookSAM with an ascent for each layer (Liu et al., 2203.02714)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.blend import reuse_normal
from optax_sam.engine import sharpness_aware
from optax_sam.when import every_k


def look_layer_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    k: int = 5,
    alpha: optax.ScalarOrSchedule = 0.7,
    roles: Any = None,
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Look-LayerSAM: LookSAM for very large batches, with layer-wise perturbations.

    .. math::
      e_l = \rho\, \frac{\|w_l\|}{\|g_l\|}\, g_l \quad\text{for each layer } l

    and otherwise :func:`optax_sam.looksam`. A layer is a leaf, or one of those that are
    stacked in it (``nn.scan``). The ratio is LAMB's, 1 where either norm is zero; the
    paper follows it with LAMB.

    Cost: 1 + 1/k gradients per step; one tree like the parameters and a few scalars of
    state.

    Args:
      rho: radius relative to the norm of a leaf's weights, at least 0, or a schedule
        of the step.
      k: the period in steps, at least 1.
      alpha: length of what is added, relative to the plain gradient, at least 0, or a
        schedule.
      roles: what each leaf is, for stacked layers: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``alpha`` is negative, or ``k`` is below 1 or traced.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.look_layer_sam(rho=0.02), optax.lamb(0.1))
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> w = jnp.full(3, 0.1)
      >>> state = tx.init(w)
      >>> for _ in range(50):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 0.1)
      True

    Differs from the authors' code in:
      1. There is none. The trust ratio is our reading of the paper; ports take
         :math:`\rho\, g_l / \|g_l\|`, or divide by the norm twice.

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022
    """
    return sharpness_aware(
        ascent.trust_ratio(rho, roles=roles),
        every_k(k),
        reuse_normal(alpha),
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="look_layer_sam",
    )
