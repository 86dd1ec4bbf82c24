"""Random noise on the weights, as large as the weights of each output unit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.keys import check_key, normal_like, raw_key
from optax_sam.parts import Step, ascent_rule
from optax_sam.roles import Role, resolve_roles
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import root, wide


class FilterNoiseState(NamedTuple):
    """State of :func:`filter_noise`.

    Attributes:
      key: raw key data, (2,) uint32; the noise is a function of it and the step.
    """

    key: jax.Array


def filter_noise(
    gamma: optax.ScalarOrSchedule, key: ArrayLike = 0, *, roles: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""The perturbation of :func:`optax_sam.mrwp`: random noise, without a gradient.

    .. math::
      e_u = \gamma\, \|W_u\|\, z_u, \quad z \sim \mathcal N(0, I)
        \qquad \text{for each output unit } u

    It uses no gradient, so the perturbed gradient does not depend on the gradient at
    ``w``. Alone in :func:`optax_sam.sharpness_aware` it is RWP. With ``axis_name`` each
    device or shard draws its own noise, and the emitted mean is LPF-SGD. Neither uses
    the gradient at ``w``. Pass zeros to ``tx.update`` in its place
    (``jax.tree.map(jnp.zeros_like, params)``): a step then costs 1 gradient. If the
    perturbed gradient is not finite, such a step emits zeros.

    Args:
      gamma: size of the noise relative to the norm of a unit's weights, at least 0, or
        a schedule. Each entry is this share of the norm times a normal number, so the
        noise of a unit with ``n`` inputs is ``gamma * sqrt(n)`` times as long as its
        weights.
      key: an int, a key from ``jax.random.key``, or raw key data, for the noise. With
        ``axis_name`` each device draws its own noise.
      roles: what each leaf is, for units and stacked layers: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.

    Returns:
      A transformation from a gradient to an offset; it needs ``params`` and ``count``.
      The extra argument ``noise``, a pytree of standard normals like the parameters,
      replaces its draw.

    Raises:
      ValueError: if ``gamma`` is negative, ``key`` is no key, or ``params`` or
        ``count`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.filter_noise(0.5)
      >>> w = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]])}
      >>> z = {"kernel": jnp.ones((2, 2))}
      >>> e, _ = rule.update(w, rule.init(w), w, noise=z)
      >>> print(e["kernel"][0])
      [2.5 0.5]

    References:
      Bisla et al., `Low-Pass Filtering SGD for Recovering Flat Optima in the Deep
      Learning Optimization Landscape <https://arxiv.org/abs/2201.08025>`_, 2022
    """
    gamma = check_schedule("gamma", gamma, 0.0)
    check_key(key)

    def update(g: Any, state: Any, params: Any, step: Step, /, **extra: Any) -> Any:
        size, given = at(gamma, step.count), extra.get("noise")
        return unit_noise(size, params, state.key, step, given, roles), state

    init = lambda params: FilterNoiseState(raw_key(key))
    return ascent_rule(update, init, needs=("params",))


def unit_noise(
    size: jax.Array, params: Any, key: jax.Array, step: Step, given: Any, roles: Any
) -> Any:
    """Noise as large as the weights, drawn here or made of ``given`` normals."""
    if given is None:
        given = normal_like(step.device_key(key), params)
    elif jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            "noise must be a pytree of standard normals, of the structure and the"
            " shapes of the parameters: optax.tree.random_like(key, params,"
            " jax.random.normal)."
        )

    def of_leaf(w: jax.Array, z: jax.Array, role: Role) -> jax.Array:
        sizes = _sizes(w, role)
        return size.astype(sizes.dtype) * sizes * jnp.asarray(z, sizes.dtype)

    return jax.tree.map(of_leaf, params, given, resolve_roles(roles, params))


def _sizes(w: jax.Array, role: Role) -> jax.Array:
    """The norm of each output unit of a kernel, or of the whole of another leaf."""
    axes = role.within_unit(w.ndim)
    sizes = root(jnp.sum(jnp.square(wide(w)), axes, keepdims=True))
    return sizes if role.output else sizes + 1e-16
