"""The loss along eigenvectors, beside the parabolas of the eigenvalues."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam.masks import Mask
from optax_sam.sharpness.eigen import EigenResult
from optax_sam.sharpness.landscape import losses_at, step_vector
from optax_sam.sharpness.objective import LossFn, Objective, chosen_part, objective
from optax_sam.trees import inner


class EigenLines(NamedTuple):
    """Losses along eigenvectors.

    Attributes:
      alphas: ``(A,)``, the steps, as distances in the space of the weights, because
        eigenvectors have length one.
      losses: ``(k, A)``, the losses.
      parabolas: ``(k, A)``, the losses to second order in the step.
      eigenvalues: ``(k,)``, the curvatures of the parabolas.
    """

    alphas: jax.Array
    losses: jax.Array
    parabolas: jax.Array
    eigenvalues: jax.Array


def loss_along_eigenvectors(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    eigen: EigenResult,
    alphas: ArrayLike,
    *,
    mask: Mask = None,
    weights: Any = None,
    axis_name: Any = None,
) -> EigenLines:
    r"""The mean loss along each eigenvector, and its expansion to second order.

    .. math:: L(w + \alpha\, v_i) \quad \text{beside} \quad
       L(w) + \alpha\, v_i^\top \nabla L(w) + \tfrac{1}{2} \alpha^2 \lambda_i

    Where the two differ, the curvature at ``w`` no longer describes the loss. For a
    plane along two eigenvectors give ``(eigen.vector(0), eigen.vector(1))`` to
    :func:`loss_surface`.

    It costs a gradient, and a forward pass over the batches for each of ``k * A``
    points.

    Args:
      loss_fn: as in :func:`loss_line`.
      params: the weights ``w``.
      batches: as in :func:`loss_line`.
      eigen: what :func:`hessian_eigenvalues` or :func:`eigenvalues` returned.
      alphas: ``(A,)``, where to evaluate.
      mask: the mask with which the eigenvectors were computed; as in
        :func:`loss_line`.
      weights: as in :func:`loss_line`.
      axis_name: as in :func:`loss_line`.

    Returns:
      An :class:`EigenLines`, for ``optax_sam.plots.loss_along_eigenvectors``.

    Raises:
      ValueError: if ``eigen`` is no :class:`EigenResult`, and as :func:`loss_line`
        does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: jnp.mean(1 - jnp.cos(batch @ w))
      >>> args = loss, jnp.zeros(2), jnp.array([[[3.0, 0.0], [0.0, 1.0]]])
      >>> top = sharpness.hessian_eigenvalues(*args, 0)
      >>> found = sharpness.loss_along_eigenvectors(*args, top, jnp.array([0.2, 1.0]))
      >>> print(found.losses.round(2), found.parabolas.round(2))
      [[0.09 0.99]] [[0.09 2.25]]
    """
    if not isinstance(eigen, EigenResult):
        raise ValueError(
            "eigen must be an EigenResult from sharpness.hessian_eigenvalues or"
            f" sharpness.eigenvalues; got {eigen!r}."
        )
    options: Any = dict(mask=mask, weights=weights, axis_name=axis_name)
    o = objective(loss_fn, params, batches, **options)
    a, k = step_vector("alphas", alphas), len(eigen.eigenvalues)
    part = lambda i: chosen_part("eigen.vector", eigen.vector(i), params, o.w)
    vectors = tuple(o.vary(part(i)) for i in range(k))
    # All lines in one program: each point is a multiple of one of the vectors.
    points = jnp.eye(k)[:, None, :] * a[:, None]
    losses = losses_at(o, vectors, points.reshape(-1, k)).reshape(k, -1)

    def here(o: Objective, batch: Any) -> tuple[jax.Array, Any]:
        return jax.value_and_grad(lambda w: o.loss(w, batch))(o.w)

    loss, gradient = o.mean(here)
    slopes = jnp.stack([inner(gradient, part(i)) for i in range(k)])
    values = eigen.eigenvalues
    parabolas = loss + slopes[:, None] * a + 0.5 * values[:, None] * a**2
    return EigenLines(a, losses, parabolas, values)
