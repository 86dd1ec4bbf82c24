"""StableSAM: SAM at the plain gradient's length (Tan et al., arXiv 2401.07250)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.blend import renormalize
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always


def stable_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""StableSAM: the ascended gradient at the plain one's length.

    .. math::
      g_s = \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big), \qquad
      d = \frac{\|g\|}{\|g_s\|}\, g_s

    Gradients grow on the way up, which makes SAM need a smaller learning rate than its
    base optimizer; this one keeps that of the base. Also called SSAM, as is a sparse
    SAM that has nothing to do with it. Every method can be renormalized so, with
    :func:`optax_sam.blend.renormalize`.

    Cost: 2 gradients per ascended step, 1 on others; a few scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if ``rho`` is negative.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.stable_sam(rho=0.1), optax.sgd(0.1))
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
      1. None was read: the formula is the paper's, with norms over all leaves together.

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024
    """
    return sharpness_aware(
        ascent.l2(rho),
        when,
        renormalize(),
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="stable_sam",
    )
