"""AMP: adversarial model perturbation (Zheng et al., arXiv 2010.04925, CVPR 2021)."""

from __future__ import annotations

from typing import Any, Literal

import optax
from jax.typing import DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always


def amp(
    epsilon: optax.ScalarOrSchedule = 0.5,
    *,
    inner_lr: optax.ScalarOrSchedule = 1.0,
    inner_iter: int = 1,
    projection: Literal["leaf", "global"] = "leaf",
    roles: Any = None,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AMP: raw gradient ascent inside a ball for each leaf, a relative older than SAM.

    .. math::
      \delta_0 = 0, \qquad
      \delta_{i+1} = \Pi_\epsilon\big(\delta_i + \zeta\, \nabla L(w + \delta_i)\big),
      \qquad d = \nabla L(w + \delta_n)

    where :math:`\Pi_\epsilon` shortens each leaf to the norm :math:`\epsilon` if it is
    longer; of a leaf of stacked layers (``nn.scan``), each layer. The step is not
    normalized: small gradients perturb little. With ``n`` leaves at their bound the
    whole perturbation has the norm :math:`\epsilon \sqrt n`.

    Cost: ``inner_iter + 1`` gradients per ascended step, 1 on others; a few scalars of
    state.

    Args:
      epsilon: radius of the balls in units of the weights, at least 0, or a schedule
        of the step.
      inner_lr: the factor ``zeta`` of a gradient, at least 0, or a schedule.
      inner_iter: number ``n`` of ascent steps, at least 1.
      projection: ``"leaf"``, or ``"global"`` for one ball of all leaves together.
      roles: what each leaf is, for stacked layers: a
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
      ValueError: if ``epsilon`` or ``inner_lr`` is negative, ``inner_iter`` is traced
        or below 1, or ``projection`` is neither.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.amp(epsilon=0.1), optax.sgd(0.1))
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
      1. Their script clips each gradient to the norm 50, also those of the ascent.
      2. BatchNorm's statistics are the caller's; there every pass updates them.

    References:
      Zheng, Zhang and Mao, `Regularizing Neural Networks via Adversarial Model
      Perturbation <https://arxiv.org/abs/2010.04925>`_, 2021; code:
      hiyouga/AMP-Regularizer
    """
    return sharpness_aware(
        ascent.raw_steps(
            epsilon, inner_lr, inner_iter, projection=projection, roles=roles
        ),
        when,
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="amp",
    )
