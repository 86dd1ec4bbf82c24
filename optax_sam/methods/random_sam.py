"""R-SAM: random sharpness-aware minimization (Liu et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import optax
from jax.typing import ArrayLike

from optax_sam.ascent.noise import unit_noise
from optax_sam.keys import check_key, raw_key
from optax_sam.masks import Mask, resolve_nonempty_mask
from optax_sam.method import WithoutMask, method, on_engine
from optax_sam.parts import OwnGradient, Step, ascent_rule
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import add, keep, norm, rescale, wide


class SmoothedState(NamedTuple):
    """State of :func:`smoothed`.

    Attributes:
      key: raw key data, (2,) uint32; the noise is a function of it and the step.
    """

    key: jax.Array


def smoothed(
    rho: optax.ScalarOrSchedule,
    sigma: optax.ScalarOrSchedule = 5e-4,
    gradient_weight: optax.ScalarOrSchedule = 2.0,
    key: ArrayLike = 0,
    *,
    mask: Mask = None,
    roles: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The ascent of :func:`optax_sam.random_sam`: starts at randomly smoothed weights.

    It does not use the gradient at ``w``. It computes another one, :math:`g_1`, and
    passes it to the engine as an :class:`optax_sam.ascent.OwnGradient`. The engine
    emits :math:`g_1` if it rejects the perturbed gradient. Output units are counted
    along the axes that :func:`optax_sam.roles` finds: several in Flax's attention, the
    first one in Equinox, else the last. If a leaf holds stacked layers (``nn.scan``),
    each layer counts separately, also in biases. 1e-16 is added to the norm of a leaf
    that has no units.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      sigma: size of the noise relative to the norm of a unit's weights, at least 0,
        or a schedule. Each entry is this share of the norm times a normal number, so
        the noise of a unit with ``n`` inputs is ``sigma * sqrt(n)`` times as long as
        its weights.
      gradient_weight: weight ``lambda`` of the gradient against the noise, at least
        0, or a schedule. The gradient is not normalized, so this depends on the scale
        of the loss.
      key: an int, a key from ``jax.random.key``, or raw key data, for the noise. With
        ``axis_name`` each device draws its own noise.
      mask: the leaves that are smoothed and perturbed, a pytree of bools like the
        parameters or a prefix of it, or a function from the parameters to one;
        ``None`` means all.
      roles: what each leaf is, for units and stacked layers: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.

    Returns:
      A transformation from a gradient to an offset; it needs ``params``, ``grad_fn``
      and ``count``. The extra argument ``noise``, a pytree of standard normals like the
      parameters, replaces its draw.

    Raises:
      ValueError: if ``rho``, ``sigma`` or ``gradient_weight`` is negative, ``key`` is
        no key, or ``params``, ``grad_fn`` or ``count`` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.smoothed(0.1, sigma=0.01)
      >>> grad_fn = jax.grad(lambda w: (w**2).sum())
      >>> w = jnp.array([3.0, 4.0])
      >>> own, _ = rule.update(grad_fn(w), rule.init(w), w, grad_fn=grad_fn, count=0)
      >>> print(jnp.linalg.norm(own.offset))
      0.1
    """
    rho = check_schedule("rho", rho, 0.0)
    sigma = check_schedule("sigma", sigma, 0.0)
    gradient_weight = check_schedule("gradient_weight", gradient_weight, 0.0)
    check_key(key)

    def update(g: Any, state: Any, params: Any, step: Step, /, **extra: Any) -> Any:
        sigma_now, given = at(sigma, step.count), extra.get("noise")
        chosen = resolve_nonempty_mask(mask, params, name="mask")
        delta = unit_noise(sigma_now, params, state.key, step, given, roles)
        delta = keep(delta, chosen)
        g_1 = extra["grad_fn"](add(params, delta))
        weight = at(gradient_weight, step.count)
        d_1 = keep(jax.tree.map(lambda x, z: weight * wide(x) + z, g_1, delta), chosen)
        return OwnGradient(rescale(d_1, norm(d_1), at(rho, step.count)), g_1), state

    def init(params: Any) -> SmoothedState:
        return SmoothedState(raw_key(key))

    return ascent_rule(update, init, needs=("params", "grad_fn"))


@method(smoothed)
def random_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    sigma: optax.ScalarOrSchedule = 5e-4,
    gradient_weight: optax.ScalarOrSchedule = 2.0,
    key: ArrayLike = 0,
    roles: Any = None,
    mask: Mask = None,
    **options: Unpack[WithoutMask],
) -> optax.GradientTransformationExtraArgs:
    r"""R-SAM: computes the direction of the perturbation at randomly smoothed weights.

    .. math::
      \Delta_u &= \sigma\, \|W_u\|\, z_u, \quad z \sim \mathcal N(0, I)
        && \text{for each output unit } u \\
      g_1 &= \nabla L(w + \Delta), \qquad
      e = \rho\, \frac{\lambda g_1 + \Delta}{\|\lambda g_1 + \Delta\|}, \qquad
      d = \nabla L(w + e)

    A leaf that is neither a kernel nor an embedding is one unit. If it holds stacked
    layers, each layer is one unit. Units are counted along the axes that
    :func:`optax_sam.roles` finds. The authors let the noise grow by a half cosine to
    five times its start:
    ``sigma=optax.cosine_decay_schedule(5e-4, total_steps, alpha=5.0)``. Their ``rho``
    follows the learning rate (:func:`optax_sam.rho_from_lr`). ``sigma=0`` is SAM.

    The gradient at ``w`` is not used on perturbed steps. Under ``jit`` XLA drops its
    computation, so the cost is 2 gradients and not 3. This requires that nothing else
    uses it, such as a logged norm. ``optax_sam.metrics`` has the norm of :math:`g_1` in
    its place.

    Cost: 2 gradients per perturbed step; a few scalars and a key of state. If a rule
    ``when`` skips steps, a perturbed step costs 3 in the program with the conditional,
    and 2 in :func:`optax_sam.dispatch`.

    Returns:
      A transformation for the first place in an ``optax.chain``. Its ``update`` needs
      ``grad_fn``. The extra argument ``noise``, a pytree of standard normals like the
      parameters, replaces its draw.

    Raises:
      ValueError: if ``rho``, ``sigma`` or ``gradient_weight`` is negative, or ``key``
        is no key.

    Examples:
      >>> import optax, optax_sam
      >>> grow = optax.cosine_decay_schedule(5e-4, decay_steps=50, alpha=5.0)
      >>> tx = optax.chain(optax_sam.random_sam(rho=0.05, sigma=grow), optax.sgd(0.1))

    Differs from the authors' code in:
      1. Each leaf has its own noise; there, leaves of one shape share it, and the
         dropout keys come from the same key.
      2. Schedules start at step 0; their schedule of ``sigma`` starts at 1.
      3. The chain clips the emitted gradient to norm 1 and applies Adam; there the
         method does.

    References:
      Liu et al., Random Sharpness-Aware Minimization, NeurIPS 2022; code:
      RSAM-Optimizer/R-SAM
    """
    rule = smoothed(rho, sigma, gradient_weight, key, mask=mask, roles=roles)
    return on_engine("random_sam", options, ascent=rule)
