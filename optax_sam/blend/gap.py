"""The perturbed loss and its gap to the clean one together: the rule of GSAM."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_sam.arguments import at
from optax_sam.ascent.rule import lift, norm, scaled, widest
from optax_sam.blend.rule import Blend, along
from optax_sam.contract import check_schedule
from optax_sam.step import Step


def surrogate_gap(
    alpha: optax.ScalarOrSchedule = 0.4,
    minimize: Literal["perturbed", "clean"] = "perturbed",
) -> Blend:
    r"""Minimizes the perturbed loss and its gap to the clean loss: GSAM.

    .. math::
      d &= g_s - \alpha \Big(g - \frac{\langle g, g_s \rangle}{\|g_s\|^2} g_s\Big)
        && \text{to minimize the perturbed loss} \\
      d &= g + \alpha \Big(g_s - \frac{\langle g, g_s \rangle}{\|g\|^2} g\Big)
        && \text{to minimize the clean loss}

    What is subtracted is normal to :math:`g_s`: the step along it lowers the gap and,
    to first order, leaves the perturbed loss as it is. On steps without a second
    gradient the plain one is emitted.

    Args:
      alpha: weight of the gap, at least 0, or a schedule; 0 is SAM.
      minimize: ``"perturbed"``, as in the paper, or ``"clean"``, the alternative in
        big_vision, where ``alpha = 0`` is the base optimizer.

    Returns:
      A rule for ``blend=``.

    Raises:
      ValueError: if ``alpha`` is negative or ``minimize`` is neither.

    Examples:
      >>> import optax_sam
      >>> adaptive_gsam = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.adaptive(2.0, eta=0.0, adapt=True),
      ...     blend=optax_sam.blend.surrogate_gap(alpha=0.4))

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022; code: google-research/big_vision,
      juntang-zhuang/GSAM
    """
    alpha = check_schedule("alpha", alpha, 0.0)
    if minimize not in ("perturbed", "clean"):
        raise ValueError(f'minimize must be "perturbed" or "clean"; got {minimize!r}.')

    def fresh(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
        main, other, sign = (g_s, g, -1) if minimize == "perturbed" else (g, g_s, 1)
        factor = lift(norm(main))
        lifted = scaled(main, factor)
        c = along(scaled(other, factor), lifted)
        # A zero gradient has no direction to be normal to.
        weight = jnp.where(norm(lifted) > 0, sign * at(alpha, step.count), 0)

        def d(x: jax.Array, y: jax.Array) -> jax.Array:
            dtype = widest(x, y)
            x, y = x.astype(dtype), y.astype(dtype)
            return x + weight.astype(dtype) * (y - c.astype(dtype) * x)

        return jax.tree.map(d, main, other), state

    return Blend(
        init=lambda params: optax.EmptyState(),
        fresh=fresh,
        stale=lambda g, state, step: (g, state),
    )
