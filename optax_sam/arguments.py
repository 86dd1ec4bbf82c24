"""How arguments are read: schedules, gradients, masks and keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

Mask = Any  # None, a bool, a (prefix) tree of bools, or a function params -> mask


def at(value: optax.ScalarOrSchedule, count: ArrayLike | None) -> jax.Array:
    """The value of a hyperparameter at step ``count``."""
    if not callable(value):
        return jnp.asarray(value)
    if count is None:
        raise ValueError(
            "A schedule needs the step: pass count=..., the number of steps taken so"
            " far (optax_sam.sharpness_aware does so)."
        )
    return jnp.asarray(value(count))


def gradients(tree: Any) -> Any:
    """The arrays of a gradient, as things that are computed before they are used.

    A gradient has several uses here, its norm and the offset among them. Where the
    parameters are sharded, XLA otherwise lets each cut its part out of the whole and
    keeps the whole on every device meanwhile, through the second gradient too. Not so
    for a CPU: there the norm of a convolution's gradient would be taken of a transposed
    copy, made for that alone.
    """

    def settled(x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        if not isinstance(x, jax.core.Tracer):
            return x
        return jax.lax.platform_dependent(
            x, cpu=lambda x: x, default=jax.lax.optimization_barrier
        )

    # Leaf by leaf, so that one that nobody uses is still not computed.
    return jax.tree.map(settled, tree)


def resolve_mask(mask: Mask, tree: optax.Params, *, name: str = "mask") -> Any:
    """A bool for every leaf of ``tree``; ``None`` means all of them."""
    if mask is None:
        mask = True
    if callable(mask):
        mask = mask(tree)

    def fill(choice: Any, subtree: Any) -> Any:
        if not isinstance(choice, (bool, np.bool_)):
            raise ValueError(
                f"{name} must hold Python bools (True: included), known while tracing;"
                f" got {choice!r}."
            )
        return jax.tree.map(lambda _: bool(choice), subtree)

    try:
        return jax.tree.map(fill, mask, tree)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a bool, a tree of bools that is the parameters' structure"
            " or a prefix of it, or a function that makes one from the parameters:"
            f" {error}"
        ) from error


def resolve_nonempty_mask(mask: Mask, tree: optax.Params, *, name: str) -> Any:
    """As :func:`resolve_mask`, for a mask that must include some leaf.

    A plain ``False`` says that none is meant.
    """
    chosen = resolve_mask(mask, tree, name=name)
    sizes = [np.prod(jnp.shape(x)) for x in jax.tree.leaves(tree)]
    if mask is not False and any(sizes) and not any(jax.tree.leaves(chosen)):
        raise ValueError(
            f"{name} includes none of the {len(sizes)} leaves of the parameters, so"
            " the method would do nothing. True includes a leaf: for instance"
            f" {name}=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)."
        )
    return chosen


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
