"""AE-LookSAM: AE-SAM's steps with LookSAM's reuse (Jiang et al., 2304.14647)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.blend import reuse_normal
from optax_sam.engine import sharpness_aware
from optax_sam.when import norm_above_trend


def ae_looksam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    decay: ArrayLike = 0.9,
    threshold: optax.ScalarOrSchedule = 0.0,
    alpha: optax.ScalarOrSchedule = 0.7,
    lag: int = 0,
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AE-LookSAM: SAM where the norm is above its trend, LookSAM's reuse elsewhere.

    It ascends like :func:`optax_sam.ae_sam`, and on the other steps emits

    .. math::
      d = g + \alpha\, \frac{\|g\|}{\|g_v\|}\, g_v

    with the normal part :math:`g_v` of the last ascent, as
    :func:`optax_sam.looksam`; before the first ascent the plain gradient. The paper's
    threshold is ``optax.linear_schedule(2.0, 0.0, total_steps)``. ``alpha=0`` is
    AE-SAM.

    Cost: 1 gradient per step and 1 per ascent, on a fifth of the steps with the
    paper's threshold; one tree like the parameters and a dozen scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      decay: ``delta`` of the running statistics, in ``[0, 1)``.
      threshold: ``c_t`` in standard deviations, or a schedule of the step.
      alpha: length of what is added, relative to the plain gradient, at least 0, or a
        schedule.
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
      >>> fall = optax.linear_schedule(2.0, 0.0, transition_steps=50)
      >>> method = optax_sam.ae_looksam(rho=0.05, threshold=fall, alpha=0.3)
      >>> tx = optax.chain(method, optax.sgd(0.1))
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
      1. None was found. That the reuse is LookSAM's formula is our reading.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023
    """
    return sharpness_aware(
        ascent.l2(rho),
        norm_above_trend(decay, threshold, lag),
        reuse_normal(alpha),
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="ae_looksam",
    )
