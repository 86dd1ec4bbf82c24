"""The loss along lines and planes through the weights (Li et al., 2018)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam.masks import Mask
from optax_sam.sharpness.objective import (
    LossFn,
    Objective,
    chosen_part,
    objective,
)


def loss_line(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    direction: Any,
    alphas: ArrayLike,
    *,
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> jax.Array:
    r"""The mean loss at points of a line through the weights.

    .. math:: L(w + \alpha\, d)

    It costs a forward pass over the batches for each point, one after the other.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch; deterministic,
        so dropout off and BatchNorm with its running averages. These averages belong to
        ``w``. Far from ``w`` they are wrong and change the curve, unless you estimate
        them again there.
      params: the weights ``w``.
      batches: a pytree of arrays ``(B, m, ...)``: ``B`` batches of ``m`` examples; or a
        list, a loader or a generator of them, as for :func:`hessian`.
      direction: ``d``, a pytree like ``params``, as from
        :func:`filter_normalized_direction`.
      alphas: ``(A,)``, where to evaluate, in lengths of ``d``: with filters
        normalized, 1 moves each filter by its own length.
      mask: the leaves to move: a pytree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.
      weights: ``(B,)``, the examples that count in each batch; ``None``: all alike.
      axis_name: name of a mapped axis over which the batches are spread.

    Returns:
      The losses, ``(A,)``, the same on all devices.

    Raises:
      ValueError: if the loss is no scalar, the batches are empty, ``direction`` has
        a different structure or shape from the parameters, ``alphas`` is no vector, a
        chosen leaf is not real, or the mask selects nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
      >>> batches, w = jnp.eye(2)[None], jnp.array([1.0, 2.0])
      >>> print(sharpness.loss_line(loss, w, batches, w, jnp.array([-1.0, 0.0, 1.0])))
      [ 0.   2.5 10. ]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018
    """
    options: Any = dict(mask=mask, weights=weights, axis_name=axis_name)
    o = objective(loss_fn, params, batches, **options)
    d = _like("direction", direction, o)
    return losses_at(o, (d,), step_vector("alphas", alphas)[:, None])


def loss_surface(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    directions: tuple[Any, Any],
    alphas: ArrayLike,
    betas: ArrayLike | None = None,
    *,
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> jax.Array:
    r"""The mean loss at points of a plane through the weights.

    .. math:: L(w + \alpha\, d + \beta\, d')

    It costs a forward pass over the batches for each of the ``A * B`` points. For a
    progress bar, loop on the host over slices of ``alphas`` of one length. They share
    one compiled program.

    Args:
      loss_fn: as in :func:`loss_line`.
      params: the weights ``w``.
      batches: as in :func:`loss_line`.
      directions: ``(d, d')``, two pytrees like ``params``. They are not made
        orthogonal, but two random ones almost are, in many dimensions.
      alphas: ``(A,)``, the steps along ``d``, in lengths of ``d``.
      betas: ``(B,)``, the steps along ``d'``; ``None`` means the same as ``alphas``.
      mask: as in :func:`loss_line`.
      weights: as in :func:`loss_line`.
      axis_name: as in :func:`loss_line`.

    Returns:
      The losses, ``(A, B)``, the same on all devices.

    Raises:
      ValueError: as :func:`loss_line` does, and if there are not two directions.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
      >>> batches, (d, e) = jnp.eye(2)[None], jnp.eye(2)
      >>> print(sharpness.loss_surface(
      ...     loss, jnp.zeros(2), batches, (d, e), jnp.arange(3.0), jnp.arange(2.0)))
      [[0. 0.5] [0.5 1. ] [2. 2.5]]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018
    """
    if not isinstance(directions, (tuple, list)) or len(directions) != 2:
        raise ValueError(
            "directions must be a pair of pytrees like params; got"
            f" {type(directions).__name__}"
            + (f" of {len(directions)}." if hasattr(directions, "__len__") else ".")
        )
    options: Any = dict(mask=mask, weights=weights, axis_name=axis_name)
    o = objective(loss_fn, params, batches, **options)
    pair = tuple(_like(f"directions[{i}]", d, o) for i, d in enumerate(directions))
    a = step_vector("alphas", alphas)
    b = a if betas is None else step_vector("betas", betas)
    points = jnp.stack(jnp.meshgrid(a, b, indexing="ij"), -1)
    return losses_at(o, pair, points.reshape(-1, 2)).reshape(len(a), len(b))


def interpolate_loss(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    other: Any,
    alphas: ArrayLike,
    *,
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> jax.Array:
    r"""The mean loss at points between two sets of weights, and beyond them.

    .. math:: L\big((1 - \alpha)\, w + \alpha\, w'\big)

    It costs a forward pass over the batches for each point. Between the two networks,
    the running averages of BatchNorm do not fit. Estimate them again at each point;
    otherwise they may cause a barrier.

    Args:
      loss_fn: as in :func:`loss_line`.
      params: the weights ``w``, at ``alpha = 0``. Leaves that are left out keep these
        values.
      batches: as in :func:`loss_line`.
      other: the weights ``w'``, at ``alpha = 1``.
      alphas: ``(A,)``, where to evaluate.
      mask: as in :func:`loss_line`.
      weights: as in :func:`loss_line`.
      axis_name: as in :func:`loss_line`.

    Returns:
      The losses, ``(A,)``, the same on all devices.

    Raises:
      ValueError: as :func:`loss_line` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
      >>> batches, w = jnp.eye(2)[None], jnp.array([1.0, 2.0])
      >>> print(sharpness.interpolate_loss(loss, w, batches, -w, jnp.linspace(0, 1, 3)))
      [2.5 0.  2.5]

    References:
      Goodfellow, Vinyals and Saxe, `Qualitatively characterizing neural network
      optimization problems <https://arxiv.org/abs/1412.6544>`_, 2015
    """
    options: Any = dict(mask=mask, weights=weights, axis_name=axis_name)
    o = objective(loss_fn, params, batches, **options)
    end, a = _like("other", other, o), step_vector("alphas", alphas)
    # As two shares: with a step from one end, rounding would miss the other end.
    start = dataclasses.replace(o, w=jax.tree.map(jnp.zeros_like, o.w))
    return losses_at(start, (o.w, end), jnp.stack([1 - a, a], -1))


def losses_at(
    o: Objective, directions: tuple[Any, ...], points: jax.Array
) -> jax.Array:
    """The losses at these multiples ``(P, D)`` of the directions, one by one."""

    def of_batch(o: Objective, batch: Any, directions: Any, points: Any) -> jax.Array:
        def at(point: jax.Array) -> jax.Array:
            step = lambda w, p, d: w + p.astype(w.dtype) * d
            w = o.w
            for p, d in zip(point, directions, strict=True):
                w = jax.tree.map(lambda w, d: step(w, p, d), w, d)  # noqa: B023
            return o.loss(w, batch)

        return jax.lax.map(at, points)

    return o.mean(of_batch, directions, o.vary(points))


def _like(name: str, tree: Any, o: Objective) -> Any:
    return o.vary(chosen_part(name, tree, o.params, o.w))


def step_vector(name: str, values: ArrayLike) -> jax.Array:
    """The steps to evaluate, ``(A,)``."""
    vector = jnp.asarray(values, jnp.result_type(float))
    if vector.ndim != 1 or not vector.size:
        raise ValueError(
            f"{name} must be a vector of the steps to evaluate, such as"
            f" jnp.linspace(-1, 1, 51); got shape {vector.shape}."
        )
    return vector
