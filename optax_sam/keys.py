"""Keys: given by users, kept in states, and used for the draws of a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_sam.trees import widest


def check_key(key: ArrayLike) -> None:
    """Raises unless ``key`` is an int, a typed key or raw key data.

    It computes nothing, so you can call a factory before ``jax.distributed`` is
    initialized.
    """
    array = key if isinstance(key, (jax.Array, np.ndarray)) else np.asarray(key)
    integer = jnp.issubdtype(array.dtype, jnp.integer)
    typed = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    raw = array.dtype == np.uint32 and array.shape == (2,)
    if not (raw or (array.shape == () and (integer or typed))):
        raise ValueError(
            "key must be an int, a key from jax.random.key, or raw key data (two"
            f" uint32 words); got {key!r}."
        )


def raw_key(key: ArrayLike) -> jax.Array:
    """Two uint32 words from an int, raw key data or a typed key.

    State keeps raw words, because typed keys break Flax msgpack and pytree norms.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jnp.array(jax.random.key_data(key))  # a buffer that may be donated
        # A key of another generator is hashed into two words of ours.
        return data if data.shape == (2,) else jax.random.bits(key, (2,), jnp.uint32)
    if jnp.ndim(key) == 0:
        return jax.random.key_data(jax.random.key(key, impl="threefry2x32"))
    return jnp.array(key)


def draw(key: jax.Array, count: ArrayLike | None) -> jax.Array:
    """The generator that belongs to step ``count``: a function, never a state."""
    if count is None:
        raise ValueError(
            "A random rule needs the step: pass count=..., the number of steps taken so"
            " far (optax_sam.sharpness_aware does so)."
        )
    return jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count)


def uniform(key: jax.Array, count: ArrayLike) -> jax.Array:
    """The draw in [0, 1) that belongs to step ``count``."""
    return jax.random.uniform(draw(key, count))


# A rational function of 1 - u^2. It equals the normal quantile of (1 + u) / 2, divided
# by u, to 0.14 %, for the 65,536 numbers u that 16 bits make.
_NUMERATOR = (1.66786e8, 2.72776e8, 1.57253e7, 4.38714e4, 4.55022)
_DENOMINATOR = (2.14987e8, 1.42343e8, 5.47954e6, 1.18524e4, 1.0)


def normal_like(key: jax.Array, tree: Any) -> Any:
    """Standard normals like a pytree of floats, at least in float32, of 16 bits each.

    The bits of an element are a hash of the key's words, the leaf's number and the
    element's number, because the bits of a generator would take as long as a gradient.
    Each element is computed by itself, so XLA draws each part of a sharded leaf on its
    device. The largest normals have size 4.3.

    Args:
      key: a typed key.
      tree: arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    words = jax.random.key_data(key).ravel()[:2]

    def draw() -> Any:
        drawn = [_normals(words, i, leaf) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, drawn)

    if not isinstance(words, jax.core.Tracer):
        return draw()

    # On a CPU, XLA would draw a bias again for every example that it is added to. It
    # does not draw the result of a branch again, so the draw is in a branch that is
    # always taken.
    def otherwise() -> Any:
        full = lambda x: jnp.full(x.shape, words[0], widest(x))
        return jax.tree.map(full, tree)

    always = jnp.isfinite(words[0].astype(jnp.float32))
    once = lambda: jax.lax.cond(always, draw, otherwise)
    return jax.lax.platform_dependent(cpu=once, default=draw)


def _normals(words: jax.Array, leaf: int, like: Any) -> jax.Array:
    start = _mixed(words[0] + np.uint32(leaf))
    number, stride = jnp.zeros(like.shape, jnp.uint32), 1
    for axis in reversed(range(len(like.shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        number += along * np.uint32(stride % 2**32)
        stride *= like.shape[axis]
    bits = _mixed(_mixed(number + start) ^ _mixed(words[1] ^ start)) >> 16
    dtype = widest(like)
    u = (bits.astype(dtype) + 0.5) / 2**15 - 1
    x = (1 - u) * (1 + u)
    polynomial = lambda of: jnp.polyval(np.array(of, dtype), x, unroll=len(of))
    return u * polynomial(_NUMERATOR) / polynomial(_DENOMINATOR)


def _mixed(x: jax.Array) -> jax.Array:
    """Wellons' hash of 32 bits, in which each bit depends on all."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
