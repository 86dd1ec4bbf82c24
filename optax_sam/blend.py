"""How both gradients become one, and what stands in where the second is not taken.

A rule is a :class:`Blend`. The engine averages what it emits over ``axis_name`` and
casts it to the incoming gradient's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.contract import check_integer, check_number
from optax_sam.when import Step

__all__ = ["Blend", "ReuseDifferenceState", "reuse_difference", "take_ascended"]


class Blend(NamedTuple):
    """A rule that makes one gradient out of two, or out of one and a memory.

    Attributes:
      init: ``init(params) -> state``.
      fresh: ``fresh(g, g_s, state, step) -> (d, state)`` on ascended steps. What it
        stores of a gradient must go through ``step.mean``.
      stale: ``stale(g, state, step) -> (d, state)`` on the other steps, and where an
        ascended gradient was not finite.
    """

    init: Callable[[Any], Any]
    fresh: Callable[[Any, Any, Any, Step], tuple[Any, Any]]
    stale: Callable[[Any, Any, Step], tuple[Any, Any]]


def take_ascended() -> Blend:
    """The ascended gradient where there is one, else the plain gradient: SAM.

    Returns:
      A rule for ``blend=``.

    Examples:
      >>> import optax_sam
      >>> tx = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.05), blend=optax_sam.blend.take_ascended())
    """
    return Blend(
        init=lambda params: optax.EmptyState(),
        fresh=lambda g, g_s, state, step: (g_s, state),
        stale=lambda g, state, step: (g, state),
    )


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
    check_number("decay", decay, 0.0, 1.0)
    if max_reuse is not None:
        check_integer("max_reuse", max_reuse, 0)

    def init(params: Any) -> ReuseDifferenceState:
        zeros = lambda p: jnp.zeros_like(
            p, dtype=jnp.promote_types(jnp.result_type(p), jnp.float32)
        )
        return ReuseDifferenceState(
            psf=jax.tree.map(zeros, params), age=jnp.zeros((), jnp.int32)
        )

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
        weight = jnp.asarray(decay, float) ** age
        if max_reuse is not None:
            weight = jnp.where(age <= max_reuse, weight, 0)
        reused = lambda x, psf: x + weight.astype(psf.dtype) * psf
        d = jax.tree.map(reused, g, state.psf)
        return d, state._replace(age=age)

    return Blend(init, fresh, stale)
