"""Both gradients in fixed shares, as in GNP and G-RST, or one at the other's length."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.arguments import at
from optax_sam.ascent.rule import lift, norm, rescale, scaled, tiny_norm, weighted
from optax_sam.blend.rule import Blend, take_ascended
from optax_sam.contract import check_schedule
from optax_sam.step import Step


def interpolate(
    alpha: optax.ScalarOrSchedule = 0.8, *, unit_gradient: bool = False
) -> Blend:
    r"""A share of each gradient: GNP, G-RST and the coupled form of WSAM.

    .. math::
      d = (1 - \alpha)\, g + \alpha\, g_s

    On steps without a second gradient the plain one is emitted.

    Args:
      alpha: share of the ascended gradient, at least 0, or a schedule; 0 is the base
        optimizer, 1 is SAM, more extrapolates.
      unit_gradient: whether ``g`` enters as ``g / ||g||``, as the configuration of
        the authors' code has it (``norm_perturbations``) and their paper has not.

    Returns:
      A rule for ``blend=``.

    Raises:
      ValueError: if ``alpha`` is negative.

    Examples:
      >>> import optax_sam
      >>> penalized_asam = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.adaptive(1.0), blend=optax_sam.blend.interpolate(0.5))

    References:
      Zhao, Zhang and Hu, `Penalizing Gradient Norm for Efficiently Improving
      Generalization in Deep Learning <https://arxiv.org/abs/2202.03599>`_, 2022; code:
      zhaoyang-0204/gnp
    """
    alpha = check_schedule("alpha", alpha, 0.0)

    def fresh(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
        share = at(alpha, step.count)
        clean = _of_length(g, jnp.ones(())) if unit_gradient else g
        return weighted(1 - share, clean, share, g_s), state

    return Blend(
        init=lambda params: optax.EmptyState(),
        fresh=fresh,
        stale=lambda g, state, step: (g, state),
    )


def renormalize(blend: Blend = take_ascended()) -> Blend:
    r"""Another rule's gradient at the length of the plain one, as in StableSAM.

    .. math::
      d = \frac{\|g\|}{\|d'\|}\, d' \quad\text{on ascended steps}

    and zero where :math:`d'` is. On the others the rule's own is emitted. With
    ``axis_name``, norms are those of each device's own gradients.

    Args:
      blend: the rule that makes :math:`d'`.

    Returns:
      A rule for ``blend=``.

    Raises:
      ValueError: if ``blend`` is no rule.

    Examples:
      >>> import optax_sam
      >>> stable_gsam = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.05),
      ...     blend=optax_sam.blend.renormalize(optax_sam.blend.surrogate_gap(0.4)))

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024
    """
    if not isinstance(blend, Blend):
        raise ValueError(
            "renormalize needs a rule of optax_sam.blend, such as"
            f" blend.take_ascended(); got {blend!r}."
        )

    def fresh(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
        d, state = blend.fresh(g, g_s, state, step)
        return _of_length(d, tiny_norm(g)), state

    return Blend(blend.init, fresh, blend.stale)


def _of_length(tree: Any, length: jax.Array) -> Any:
    """The direction of a tree, which may be tiny, at a given length."""
    lifted = scaled(tree, lift(norm(tree)))
    return rescale(lifted, norm(lifted), length, 0)
