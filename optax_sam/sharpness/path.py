"""The path of a training run, projected on a plane (Li et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from optax_sam.masks import Mask
from optax_sam.sharpness.objective import chosen_part
from optax_sam.sharpness.weights import weights_of

Path = Sequence[Any]  # of pytrees like the parameters


class PathProjection(NamedTuple):
    """A path of weights in the plane of two directions through ``params``.

    Attributes:
      coordinates: ``(T, 2)``, the nearest points in the plane, in lengths of the
        directions; for several paths a dict of arrays by name.
      directions: the two pytrees like the parameters, for :func:`loss_surface`.
      share: ``(2,)``, the share of the path's variance along the first direction, and
        the share that the second one adds. The rest of the variance is outside of the
        plane.
    """

    coordinates: Any
    directions: tuple[Any, Any]
    share: np.ndarray


def project_path(
    path: Path | Mapping[str, Path],
    params: Any,
    directions: tuple[Any, Any] | None = None,
    *,
    mask: Mask = None,
) -> PathProjection:
    r"""Projects a path of weights on a plane, to draw it on a loss surface.

    .. math:: c_t = \operatorname{argmin}_c \| w + c_1 d_1 + c_2 d_2 - w_t \|

    The default directions are the two principal components of the path, which span the
    plane in which the weights moved most. The projection runs on the host, in float64.
    It takes memory for the path in float64, and an inner product of each pair of its
    weights.

    Args:
      path: the weights ``w_t`` of ``T`` checkpoints, pytrees like ``params``; or
        several paths by name, which then share the plane.
      params: the weights ``w``, the origin of the plane, such as the last of the path.
      directions: ``(d_1, d_2)``, two pytrees like ``params``, of any lengths and at any
        angle; ``None`` means the principal components, each of length one.
      mask: the leaves to look at: a pytree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.

    Returns:
      A :class:`PathProjection`, for ``optax_sam.plots.loss_surface``.

    Raises:
      ValueError: if the weights do not move, the directions are parallel or zero, the
        path is a straight line and there are no directions, or a checkpoint has another
        structure than the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> path = [jnp.array([4.0, 0.0, 1.0]), jnp.array([0.0, 2.0, 1.0]), jnp.ones(3)]
      >>> d, e, _ = jnp.eye(3)
      >>> found = sharpness.project_path(path, path[-1], (d, e))
      >>> print(found.coordinates[:, 0], found.coordinates[:, 1])
      [ 3. -1.  0.] [-1.  1.  0.]
      >>> print(sharpness.project_path(path, path[-1]).share.round(2))
      [0.99 0.01]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018; code: tomgoldstein/loss-landscape
    """
    w = weights_of(params, mask)
    origin, unravel = ravel_pytree(w)
    flat = lambda name, tree: np.asarray(
        ravel_pytree(chosen_part(name, tree, params, w))[0], np.float64
    )
    several = path if isinstance(path, Mapping) else {"": path}
    lengths = {name: len(points) for name, points in several.items()}
    points = [
        flat(f"path{f'[{name!r}]' if name else ''}[{i}]", tree)
        for name, trees in several.items()
        for i, tree in enumerate(trees)
    ]
    if len(points) < 2:
        raise ValueError(
            f"A path needs the weights of several checkpoints; got {len(points)}."
        )
    moved = np.stack(points) - np.asarray(origin, np.float64)
    spread = moved - moved.mean(0)
    variance = np.sum(spread**2)
    if not variance > 1e-24 * np.sum(
        np.square(points)
    ):  # of float64's rounding, or nan
        raise ValueError(
            "The weights of the path are all the same, or not finite. Keep a copy of"
            " each checkpoint: jax.tree.map(jnp.copy, params)."
        )
    if directions is None:
        D = _principal_components(spread)
    else:
        D = np.stack([flat(f"directions[{i}]", d) for i, d in enumerate(directions)])
    products = D @ D.T
    squared = np.linalg.det(products) / max(np.prod(np.diag(products)), 1e-300)
    if len(D) != 2 or not squared > 1e-10:  # the squared sine of the angle
        raise ValueError(
            "directions must be a pair of pytrees like params that are neither zero nor"
            " parallel."
        )
    coordinates = np.linalg.solve(products, D @ moved.T).T
    orthonormal = np.linalg.solve(np.linalg.cholesky(products), D @ spread.T)
    parts = np.split(coordinates, np.cumsum(list(lengths.values()))[:-1])

    def whole(d: np.ndarray) -> Any:
        pick = lambda other, x: jnp.zeros_like(other) if x is None else x
        return jax.tree.map(pick, params, unravel(jnp.asarray(d, origin.dtype)))

    return PathProjection(
        dict(zip(several, parts, strict=True)) if several is path else coordinates,
        (whole(D[0]), whole(D[1])),
        np.sum(orthonormal**2, 1) / variance,
    )


def _principal_components(spread: np.ndarray) -> np.ndarray:
    """The first two, ``(2, n)``, from the products of all pairs of checkpoints."""
    values, vectors = np.linalg.eigh(spread @ spread.T)
    if not values[-2] > 1e-10 * values[-1]:
        raise ValueError(
            "The path is a straight line, which spans no plane. Give directions=, or"
            " look at it with optax_sam.sharpness.interpolate_loss."
        )
    components = (vectors[:, :-3:-1] / np.sqrt(values[:-3:-1])).T @ spread
    # The sign with which the training run moved forward.
    forward = components @ (spread[-1] - spread[0])
    return np.where(forward < 0, -1, 1)[:, None] * components
