"""An ascent on a random subset of the leaves: the weight perturbation of ESAM."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.arguments import at, raw_key
from optax_sam.ascent.rule import ascent_rule, norm, rescale
from optax_sam.contract import check_key, check_number, check_schedule
from optax_sam.step import Step


class RandomLeavesState(NamedTuple):
    """State of :func:`random_leaves`.

    Attributes:
      active: the leaves that move on the next ascent, (num_leaves,) bool.
      key: raw key data, (2,) uint32; the draw of a step is a function of both.
    """

    active: jax.Array
    key: jax.Array


def random_leaves(
    rho: optax.ScalarOrSchedule, beta: ArrayLike = 0.6, key: ArrayLike = 0
) -> optax.GradientTransformationExtraArgs:
    r"""An l2 ascent on each leaf with probability beta: stochastic weight perturbation.

    .. math::
      e = \frac{\rho}{\beta}\, \frac{g_S}{\|g_S\| + 10^{-7}}, \qquad
      l \in S \text{ where } u_l \le \beta, \quad u_l \sim U(0, 1)

    The norm is over the chosen leaves. A leaf of stacked layers (``nn.scan``) moves as
    one: the state holds one draw for each leaf. On the first step all are chosen; the
    draw at the end of a step is for the next one.

    Args:
      rho: radius of the ball, at least 0, or a schedule; the offset's norm is
        ``rho / beta``.
      beta: the probability of a leaf to move, in ``(0, 1]``.
      key: an int, a key from ``jax.random.key``, or raw key data.

    Returns:
      A transformation from a gradient to an offset; it needs ``count``. The extra
      argument ``mask_uniforms``, one number per leaf (a tree like the parameters, or
      an array in the order of ``jax.tree.leaves``), replaces its draw.

    Raises:
      ValueError: if ``rho`` is negative, ``beta`` is not in ``(0, 1]``, or ``key`` is
        no key; on update, if ``mask_uniforms`` has another number of entries.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.random_leaves(0.3, beta=0.6)
      >>> g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> e, state = rule.update(g, rule.init(g), count=0, mask_uniforms=[0.2, 0.9])
      >>> print(e["a"], e["b"], state.active)
      [0.3] [0.4] [ True False]

    References:
      Du et al., `Efficient Sharpness-aware Minimization
      <https://arxiv.org/abs/2110.03141>`_, 2022; code: dydjw9/Efficient_SAM
    """
    rho = check_schedule("rho", rho, 0.0)
    beta = check_number("beta", beta, 0.0, 1.0, open_low=True)
    check_key(key)

    def init(params: Any) -> RandomLeavesState:
        leaves = len(jax.tree.leaves(params))
        return RandomLeavesState(jnp.ones(leaves, bool), raw_key(key))

    def update(
        g: Any,
        state: RandomLeavesState,
        params: Any,
        step: Step,
        *,
        mask_uniforms: Any = None,
        **extra: Any,
    ) -> tuple[Any, RandomLeavesState]:
        del params, extra
        leaves, structure = jax.tree.flatten(g)
        chosen = [
            jnp.where(active, x, 0)
            for x, active in zip(leaves, state.active, strict=True)
        ]
        radius = at(rho, step.count) / beta
        # The authors' 1e-7, ten thousand times what other methods add to a norm.
        e = rescale(chosen, norm(chosen), radius, eps=1e-7)
        if mask_uniforms is None:
            uniforms = jax.random.uniform(step.key(state.key), state.active.shape)
        else:
            given = jax.tree.leaves(mask_uniforms)
            uniforms = jnp.concatenate([jnp.ravel(jnp.asarray(u)) for u in given])
            if uniforms.shape != state.active.shape:
                raise ValueError(
                    f"mask_uniforms must hold one number for each of the"
                    f" {len(leaves)} leaves of the parameters; got {uniforms.size}."
                )
        return jax.tree.unflatten(structure, e), state._replace(active=uniforms <= beta)

    return ascent_rule(update, init)
