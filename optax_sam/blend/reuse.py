"""What stands in for the second gradient where it is not taken: a part of the last."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.arguments import at
from optax_sam.ascent.rule import cache, inner, norm, rescale
from optax_sam.blend.rule import Blend, along
from optax_sam.contract import check_integer, check_number, check_schedule
from optax_sam.step import Step

# Added to the squared norm that LookSAM divides by, as the port does that we follow.
_EPS = 1e-12


class ReuseDifferenceState(NamedTuple):
    """State of :func:`reuse_difference`.

    Attributes:
      psf: the last difference of gradients, like the parameters, float32 or better.
      age: steps since it was taken, () int32.
    """

    psf: Any
    age: jax.Array


def reuse_difference(decay: ArrayLike = 0.8, max_reuse: int | None = 6) -> Blend:
    r"""Adds the last difference of gradients, damped, where there is no new one: vSAM.

    .. math::
      d = g_s, \quad \mathrm{PSF} = g_s - g \quad\text{on ascended steps}, \qquad
      d = g + \beta^j\, \mathrm{PSF} \quad\text{on the } j\text{-th step after}

    Args:
      decay: the damping ``beta`` per step, in ``[0, 1]``.
      max_reuse: the largest ``j`` that still reuses, at least 0; afterwards the plain
        gradient is emitted. ``None`` means no limit.

    Returns:
      A rule for ``blend=``, with one tree like the parameters as state.

    Raises:
      ValueError: if an argument is out of its range.

    Examples:
      >>> import optax_sam
      >>> sam_5_with_reuse = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.05),
      ...     when=optax_sam.when.every_k(5),
      ...     blend=optax_sam.blend.reuse_difference(decay=0.8))

    References:
      Deng et al., `Effective Gradient Sample Size via Variation Estimation for
      Accelerating Sharpness aware Minimization <https://arxiv.org/abs/2403.08821>`_,
      2024, equations 16 and 17; code: ajiaaa/vSAM
    """
    decay = check_number("decay", decay, 0.0, 1.0)
    if max_reuse is not None:
        check_integer("max_reuse", max_reuse, 0)

    def init(params: Any) -> ReuseDifferenceState:
        return ReuseDifferenceState(psf=cache(params), age=jnp.zeros((), jnp.int32))

    def fresh(
        g: Any, g_s: Any, state: ReuseDifferenceState, step: Step
    ) -> tuple[Any, ReuseDifferenceState]:
        psf = jax.tree.map(
            lambda a, b, cached: a.astype(cached.dtype) - b.astype(cached.dtype),
            g_s,
            g,
            state.psf,
        )
        return g_s, ReuseDifferenceState(step.mean(psf), jnp.zeros_like(state.age))

    def stale(
        g: Any, state: ReuseDifferenceState, step: Step
    ) -> tuple[Any, ReuseDifferenceState]:
        del step
        age = optax.safe_increment(state.age)
        weight = jnp.asarray(decay, float) ** age.astype(float)
        if max_reuse is not None:
            weight = jnp.where(age <= max_reuse, weight, 0)
        reused = lambda x, psf: x.astype(psf.dtype) + weight.astype(psf.dtype) * psf
        d = jax.tree.map(reused, g, state.psf)
        return d, state._replace(age=age)

    return Blend(init, fresh, stale)


class ReuseNormalState(NamedTuple):
    """State of :func:`reuse_normal`.

    Attributes:
      normal: the last direction of the ascended gradient's part normal to the plain
        one, a unit vector like the parameters, float32 or better; zero if there was
        none.
    """

    normal: Any


def reuse_normal(alpha: optax.ScalarOrSchedule = 0.7) -> Blend:
    r"""Adds the direction that the plain gradient lacked, where there is no new one.

    .. math::
      d = g_s, \quad g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|^2}\, g
      \quad\text{on ascended steps}, \qquad
      d = g + \alpha\, \frac{\|g\|}{\|g_v\|}\, g_v \quad\text{on the others}

    1e-12 is added to the squared norm where that is above 1e-8. A normal part that is
    not longer than rounding leaves it has no direction and is not reused. Neither is
    one whose squares vanish, as in float32 those of gradients below 1e-19. With
    ``axis_name``, norms are those of each device's own gradient.

    Args:
      alpha: length of what is added, relative to the plain gradient, at least 0, or a
        schedule.

    Returns:
      A rule for ``blend=``, with one tree like the parameters as state.

    Raises:
      ValueError: if ``alpha`` is negative.

    Examples:
      >>> import optax_sam
      >>> random_look_sam = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.1),
      ...     when=optax_sam.when.bernoulli(0.2),
      ...     blend=optax_sam.blend.reuse_normal(alpha=0.3))

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022
    """
    alpha = check_schedule("alpha", alpha, 0.0)

    def init(params: Any) -> ReuseNormalState:
        return ReuseNormalState(cache(params))

    def fresh(
        g: Any, g_s: Any, state: ReuseNormalState, step: Step
    ) -> tuple[Any, ReuseNormalState]:
        square = inner(g, g)
        eps = jnp.where(square > 1e-8, _EPS, 0)
        c = along(g_s, g, eps)
        wide_g, wide_g_s = (optax.tree.cast_like(x, state.normal) for x in (g, g_s))
        rejection = lambda a, b: a - c.astype(a.dtype) * b
        g_v = step.mean(jax.tree.map(rejection, wide_g_s, wide_g))
        # Without curvature (or with rho = 0) what rounding and the epsilon leave of g_v
        # must not be blown up to the length of a gradient.
        length, rounding = norm(g_v), 100 * jnp.finfo(c.dtype).eps
        share = 2 * eps / jnp.where(square > 0, square + eps, 1)
        known = length > step.mean((rounding + share) * norm(g_s))
        return g_s, ReuseNormalState(rescale(g_v, jnp.where(known, length, 0), 1, 0))

    def stale(
        g: Any, state: ReuseNormalState, step: Step
    ) -> tuple[Any, ReuseNormalState]:
        length = norm(g)
        # One that is not finite lets its gradient through as it is.
        weight = at(alpha, step.count) * jnp.where(jnp.isfinite(length), length, 0)
        reused = lambda x, v: x.astype(v.dtype) + weight.astype(v.dtype) * v
        return jax.tree.map(reused, g, state.normal), state

    return Blend(init, fresh, stale)
