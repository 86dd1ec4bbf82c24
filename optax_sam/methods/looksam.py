"""LookSAM: a SAM step every k steps, reused between (Liu et al., arXiv 2203.02714)."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_sam.ascent.ball import l2
from optax_sam.method import WithoutWhen, method, on_engine
from optax_sam.parts import Blend, Step
from optax_sam.schedules import at, check_schedule, shown
from optax_sam.trees import along, cache, inner, norm, rescale
from optax_sam.when.fixed import every_k

# Added to the squared norm that LookSAM divides by, as in the port that we follow.
_EPS = 1e-12


class ReuseNormalState(NamedTuple):
    """State of :func:`reuse_normal`.

    Attributes:
      normal: the last direction of the perturbed gradient's part normal to the
        gradient at ``w``, a unit vector like the parameters, float32 or better; zero if
        there was none.
    """

    normal: Any


def reuse_normal(alpha: optax.ScalarOrSchedule = 0.7) -> Blend:
    """The blend of :func:`optax_sam.looksam`: adds the last normal direction to ``g``.

    The projection divides by ``norm(g)**2 + 1e-12``, if ``norm(g)**2`` is above 1e-8.
    A normal part that is no longer than
    its rounding errors has no direction, and is not reused. A normal part whose squares
    underflow is not reused either; in float32 this happens for gradients below 1e-19.
    With ``axis_name``, each device uses the norms of its gradient.

    Args:
      alpha: length of the added part relative to the gradient at ``w``, at least 0,
        or a schedule.

    Returns:
      A rule for ``blend=``, with one pytree like the parameters as state.

    Raises:
      ValueError: if ``alpha`` is negative.

    Examples:
      >>> import optax_sam
      >>> random_look_sam = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.1),
      ...     when=optax_sam.when.bernoulli(0.2),
      ...     blend=optax_sam.blend.reuse_normal(alpha=0.3))
    """
    alpha = check_schedule("alpha", alpha, 0.0)

    def init(params: Any) -> ReuseNormalState:
        return ReuseNormalState(cache(params))

    def fresh(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
        square = inner(g, g)
        eps = jnp.where(square > 1e-8, _EPS, 0)
        c = along(g_s, g, eps)
        wide_g, wide_g_s = (optax.tree.cast_like(x, state.normal) for x in (g, g_s))
        rejection = lambda a, b: a - c.astype(a.dtype) * b
        g_v = step.mean(jax.tree.map(rejection, wide_g_s, wide_g))
        # Without curvature (or with rho = 0) g_v consists of rounding errors and the
        # epsilon, which must not be scaled up to the length of a gradient.
        length, rounding = norm(g_v), 100 * jnp.finfo(c.dtype).eps
        share = 2 * eps / jnp.where(square > 0, square + eps, 1)
        known = length > step.mean((rounding + share) * norm(g_s))
        return g_s, ReuseNormalState(rescale(g_v, jnp.where(known, length, 0), 1, 0))

    def stale(g: Any, state: Any, step: Step) -> tuple[Any, Any]:
        length = norm(g)
        # If the norm is not finite, the gradient passes through unchanged.
        weight = at(alpha, step.count) * jnp.where(jnp.isfinite(length), length, 0)
        reused = lambda x, v: x.astype(v.dtype) + weight.astype(v.dtype) * v
        return jax.tree.map(reused, g, state.normal), state

    return Blend(init, fresh, stale, f"blend.reuse_normal({shown(alpha)})")


@method(l2, every_k, reuse_normal)
def looksam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    k: int = 5,
    alpha: optax.ScalarOrSchedule = 0.7,
    **options: Unpack[WithoutWhen],
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: perturbs on every k-th step and reuses its direction on the others.

    One part of the perturbed gradient is normal to the gradient at ``w``. This part
    changes slowly. The method keeps its direction and adds it to the gradient at ``w``,
    at a fixed share of that gradient's length:

    .. math::
      d &= g_s, \quad g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|^2}\, g, \quad
        g_s = \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big)
        && \text{on every } k\text{-th step, from the first} \\
      d &= g + \alpha\, \frac{\|g\|}{\|g_v\|}\, g_v && \text{on the others}

    ``alpha=0`` is SAM-k, and ``k=1`` is SAM. The paper's ViTs take ``alpha=0.7`` and
    ``rho`` about 1. On CNNs others found ``alpha`` of 0.1 to 0.3 best.

    Cost: 1 + 1/k gradients per step; one pytree like the parameters and a few scalars
    of state.

    Raises:
      ValueError: if ``rho`` or ``alpha`` is negative, or ``k`` is below 1 or traced.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.looksam(rho=0.05, k=5, alpha=0.3), optax.sgd(0.1))

    Differs from the authors' code in:
      1. They published no code: their repository holds a README. The formulas are the
         paper's, with norms over all leaves together; several ports use a norm for
         each leaf.
      2. A normal part that consists only of rounding errors is not reused; a port
         divides by its norm.

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022; port followed: MarlonBecker/MSAM
    """
    return on_engine(
        "looksam", options, ascent=l2(rho), when=every_k(k), blend=reuse_normal(alpha)
    )
