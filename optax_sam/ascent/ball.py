"""One step to the boundary of a ball, an ellipsoid, or a ball for each leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.arguments import Mask, at, resolve_mask
from optax_sam.ascent.rule import ascent_rule, check_params, norm, rescale, scaled, wide
from optax_sam.contract import check_schedule
from optax_sam.roles import by_layer, is_weight, resolve_roles
from optax_sam.step import Step


def l2(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""The steepest point of an l2 ball: :math:`e = \rho\, g / \|g\|`.

    The norm is global, over all leaves together.

    Args:
      rho: radius of the ball, in units of the weights, at least 0, or a schedule.

    Returns:
      A transformation from a gradient to an offset of norm ``rho``; a zero gradient
      gives a zero offset.

    Raises:
      ValueError: if ``rho`` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.l2(0.5)
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> e, _ = rule.update(g, rule.init(g))
      >>> print(e["w"])
      [0.3 0.4]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    rho = check_schedule("rho", rho, 0.0)

    def update(
        g: Any, state: Any, params: Any, step: Step, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        return rescale(g, norm(g), at(rho, step.count)), state

    return ascent_rule(update)


def weight_scaled(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""SAM's offset times the sizes of the weights: :math:`e = \rho\, |w|\, g / \|g\|`.

    It is what big_vision's GSAM calls adaptive. It is not ASAM's ellipsoid
    (:func:`adaptive`), which multiplies by the sizes twice and divides by the norm of
    the scaled gradient.

    Args:
      rho: radius relative to the weights' sizes, at least 0, or a schedule.

    Returns:
      A transformation from a gradient to an offset; it needs ``params``.

    Raises:
      ValueError: if ``rho`` is negative, or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.weight_scaled(0.5)
      >>> w, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}
      >>> e, _ = rule.update(g, rule.init(w), w)
      >>> print(e["w"])
      [0.3 0.8]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022; code: google-research/big_vision
    """
    rho = check_schedule("rho", rho, 0.0)

    def update(
        g: Any, state: Any, params: Any, step: Step, **extra: Any
    ) -> tuple[Any, Any]:
        del extra
        check_params("A weight-scaled ascent", params)
        e = rescale(g, norm(g), at(rho, step.count))
        return jax.tree.map(lambda x, w: jnp.abs(w) * x, e, params), state

    return ascent_rule(update)


def trust_ratio(
    rho: optax.ScalarOrSchedule, *, roles: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""A ball for each layer, as large as its weights: LookLayerSAM's ascent.

    .. math::
      e_l = \rho\, \frac{\|w_l\|}{\|g_l\|}\, g_l, \qquad \|e_l\| = \rho\, \|w_l\|

    for each leaf ``l``, and for each layer of a leaf of stacked ones (``nn.scan``). The
    ratio is LAMB's: 1 where either norm is zero.

    Args:
      rho: radius relative to the norm of a leaf's weights, at least 0, or a schedule.
      roles: what each leaf is, for stacked layers: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.

    Returns:
      A transformation from a gradient to an offset; it needs ``params``.

    Raises:
      ValueError: if ``rho`` is negative, or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.trust_ratio(0.1)
      >>> w = {"a": jnp.array([6.0, 8.0]), "b": jnp.array([0.0])}
      >>> g = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([3.0])}
      >>> e, _ = rule.update(g, rule.init(w), w)
      >>> print(e["a"], e["b"])
      [0. 1.] [0.3]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022
    """
    rho = check_schedule("rho", rho, 0.0)

    def update(
        g: Any, state: Any, params: Any, step: Step, **extra: Any
    ) -> tuple[Any, Any]:
        del extra
        check_params("A layer-wise ascent", params)
        radius = at(rho, step.count)

        def offset(x: jax.Array, w: jax.Array) -> jax.Array:
            size, weights = norm(x), norm(w)
            both = (size > 0) & (weights > 0)
            ratio = jnp.where(both, weights / jnp.where(both, size, 1), 1)
            return scaled(x, radius * ratio)

        of_layers = lambda x, w, role: by_layer(offset, role)(x, w)
        return jax.tree.map(of_layers, g, params, resolve_roles(roles, params)), state

    return ascent_rule(update)


def adaptive(
    rho: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule = 0.01,
    adapt: Mask = None,
    *,
    roles: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The steepest point of an ellipsoid that follows the sizes of the weights.

    .. math::
      T = |w| + \eta \text{ on adapted leaves, else } 1, \qquad
      e = \rho\, T^2 g / \|T g\|, \qquad \|e / T\| = \rho

    Args:
      rho: radius in units of the weights' own size, at least 0, or a schedule.
      eta: added to the sizes, so that zero weights move too; at least 0, or a
        schedule.
      adapt: the adapted leaves: a bool for all, a tree of bools or a prefix of it,
        or a function from the parameters to one. Default: kernels, embeddings and
        gains of normalization layers, as ``roles`` tells them from biases, offsets
        and others.
      roles: what each leaf is, where ``adapt`` does not say it: a pytree of
        :class:`optax_sam.Role` or a function from the parameters to one; ``None``
        means :func:`optax_sam.roles`.

    Returns:
      A transformation from a gradient to an offset; it needs ``params``.

    Raises:
      ValueError: if ``rho`` or ``eta`` is negative, both ``adapt`` and ``roles`` are
        given, or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.adaptive(1.0, eta=0.0, adapt=True)
      >>> w, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 2.0])}
      >>> e, _ = rule.update(g, rule.init(w), w)
      >>> print(e["w"])
      [0.6 1.6]

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    rho = check_schedule("rho", rho, 0.0)
    eta = check_schedule("eta", eta, 0.0)
    if adapt is not None and roles is not None:
        raise ValueError(
            "adapt says which leaves are adapted, so that roles would not be read:"
            " write roles= alone, or"
            " adapt=lambda params: jax.tree.map(choose, roles(params))."
        )

    def update(
        g: Any, state: Any, params: Any, step: Step, **extra: Any
    ) -> tuple[Any, Any]:
        del extra
        check_params("An adaptive ascent", params)
        radius, eta_now = at(rho, step.count), at(eta, step.count)
        if adapt is None:
            adapted = jax.tree.map(is_weight, resolve_roles(roles, params))
        else:
            adapted = resolve_mask(adapt, params, name="adapt")

        def times_t(x: jax.Array, w: jax.Array, is_adapted: bool) -> jax.Array:
            return (jnp.abs(wide(w)) + eta_now) * wide(x) if is_adapted else wide(x)

        t_g = jax.tree.map(times_t, g, params, adapted)
        t2_g = jax.tree.map(times_t, t_g, params, adapted)
        return rescale(t2_g, norm(t_g), radius), state

    return ascent_rule(update)
