"""Keys: what users give, what states keep, what a step draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def check_key(key: ArrayLike) -> None:
    """Raises unless ``key`` is an int, a typed key or raw key data.

    It computes nothing, so that a factory may be called before ``jax.distributed`` is
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

    State keeps raw words, because typed keys break Flax msgpack and tree norms.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(key)
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
