"""Curvature as a function of a vector: Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.typing import ArrayLike

from optax_sam.masks import Mask
from optax_sam.sharpness.objective import (
    LossFn,
    Objective,
    chosen_part,
    objective,
)

Mode = Literal["fwd_rev", "rev_rev"]


class Operator(NamedTuple):
    """A symmetric linear map on trees.

    Attributes:
      matvec: the map, from a tree like ``like`` to another one.
      like: a tree of arrays of the shapes and dtypes that it acts on.
      size: ``n``, the number of entries.
      to_params: a vector as a tree like all parameters, with zeros in those left out.
    """

    matvec: Callable[[Any], Any]
    like: Any
    size: int
    to_params: Callable[[Any], Any]


def hvp(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    v: Any,
    *,
    mode: Mode = "fwd_rev",
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> Any:
    r"""The product of the Hessian of the mean loss with a vector.

    .. math:: H v = \frac{d}{dt} \nabla L(w + t v) \Big|_{t = 0},
       \qquad L = \sum_S p_S L_S, \quad p_S \text{ the share of batch } S

    One forward derivative through one gradient, a batch at a time: about two to three
    times a gradient's operations and at most a few times its memory, whatever the
    number of parameters.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch; deterministic,
        so dropout off and BatchNorm with its running averages.
      params: the weights ``w``; leaves in half precision are widened to float32.
      batches: a tree of arrays ``(B, m, ...)``: ``B`` batches of ``m`` examples.
      v: a tree like ``params``; what it holds in leaves that are left out is ignored.
      mode: ``"fwd_rev"``; ``"rev_rev"``, about 1.7 times as dear, for models whose
        backward pass has no forward derivative (a ``custom_vjp`` inside another's).
      mask: the leaves to look at: a tree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.
      weights: ``(B,)``, the examples that count in each batch; ``None``: all alike.
      axis_name: name of a mapped axis over which the batches are spread.

    Returns:
      ``Hv``, a tree like ``params``, zero in leaves that are left out.

    Raises:
      ValueError: if the loss is no scalar, the batches are empty, ``v`` has another
        structure or shape than the parameters, a chosen leaf is not real, or the mask
        selects nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2)
      >>> batches = jnp.eye(2)[None] * jnp.sqrt(2)  # one batch, H = I
      >>> print(sharpness.hvp(loss, jnp.ones(2), batches, jnp.array([3.0, 4.0])))
      [3. 4.]

    References:
      Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
    """
    options: Any = dict(mode=mode, mask=mask, weights=weights, axis_name=axis_name)
    operator = hessian_operator(loss_fn, params, batches, **options)
    v = chosen_part("v", v, params, operator.like)
    return operator.to_params(operator.matvec(v))


def hessian_operator(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    *,
    mode: Mode = "fwd_rev",
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> Operator:
    r"""The Hessian of the mean loss as a linear operator on the chosen leaves.

    The estimators of this package take an operator where the functions named after the
    Hessian take a loss, so that they serve a Gauss-Newton or Fisher matrix as well:
    write an :class:`Operator` with its ``matvec``.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch.
      params: the weights.
      batches: a tree of arrays ``(B, m, ...)``.
      mode: as in :func:`hvp`.
      mask: as in :func:`hvp`; the vectors have no entries for leaves left out.
      weights: as in :func:`hvp`.
      axis_name: as in :func:`hvp`.

    Returns:
      The operator. It may be used while what it was made from lives, so inside the
      same ``jit``.

    Raises:
      ValueError: as :func:`hvp` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2)
      >>> H = sharpness.hessian_operator(loss, jnp.ones(2), jnp.eye(2)[None])
      >>> print(H.size, H.matvec(jnp.array([2.0, 4.0])))
      2 [1. 2.]
    """
    if mode not in ("fwd_rev", "rev_rev"):
        raise ValueError(f'mode must be "fwd_rev" or "rev_rev"; got {mode!r}.')
    o = objective(
        loss_fn, params, batches, mask=mask, weights=weights, axis_name=axis_name
    )
    return of_objective(o, mode)


def of_objective(o: Objective, mode: Mode = "fwd_rev") -> Operator:
    """The Hessian of an objective."""

    def matvec(v: Any) -> Any:
        def of_batch(batch: Any) -> Any:
            gradient = jax.grad(lambda w: o.loss(w, batch))
            if mode == "fwd_rev":
                return jax.jvp(gradient, (o.w,), (o.vary(v),))[1]
            return jax.grad(lambda w: optax.tree.vdot(gradient(w), o.vary(v)))(o.w)

        return o.mean(of_batch)

    size = sum(x.size for x in jax.tree.leaves(o.w))
    return Operator(matvec, o.w, size, o.like_params)
