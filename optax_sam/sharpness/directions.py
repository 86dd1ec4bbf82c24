"""Random directions in which networks can be compared (Li et al., 2018)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam.masks import Mask
from optax_sam.roles import Role, resolve_roles
from optax_sam.sharpness.probes import typed_key
from optax_sam.sharpness.weights import weights_of, zeros


def filter_normalized_direction(
    key: ArrayLike,
    params: Any,
    *,
    norm: Literal["filter", "layer"] | None = "filter",
    ignore_1d: bool = True,
    filter_axis: int | tuple[int, ...] | None = None,
    mask: Mask = None,
    roles: Any = None,
) -> Any:
    r"""A random direction whose filters are as long as the filters of the weights.

    Along such directions, a network and a rescaled copy of it look alike. Along plain
    random directions they do not. The draws :math:`d` are standard normal. For each
    filter :math:`f`:

    .. math:: d_f \leftarrow \|w_f\|\, \frac{d_f}{\|d_f\| + 10^{-10}}

    Args:
      key: an int, a key from ``jax.random.key``, or raw key data. The draw of a leaf
        depends on its position in the pytree and not on the mask.
      params: the weights ``w``. The direction has their dtype, or float32 if that is
        narrower.
      norm: ``"filter"``; ``"layer"``, which treats a whole leaf as one filter; or
        ``None``, which leaves the draws as they are. In a leaf of stacked layers
        (``nn.scan``), each layer has separate filters.
      ignore_1d: whether only kernels and embeddings move. Biases, the gains and offsets
        of normalization layers, and all other leaves with at most one axis per layer
        then stay in place. If false, each of these is one filter.
      filter_axis: the axis or axes of a kernel along which its filters are counted,
        beside the axes of stacked layers. ``None`` means the output axes that ``roles``
        finds: the last one in Flax, with kernels ``(in, out)`` and ``(height, width,
        in, out)``; several for the heads of attention; the first one in Equinox.
      mask: the leaves to move: a pytree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.
      roles: what each leaf is: a pytree of :class:`optax_sam.Role` or a function from
        the parameters to one; ``None`` means :func:`optax_sam.roles`.

    Returns:
      A pytree like ``params``, zero in leaves that stay in place. Zero filters have
      zero directions.

    Raises:
      ValueError: if ``norm`` is unknown, a chosen leaf is no weight, such as a running
        statistic or a counter, or it has no axis ``filter_axis``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "bias": jnp.ones(2)}
      >>> d = sharpness.filter_normalized_direction(0, params)
      >>> print(jnp.linalg.norm(d["kernel"], axis=0).round(4), d["bias"])
      [5. 0.] [0. 0.]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018; code: tomgoldstein/loss-landscape
    """
    if norm not in ("filter", "layer", None):
        raise ValueError(f'norm must be "filter", "layer" or None; got {norm!r}.')
    key = typed_key(key)
    structure: Any = jax.tree.structure(params)
    chosen = structure.flatten_up_to(weights_of(params, mask))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = jax.tree.leaves(resolve_roles(roles, params))

    def direction(i: int, path: Any, leaf: Any, role: Role) -> Any:
        w = chosen[i]
        if w is None:
            return zeros(leaf)
        at_path = f"The parameter at {jax.tree_util.keystr(path) or 'the root'}"
        has_filters = role.is_matrix(w.ndim)
        if not has_filters and ignore_1d:
            return jnp.zeros_like(w)
        d = jax.random.normal(jax.random.fold_in(key, i), w.shape, w.dtype)
        if norm is None:
            return d
        axes = role.within_layer(w.ndim)
        if norm == "filter" and has_filters:
            kept = set(role.output)
            if filter_axis is not None:
                kept = _axes(filter_axis, w.ndim, at_path)
            axes = tuple(axis for axis in axes if axis not in kept)
        length = lambda x: jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))
        return d * (length(w) / (length(d) + 1e-10))

    directions = [
        direction(i, path, leaf, role)
        for i, ((path, leaf), role) in enumerate(zip(leaves, found, strict=True))
    ]
    return jax.tree.unflatten(structure, directions)


def _axes(filter_axis: int | tuple[int, ...], ndim: int, at_path: str) -> set[int]:
    axes = filter_axis if isinstance(filter_axis, tuple) else (filter_axis,)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{at_path} has {ndim} axes, so none is filter_axis={axis}. Flax"
                " counts the filters of a kernel along axis -1, PyTorch along axis 0:"
                " write filter_axis=-1, or leave it out (optax_sam.roles finds it)."
            )
    return {axis % ndim for axis in axes}
