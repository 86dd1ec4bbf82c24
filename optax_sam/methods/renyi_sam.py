"""RSAM: Renyi sharpness-aware minimization (Zhang et al., arXiv 2510.07758, 2025)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.contract import check_integer
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, after, always


def renyi_sam(
    rho: optax.ScalarOrSchedule = 0.65,
    *,
    alpha: optax.ScalarOrSchedule = 1.2,
    layerwise: bool = False,
    max_offset_norm: ArrayLike | None = None,
    warmup_steps: int = 0,
    roles: Any = None,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RSAM: a step whose length follows the Renyi entropy of the squared gradient.

    .. math::
      S_\alpha(g) = \frac{\sum_j |g_j|^{2\alpha}}{\|g\|^{2\alpha}}, \qquad
      e = -\mathrm{sign}(1 - \alpha)\, \rho\, \frac{S_\alpha(g)}{\|g\|^2}\, g,
      \qquad d = \nabla L(w + e)

    To first order it trains :math:`L + \rho S_\alpha` for ``alpha > 1``, a surrogate
    for the entropy of the Hessian's spectrum, see :func:`optax_sam.ascent.renyi`. It
    is not R-SAM, which is :func:`optax_sam.random_sam`.

    The offset's length :math:`\rho S_\alpha / \|g\|` grows without bound as the
    gradient vanishes: cap it with ``max_offset_norm`` where training ends at a loss
    near zero. :math:`S_\alpha` depends on the number of weights, so ``rho`` does not
    carry over from one model to another, least of all for ``alpha < 1``.

    Cost: 2 gradients per ascended step, 1 on others; a few scalars of state.

    Args:
      rho: weight of the regularizer, at least 0, or a schedule of the step.
      alpha: order of the entropy, positive and not 1, or a schedule.
      layerwise: whether the sum runs over layers, with their norms, instead of
        coordinates: leaves, and the layers of a leaf of stacked ones (``nn.scan``).
      max_offset_norm: the largest norm of the offset, positive; ``None`` means no
        limit.
      warmup_steps: plain steps at the start; the authors take five to six epochs.
      roles: what each leaf is, for stacked layers if ``layerwise``: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``warmup_steps`` is negative, ``alpha`` is 1 or not
        positive, or ``max_offset_norm`` is not positive.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> method = optax_sam.renyi_sam(rho=0.05, max_offset_norm=0.05, warmup_steps=5)
      >>> tx = optax.chain(method, optax.sgd(0.1))
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(50):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 0.1), int(optax_sam.metrics(state)["ascents"])
      (True, 45)

    Differs from the authors' code in:
      1. The offset can be capped, a zero gradient gives a zero offset, and for
         ``alpha > 1`` their epsilon cannot lift the sum above its bound of 1.
      2. Warm-up is a number of steps; there of epochs, on one data set until an
         accuracy is reached.
      3. The authors' class RSAM is ``layerwise=True``; their recipe uses NEWRSAM, the
         default here.

    References:
      Zhang et al., `Rényi Sharpness <https://arxiv.org/abs/2510.07758>`_, 2025; code:
      QiaozheZhang/RSAM
    """
    check_integer("warmup_steps", warmup_steps, 0)
    rule = ascent.renyi(
        rho,
        alpha,
        layerwise=layerwise,
        max_offset_norm=max_offset_norm,
        roles=roles,
    )
    return sharpness_aware(
        rule,
        after(warmup_steps, when) if warmup_steps else when,
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="renyi_sam",
    )
