"""Checks whether the copies of the parameters on several devices are equal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam.axes import mapped_axes, on_device


def replica_drift(tree: Any, axis_name: Any) -> jax.Array:
    r"""The difference between the copies of a pytree on several devices.

    .. math::
      \max_{\text{leaves}} \Big(\max_d \sum_i x^{(d)}_i - \min_d \sum_i x^{(d)}_i\Big)

    If you forget a ``pmean``, each device trains other weights. Under ``pmap`` and
    ``shard_map(check_vma=False)`` there is no error. This check reads each number once
    and sends two per leaf, so it can run every hundred steps. If sums differ by less
    than their rounding, a checksum of all bits shows the difference.

    Args:
      tree: a pytree that should be equal on all devices: parameters, the state of the
        optimizer, running statistics.
      axis_name: name, or tuple of names, of the mapped axis.

    Returns:
      The drift, () float32, the same on all devices. It is 0 if all copies are equal to
      the bit (a difference is missed with a probability of 2e-10). Otherwise it is the
      largest difference of a sum, at least 1e-30, or infinity if some devices hold a
      number that is not finite.

    Raises:
      ValueError: if ``axis_name`` is no mapped axis.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, optax_sam
      >>> on_all = functools.partial(jax.vmap, axis_name="data")  # or jax.pmap
      >>> drift = on_all(lambda w: optax_sam.replica_drift(w, "data"))
      >>> print(drift(jnp.ones((2, 3))), drift(jnp.array([[1.0, 2.0], [1.0, 2.5]])))
      [0. 0.] [0.5 0.5]
    """
    axes = mapped_axes(axis_name)
    arrays = [_plain(x) for x in jax.tree.leaves(tree)]
    if not arrays:
        return jnp.zeros((), jnp.float32)
    # The cast makes JAX compare values that it believes to be the same, too.
    arrays = on_device(arrays, axes)
    bits = sum(_checksum(x) * jnp.uint32(2 * i + 1) for i, x in enumerate(arrays))
    sums = jnp.stack([_sum(x) for x in arrays])
    largest = jax.lax.pmax(jnp.stack([bits, ~bits]), axes.names)
    # XLA's maximum over devices may ignore NaN.
    both = jnp.where(jnp.isnan(sums), jnp.inf, jnp.stack([sums, -sums]))
    extremes = jax.lax.pmax(both, axes.names)
    apart = jnp.max(extremes[0] + extremes[1])
    apart = jnp.where(jnp.isfinite(apart), jnp.maximum(apart, 1e-30), jnp.inf)
    return jnp.where(largest[0] == ~largest[1], 0.0, apart).astype(jnp.float32)


def _plain(x: Any) -> jax.Array:
    x = jnp.asarray(x) if not isinstance(x, jax.Array) else x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    # A bool or a half byte has no whole bytes to read.
    narrow = x.dtype == bool or x.dtype in (jnp.int4, jnp.uint4)
    return x.astype(jnp.int8) if narrow else x


def _checksum(x: jax.Array) -> jax.Array:
    """The bits, weighted by odd numbers, modulo 2^32: one changed number is seen."""
    size = x.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += index * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    weights = (place * np.uint32(2654435769)) | np.uint32(1)  # 2^32 / golden ratio
    return jnp.sum(words * weights, dtype=jnp.uint32)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32))
