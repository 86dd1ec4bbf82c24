"""AE-LookSAM: AE-SAM's steps with LookSAM's reuse (Jiang et al., 2304.14647)."""

from __future__ import annotations

from typing import Unpack

import optax
from jax.typing import ArrayLike

from optax_sam.ascent.ball import l2
from optax_sam.method import WithoutWhen, method, on_engine
from optax_sam.methods.looksam import reuse_normal
from optax_sam.when.trend import norm_above_trend


@method(l2, norm_above_trend, reuse_normal)
def ae_looksam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    decay: ArrayLike = 0.9,
    threshold: optax.ScalarOrSchedule = 0.0,
    alpha: optax.ScalarOrSchedule = 0.7,
    lag: int = 0,
    **options: Unpack[WithoutWhen],
) -> optax.GradientTransformationExtraArgs:
    r"""AE-LookSAM: perturbs on AE-SAM's steps, and reuses like LookSAM on the others.

    It perturbs on the steps of :func:`optax_sam.ae_sam`. On the others it emits

    .. math::
      d = g + \alpha\, \frac{\|g\|}{\|g_v\|}\, g_v

    where :math:`g_v` is the normal part of the last perturbed gradient, as in
    :func:`optax_sam.looksam`. Before the first perturbed step it emits the gradient at
    ``w``. The paper's threshold is ``optax.linear_schedule(2.0, 0.0, total_steps)``.
    ``alpha=0`` is AE-SAM.

    Cost: 1 gradient per step and 1 more per perturbed step; one pytree like the
    parameters and a dozen scalars of state. With the paper's threshold a fifth of the
    steps are perturbed.

    Examples:
      >>> import optax, optax_sam
      >>> fall = optax.linear_schedule(2.0, 0.0, transition_steps=1000)
      >>> tx = optax.chain(optax_sam.ae_looksam(threshold=fall), optax.sgd(0.1))

    Differs from the authors' code in:
      1. We found no code by the authors. We read the paper as reusing by LookSAM's
         formula.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023
    """
    steps = norm_above_trend(decay, threshold, lag)
    return on_engine(
        "ae_looksam", options, ascent=l2(rho), when=steps, blend=reuse_normal(alpha)
    )
