"""R-SAM: random sharpness-aware minimization (Liu et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always


def random_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    sigma: optax.ScalarOrSchedule = 5e-4,
    gradient_weight: optax.ScalarOrSchedule = 2.0,
    key: ArrayLike = 0,
    roles: Any = None,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""R-SAM: SAM whose ascent starts from randomly smoothed weights.

    .. math::
      \Delta_u &= \sigma\, \|W_u\|\, z_u, \quad z \sim \mathcal N(0, I)
        && \text{for each output unit } u \\
      g_1 &= \nabla L(w + \Delta), \qquad
      e = \rho\, \frac{\lambda g_1 + \Delta}{\|\lambda g_1 + \Delta\|}, \qquad
      d = \nabla L(w + e)

    Leaves that are no kernels and no embeddings are one unit, in each layer of stacked
    ones. Units are counted along the axes that :func:`optax_sam.roles` finds. The
    authors let the noise grow by a half cosine to five times its start:
    ``sigma=optax.cosine_decay_schedule(5e-4, total_steps, alpha=5.0)``, and tie
    ``rho`` to the learning rate (:func:`optax_sam.rho_from_lr`). ``sigma=0`` is SAM.

    The incoming gradient is not used on ascended steps. Under ``jit`` XLA drops its
    computation, so the cost is 2 gradients and not 3, as long as nothing else uses it
    either, such as a logged norm. ``optax_sam.metrics`` then tells the norm of
    :math:`g_1`.

    Cost: 2 gradients per ascended step; with a rule ``when`` that leaves out steps, 3
    on ascended ones in the program with the conditional, 2 in
    :func:`optax_sam.dispatch`; a few scalars and a key of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      sigma: size of the noise relative to the norm of a unit's weights, at least 0,
        or a schedule. As it is multiplied by the whole norm, the noise of a unit with
        ``n`` inputs is ``sigma * sqrt(n)`` times as long as its weights.
      gradient_weight: weight ``lambda`` of the gradient against the noise, at least
        0, or a schedule. The gradient is not normalized, so this depends on the scale
        of the loss.
      key: an int, a key from ``jax.random.key``, or raw key data, for the noise.
      roles: what each leaf is, for units and stacked layers: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the smoothed and perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, with noise of its own for each device,
        see :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``. The extra
      argument ``noise``, a tree of standard normals like the parameters, replaces its
      draw.

    Raises:
      ValueError: if ``rho``, ``sigma`` or ``gradient_weight`` is negative, or ``key``
        is no key.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> grow = optax.cosine_decay_schedule(5e-4, decay_steps=50, alpha=5.0)
      >>> tx = optax.chain(optax_sam.random_sam(rho=0.05, sigma=grow), optax.sgd(0.1))
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
      1. Each leaf has noise of its own; there leaves of one shape share it, and the
         dropout keys come from the same key.
      2. Schedules start at step 0; theirs of ``sigma`` at 1.
      3. Clipping the emitted gradient to norm 1 and Adam are left to the chain.

    References:
      Liu et al., Random Sharpness-Aware Minimization, NeurIPS 2022; code:
      RSAM-Optimizer/R-SAM
    """
    return sharpness_aware(
        ascent.smoothed(rho, sigma, gradient_weight, key, mask=mask, roles=roles),
        when,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="random_sam",
    )
