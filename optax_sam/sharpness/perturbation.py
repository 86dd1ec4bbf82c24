"""The rise of the loss at random offsets, and at the offset of a SAM step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam import schedules
from optax_sam.masks import Mask
from optax_sam.sharpness.auto_pgd import Ball
from optax_sam.sharpness.data import each
from optax_sam.sharpness.objective import LossFn, Objective, objective
from optax_sam.sharpness.probes import standard_error, typed_key
from optax_sam.sharpness.worst_case import check_norm, scale
from optax_sam.trees import of_length


class AverageSharpness(NamedTuple):
    """The mean rise of the loss over random offsets.

    Attributes:
      value: the mean over all batches and draws, in units of the loss.
      stderr: the standard error of ``value``, over the draws; NaN with one draw.
      per_batch: ``(B,)``, the mean over the draws for each batch.
    """

    value: jax.Array
    stderr: jax.Array
    per_batch: jax.Array


class SamSharpness(NamedTuple):
    """The rise of the loss along the offset of one SAM step.

    Attributes:
      value: the mean of ``per_batch`` over all batches, in units of the loss.
      per_batch: ``(B,)``, the rise for each batch along its own gradient.
    """

    value: jax.Array
    per_batch: jax.Array


def average_sharpness(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    rho: ArrayLike,
    key: ArrayLike,
    *,
    adaptive: bool = False,
    norm: Ball = "l2",
    num_samples: int = 20,
    antithetic: bool = True,
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> AverageSharpness:
    r"""The mean rise of the loss at random offsets of a given size.

    .. math::
      S_{\mathrm{avg}} = \operatorname{mean}_S \mathbb{E}_z
      \big[ L_S(w + c \odot z) - L_S(w) \big], \qquad
      z \sim N(0, \rho^2 I) \text{ or } U[-\rho, \rho]^n

    with :math:`c = 1`, or :math:`c = |w|` if it is adaptive. On a quadratic it is
    :math:`\rho^2 / 2` times :math:`\sum_i c_i^2 H_{ii}` (l2), or a third of this
    (linf). The norm of the offsets is about :math:`\rho \sqrt{n}`, so do not compare
    these radii with the radii of a worst case.

    All batches get the same draws. For each batch, a draw costs two values, or one if
    it is not antithetic. Each batch costs one more value. Memory does not grow with the
    number of draws.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch; deterministic,
        so dropout off and BatchNorm with its running averages.
      params: the weights ``w``; leaves in half precision are widened to float32.
      batches: a pytree of arrays ``(B, m, ...)``: ``B`` batches of ``m`` examples; or a
        list, a loader or a generator of them, as for :func:`hessian`.
      rho: size of an offset's entries, above 0, in units of the weights; relative to
        them if adaptive. The paper has 0.05 to 0.4 (CNN), 0.1 to 0.8 (ViT, adaptive).
      key: an int, typed key or raw key data, for the draws.
      adaptive: whether offsets are relative to the sizes of the weights.
      norm: ``"l2"``: normal entries with standard deviation ``rho``; ``"linf"``:
        uniform ones up to ``rho``.
      num_samples: the number of draws, at least 2 for a standard error.
      antithetic: whether each draw is used with both signs, which removes the term of
        first order, :math:`g^\top \delta`, exactly.
      mask: the leaves that move: a pytree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.
      weights: ``(B,)``, the examples that count in each batch; ``None``: all alike.
      axis_name: name of a mapped axis over which the batches are spread; ``per_batch``
        is then each device's own.

    Returns:
      The mean with its standard error, as an :class:`AverageSharpness`.

    Raises:
      ValueError: if ``rho`` is not above 0, ``norm`` is unknown, the key is not valid,
        or as :func:`hvp` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: jnp.mean(jnp.square(w))  # H = I for two weights
      >>> result = sharpness.average_sharpness(
      ...     loss, jnp.ones(2), jnp.zeros((1, 1)), 0.1, 0, num_samples=10_000)
      >>> print(f"{result.value:.3f} +- {result.stderr:.4f}")  # rho^2 / 2 times 2
      0.010 +- 0.0001

    References:
      Andriushchenko et al., `A Modern Look at the Relationship between Sharpness and
      Generalization <https://arxiv.org/abs/2302.07011>`_, 2023
    """
    o = objective(
        loss_fn, params, batches, mask=mask, weights=weights, axis_name=axis_name
    )
    schedules.check_number("rho", rho, 0, open_low=True)
    check_norm(norm)
    schedules.check_integer("num_samples", num_samples, 1)
    c = scale(o.w, adaptive)
    leaves, structure = jax.tree.flatten(c)

    def draw(key: jax.Array, c: jax.Array) -> jax.Array:
        radius = jnp.asarray(rho, c.dtype)
        if norm == "l2":
            return c * radius * jax.random.normal(key, c.shape, c.dtype)
        return c * radius * jax.random.uniform(key, c.shape, c.dtype, -1, 1)

    before = o.each(Objective.loss_here)

    def rises(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(leaves))
        d = jax.tree.unflatten(structure, map(draw, keys, leaves))

        return o.each(_mean_of_both if antithetic else _one_side, d) - before

    # (draws, B): one draw after the other, so that only one lives in memory.
    rise = each(o.on_host, rises, jax.random.split(typed_key(key), num_samples))
    of_draws = o.mean_of(rise.T)
    return AverageSharpness(
        value=of_draws.mean(),
        stderr=standard_error(of_draws),
        per_batch=rise.mean(axis=0),
    )


def _one_side(o: Objective, batch: Any, d: Any) -> jax.Array:
    return o.loss(jax.tree.map(jnp.add, o.w, d), batch)


def _mean_of_both(o: Objective, batch: Any, d: Any) -> jax.Array:
    plus = o.loss(jax.tree.map(jnp.add, o.w, d), batch)
    return (plus + o.loss(jax.tree.map(jnp.subtract, o.w, d), batch)) / 2


def sam_sharpness(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    rho: ArrayLike,
    *,
    adaptive: bool = False,
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> SamSharpness:
    r"""The rise of the loss along one SAM step, batch by batch.

    .. math::
      \operatorname{mean}_S L_S(w + e_S) - L_S(w), \qquad
      e_S = \rho\, T^2 g_S / \|T g_S\|

    with :math:`g_S` the gradient of the same batch, and :math:`T = 1` as in SAM, or
    :math:`T = |w|` if it is adaptive. It is a lower bound of the worst case. The bound
    is close if the gradient is large, and poor near a minimum, where the gradient says
    little about the curvature. If ``T g`` is 0, the rise is 0. It costs one gradient
    and one value for each batch.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch; deterministic,
        so dropout off and BatchNorm with its running averages.
      params: the weights ``w``; leaves in half precision are widened to float32.
      batches: a pytree of arrays ``(B, m, ...)``: ``B`` batches of ``m`` examples; or a
        list, a loader or a generator of them, as for :func:`hessian`.
      rho: radius, above 0, in units of the weights; relative to them if adaptive.
      adaptive: whether the offset is ASAM's (with its ``eta`` 0, on all leaves).
      mask: the leaves that move: a pytree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.
      weights: ``(B,)``, the examples that count in each batch; ``None``: all alike.
      axis_name: name of a mapped axis over which the batches are spread; ``per_batch``
        is then each device's own.

    Returns:
      The rise, as a :class:`SamSharpness`.

    Raises:
      ValueError: if ``rho`` is not above 0, or as :func:`hvp` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2)
      >>> batches = jnp.eye(2)[None] * jnp.sqrt(2)  # one batch, H = I
      >>> result = sharpness.sam_sharpness(loss, jnp.array([3.0, 4.0]), batches, 0.1)
      >>> print(f"{result.value:.3f}")  # rho |w| + rho^2 / 2
      0.505

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_,
      2021; Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    o = objective(
        loss_fn, params, batches, mask=mask, weights=weights, axis_name=axis_name
    )
    schedules.check_number("rho", rho, 0, open_low=True)
    radius = jnp.asarray(rho)

    def rise(o: Objective, batch: Any) -> jax.Array:
        value, g = jax.value_and_grad(lambda w: o.loss(w, batch))(o.w)
        T = scale(o.w, adaptive)
        # Of full length near a minimum, too, where the gradient is tiny.
        u = of_length(jax.tree.map(jnp.multiply, T, g), radius)
        there = jax.tree.map(lambda w, t, u: w + t * u.astype(w.dtype), o.w, T, u)
        return o.loss(there, batch) - value

    per_batch = o.each(rise)
    return SamSharpness(o.mean_of(per_batch), per_batch)
