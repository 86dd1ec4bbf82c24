"""F-SAM: friendly SAM (Li et al., arXiv 2403.12350, CVPR 2024)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always


def friendly_sam(
    rho: optax.ScalarOrSchedule = 0.2,
    *,
    sigma: optax.ScalarOrSchedule = 1.0,
    decay: optax.ScalarOrSchedule = 0.6,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""F-SAM: perturbs along the batch's own noise, without the full gradient.

    .. math::
      a_t = g_t - \sigma\, m_{t-1}, \qquad
      m_t = \lambda\, m_{t-1} + (1 - \lambda)\, g_t, \qquad
      d = \nabla L\Big(w + \rho\, \frac{a_t}{\|a_t\|}\Big)

    from :math:`a_0 = m_0 = g_0`, so that the first step is SAM's. The average
    :math:`m` estimates the gradient of all examples. ``sigma=0`` is SAM. With a
    ``when`` that skips, the average is over the gradients of the ascended steps.

    Cost: 2 gradients per ascended step, 1 on others; one tree like the parameters and a
    few scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      sigma: how much of the average is taken out, at least 0, or a schedule.
      decay: the average's memory ``lambda`` per ascended step, in ``[0, 1]``, or a
        schedule. The authors' runs have 0.6 to 0.95.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``sigma`` is negative or ``decay`` is not in
        ``[0, 1]``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.friendly_sam(rho=0.2), optax.sgd(0.1))
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
      1. Where nothing but rounding is left of the gradient, the offset is zero; there
         rounding errors are blown up to the length ``rho``.
      2. Their paper updates the average before it is taken out, their code after, as
         here. For ``sigma=1`` both give one direction.
      3. With ``axis_name`` the average is that of the gradients of all devices.

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024; code: nblt/F-SAM
    """
    return sharpness_aware(
        ascent.friendly(rho, sigma, decay),
        when,
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="friendly_sam",
    )
