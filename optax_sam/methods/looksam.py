"""LookSAM: SAM's normal part, taken every k steps (Liu et al., arXiv 2203.02714)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.blend import reuse_normal
from optax_sam.engine import sharpness_aware
from optax_sam.when import every_k


def looksam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    k: int = 5,
    alpha: optax.ScalarOrSchedule = 0.7,
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: a SAM step every k steps, whose direction is reused on the others.

    The part of the SAM gradient that is normal to the plain one changes slowly. It is
    kept and added, at a fixed share of the plain gradient's length:

    .. math::
      d &= g_s, \quad g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|^2}\, g, \quad
        g_s = \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big)
        && \text{on every } k\text{-th step, from the first} \\
      d &= g + \alpha\, \frac{\|g\|}{\|g_v\|}\, g_v && \text{on the others}

    ``alpha=0`` is SAM-k, ``k=1`` is SAM. The paper's ViTs take ``alpha=0.7`` and
    ``rho`` about 1; on CNNs others found 0.1 to 0.3 best.

    Cost: 1 + 1/k gradients per step; one tree like the parameters and a few scalars of
    state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      k: the period in steps, at least 1.
      alpha: length of what is added, relative to the plain gradient, at least 0, or a
        schedule.
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
      >>> tx = optax.chain(optax_sam.looksam(rho=0.05, k=5, alpha=0.3), optax.sgd(0.1))
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(50):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 0.1), int(optax_sam.metrics(state)["ascents"])
      (True, 10)

    Differs from the authors' code in:
      1. There is none: their repository holds a README. The formulas are the paper's,
         with norms over all leaves together; several ports take them leaf by leaf.
      2. A normal part that is nothing but rounding is not reused; a port divides by
         its norm.

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022; port followed: MarlonBecker/MSAM
    """
    return sharpness_aware(
        ascent.l2(rho),
        every_k(k),
        reuse_normal(alpha),
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="looksam",
    )
