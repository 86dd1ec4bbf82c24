"""RSAM: Renyi sharpness-aware minimization (Zhang et al., arXiv 2510.07758, 2025)."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_sam.method import WithoutWhen, method, on_engine
from optax_sam.parts import Step, When, always, offset_rule
from optax_sam.roles import Role, by_layer, resolve_roles
from optax_sam.schedules import at, check_integer, check_number, check_schedule
from optax_sam.trees import norm, scaled, wide
from optax_sam.when.warmup import after

# Added to the sum and to the squared norm, as the authors do.
_EPS = 1e-16


def renyi(
    rho: optax.ScalarOrSchedule = 0.65,
    alpha: optax.ScalarOrSchedule = 1.2,
    *,
    layerwise: bool = False,
    max_offset_norm: ArrayLike | None = None,
    roles: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The ascent of :func:`optax_sam.renyi_sam`: a step along the gradient.

    It goes uphill for ``alpha > 1`` and downhill for ``alpha < 1``. As in the authors'
    code, 1e-16 is added to the sum and to the squared norm. For ``alpha = 2`` it
    dominates at norms below 1e-3. Here :math:`S_\alpha \le 1` still holds for
    ``alpha > 1``.

    Args:
      rho: weight of the regularizer, at least 0, or a schedule of the step.
      alpha: order of the entropy, positive and not 1, or a schedule. Below 1 the sum
        grows with the number of weights to the power ``1 - alpha``, so ``rho`` must
        be smaller by orders of magnitude.
      layerwise: whether the sum runs over the norms of layers instead of over
        coordinates. A layer is a leaf, or one of the stacked layers (``nn.scan``) in
        a leaf.
      max_offset_norm: the largest norm of the offset, positive; ``None`` means no
        limit.
      roles: what each leaf is, for stacked layers if ``layerwise``: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.

    Returns:
      A transformation from a gradient to an offset; a zero gradient gives a zero
      offset.

    Raises:
      ValueError: if ``rho`` is negative, ``alpha`` is 1 or not positive, or
        ``max_offset_norm`` is not positive.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.renyi(1.0, alpha=2.0)
      >>> g = {"w": jnp.array([1.0, -1.0])}
      >>> e, _ = rule.update(g, rule.init(g))
      >>> print(e["w"])  # S = 1 / 2
      [ 0.25 -0.25]
    """
    rho = check_schedule("rho", rho, 0.0)
    alpha = check_schedule("alpha", alpha, 0.0, open_low=True)
    known = not callable(alpha) and not isinstance(alpha, jax.core.Tracer)
    if known and float(np.asarray(alpha)) == 1:
        raise ValueError(
            "alpha must not be 1, where the regularizer is constant: alpha > 1"
            " (such as 1.2) climbs towards the sharp side, alpha < 1 descends."
        )
    if max_offset_norm is not None:
        max_offset_norm = check_number(
            "max_offset_norm", max_offset_norm, 0.0, open_low=True
        )

    def offset(g: Any, params: Any, step: Step) -> Any:
        n, a = norm(g), at(alpha, step.count)
        square = jnp.square(n) + _EPS
        length = jnp.sqrt(square)

        def powers(x: jax.Array, role: Role | None) -> jax.Array:
            # Divided before the power, because float32 could not hold the power. By a
            # logarithm, because XLA's power takes six times as long on a CPU.
            sizes = by_layer(norm, role)(x) if role else jnp.abs(wide(x))
            # Avoids the logarithm of zero, and its derivative.
            share = jnp.where(sizes > 0, sizes / length, 1)
            return jnp.sum(jnp.where(sizes > 0, jnp.exp(2 * a * jnp.log(share)), 0))

        leaves = jax.tree.leaves(g)
        layers = [None] * len(leaves)
        if layerwise:
            like = g if params is None else params
            layers = jax.tree.leaves(resolve_roles(roles, like))
        s = sum(map(powers, leaves, layers)) + _EPS / length ** (2 * a)
        # Shares to a power above 1 add up to 1 at most. With the epsilon, the sum would
        # have no bound for a small gradient.
        s = jnp.where(a > 1, jnp.minimum(s, 1), s)
        c = at(rho, step.count) * s / square
        if max_offset_norm is not None:
            c = jnp.minimum(c, max_offset_norm / jnp.where(n > 0, n, 1))
        c = jnp.where(n > 0, -jnp.sign(1 - a) * c, 0)
        return scaled(g, c)

    return offset_rule(offset)


@method(renyi)
def renyi_sam(
    rho: optax.ScalarOrSchedule = 0.65,
    *,
    alpha: optax.ScalarOrSchedule = 1.2,
    layerwise: bool = False,
    max_offset_norm: ArrayLike | None = None,
    warmup_steps: int = 0,
    roles: Any = None,
    when: When = always(),
    **options: Unpack[WithoutWhen],
) -> optax.GradientTransformationExtraArgs:
    r"""RSAM: the radius follows the Renyi entropy of the squared gradient.

    .. math::
      S_\alpha(g) = \frac{\sum_j |g_j|^{2\alpha}}{\|g\|^{2\alpha}}, \qquad
      e = -\mathrm{sign}(1 - \alpha)\, \rho\, \frac{S_\alpha(g)}{\|g\|^2}\, g,
      \qquad d = \nabla L(w + e)

    For ``alpha > 1`` it trains :math:`L + \rho S_\alpha` to first order.
    :math:`S_\alpha` is a surrogate for the entropy of the Hessian's spectrum. R-SAM is
    another method: :func:`optax_sam.random_sam`.

    The offset's length :math:`\rho S_\alpha / \|g\|` grows without bound as the
    gradient vanishes. Cap it with ``max_offset_norm`` if the loss comes near zero.
    :math:`S_\alpha` depends on the number of weights, so ``rho`` does not carry over
    from one model to another, least of all for ``alpha < 1``.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Args:
      warmup_steps: steps at the start that are not perturbed; the authors take five to
        six epochs.

    Raises:
      ValueError: if ``rho`` or ``warmup_steps`` is negative, ``alpha`` is 1 or not
        positive, or ``max_offset_norm`` is not positive.

    Examples:
      >>> import optax, optax_sam
      >>> rsam = optax_sam.renyi_sam(rho=0.01, max_offset_norm=0.1)
      >>> tx = optax.chain(rsam, optax.sgd(0.1))

    Differs from the authors' code in:
      1. The offset can be capped, a zero gradient gives a zero offset, and for
         ``alpha > 1`` their epsilon cannot lift the sum above its bound of 1.
      2. Warm-up is a number of steps; there it is a number of epochs, and on one data
         set it ends at an accuracy.
      3. The authors' class RSAM is ``layerwise=True``; their recipe uses NEWRSAM, the
         default here.

    References:
      Zhang et al., `Rényi Sharpness <https://arxiv.org/abs/2510.07758>`_, 2025; code:
      QiaozheZhang/RSAM
    """
    check_integer("warmup_steps", warmup_steps, 0)
    rule = renyi(
        rho, alpha, layerwise=layerwise, max_offset_norm=max_offset_norm, roles=roles
    )
    steps = after(warmup_steps, when) if warmup_steps else when
    return on_engine("renyi_sam", options, ascent=rule, when=steps)
