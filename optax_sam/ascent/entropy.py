"""A step whose length follows the Renyi entropy of the gradient: the rule of RSAM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_sam.arguments import at
from optax_sam.ascent.rule import ascent_rule, norm, scaled, wide
from optax_sam.contract import check_number, check_schedule
from optax_sam.roles import Role, by_layer, resolve_roles
from optax_sam.step import Step

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
    r"""The step along the gradient that adds a Renyi-type regularizer, to first order.

    .. math::
      S_\alpha(g) = \frac{\sum_j |g_j|^{2\alpha}}{\|g\|^{2\alpha}}, \qquad
      e = -\mathrm{sign}(1 - \alpha)\, \rho\, \frac{S_\alpha(g)}{\|g\|^2}\, g,
      \qquad L(w + e) \approx L(w) - \mathrm{sign}(1 - \alpha)\, \rho\, S_\alpha(g)

    The sum runs over all coordinates, or over the layers with their norms: leaves, and
    the layers of a leaf of stacked ones (``nn.scan``). It goes
    uphill for ``alpha > 1`` and downhill for ``alpha < 1``. The length of the offset,
    :math:`\rho S_\alpha / \|g\|`, has no bound as the gradient vanishes.

    As in the authors' code 1e-16 is added to the sum and to the squared norm; for
    ``alpha = 2`` it takes over at norms below 1e-3. Here :math:`S_\alpha \le 1` still
    holds for ``alpha > 1``.

    Args:
      rho: weight of the regularizer, at least 0, or a schedule.
      alpha: order of the entropy, positive and not 1, or a schedule. Below 1 the sum
        grows with the number of weights to the power ``1 - alpha``, so ``rho`` must
        be smaller by orders of magnitude.
      layerwise: whether the sum runs over layers instead of coordinates.
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

    References:
      Zhang et al., `Rényi Sharpness <https://arxiv.org/abs/2510.07758>`_, 2025; code:
      QiaozheZhang/RSAM
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

    def update(
        g: Any, state: Any, params: Any, step: Step, **extra: Any
    ) -> tuple[Any, Any]:
        del extra
        n, a = norm(g), at(alpha, step.count)
        square = jnp.square(n) + _EPS
        length = jnp.sqrt(square)

        def powers(x: jax.Array, role: Role | None) -> jax.Array:
            # Divided before the power is taken, which float32 could not hold; and with
            # a logarithm, since XLA's power takes six times as long on a CPU.
            sizes = by_layer(norm, role)(x) if role else jnp.abs(wide(x))
            # Nothing has the logarithm of zero, and no derivative of it either.
            share = jnp.where(sizes > 0, sizes / length, 1)
            return jnp.sum(jnp.where(sizes > 0, jnp.exp(2 * a * jnp.log(share)), 0))

        leaves = jax.tree.leaves(g)
        layers = [None] * len(leaves)
        if layerwise:
            like = g if params is None else params
            layers = jax.tree.leaves(resolve_roles(roles, like))
        s = sum(map(powers, leaves, layers)) + _EPS / length ** (2 * a)
        # Shares to a power above 1 add up to 1 at most; with the epsilon those of a
        # small gradient would to anything.
        s = jnp.where(a > 1, jnp.minimum(s, 1), s)
        c = at(rho, step.count) * s / square
        if max_offset_norm is not None:
            c = jnp.minimum(c, max_offset_norm / jnp.where(n > 0, n, 1))
        c = jnp.where(n > 0, -jnp.sign(1 - a) * c, 0)
        return scaled(g, c), state

    return ascent_rule(update)
