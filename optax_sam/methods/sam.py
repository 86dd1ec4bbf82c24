"""SAM: sharpness-aware minimization (Foret et al., arXiv 2010.01412, ICLR 2021)."""

from __future__ import annotations

from typing import Unpack

import optax

from optax_sam.ascent.steps import n_step
from optax_sam.method import Options, method, on_engine
from optax_sam.schedules import check_integer


@method(n_step)
def sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    num_ascent_steps: int = 1,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""SAM: takes the gradient at the worst nearby point instead of at ``w``.

    .. math::
      e = \rho\, \frac{g}{\|g\|}, \qquad d = \nabla L(w + e)

    With ``when=optax_sam.when.every_k(5)`` it is SAM-5. With
    ``when=optax_sam.when.bernoulli(p)`` it is SS-SAM. ``rho=0`` is the base optimizer.

    Cost: 2 gradients per perturbed step (``n + 1`` with ``n`` ascent steps), 1 on
    others; a few scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step; 0.02 to 0.5 for CNNs, up to 0.6 for ViTs.
      num_ascent_steps: number of normalized ascent steps, at least 1, each projected
        onto the ball.

    Raises:
      ValueError: if ``rho`` is negative or ``num_ascent_steps`` is below 1 or traced.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.sam(rho=0.05), optax.sgd(0.1, momentum=0.9))
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
      1. A zero gradient gives a zero offset; there it gives NaN.
      2. Devices share one perturbation under plain ``jit``; there each device has its
         own. Here ``axis_name`` does this.

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021; code:
      google-research/sam. n-step ascent: Andriushchenko and Flammarion, `Towards
      Understanding Sharpness-Aware Minimization
      <https://arxiv.org/abs/2206.06232>`_, 2022
    """
    check_integer("num_ascent_steps", num_ascent_steps, 1)
    return on_engine("sam", options, ascent=n_step(rho, num_ascent_steps))
