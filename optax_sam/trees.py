"""Arithmetic on pytrees in float32 or better: norms, products, sums, lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Added to a norm before dividing, outside the square root. The authors' codes have
# none, 1e-16, 1e-12 or 1e-7. 1e-12 makes no difference to a float32 gradient.
EPS = 1e-12


def widest(*values: Any) -> Any:
    """float64 if a value has it, else float32; complex if a value is.

    ``jnp.promote_types`` does not work here: in strict mode it refuses mixed dtypes.
    """
    dtypes = [jnp.result_type(x) for x in values]
    is_double = any(x in (jnp.float64, jnp.complex128) for x in dtypes)
    if any(jnp.issubdtype(x, jnp.complexfloating) for x in dtypes):
        return jnp.dtype(jnp.complex128 if is_double else jnp.complex64)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """The array in float32 or better."""
    return x.astype(widest(x))


def mapped(f: Callable[..., Any], num_axes: int) -> Callable[..., Any]:
    """``f`` of arrays that are stacked ``num_axes`` times, over layers or seeds."""
    for _ in range(num_axes):
        f = jax.vmap(f)
    return f


def add(a: Any, b: Any) -> Any:
    """The sum of two pytrees, in float32 or better."""

    def both(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = widest(x, y)
        return x.astype(dtype) + y.astype(dtype)

    return jax.tree.map(both, a, b)


def _total(values: list[jax.Array]) -> jax.Array:
    """The sum of scalars in the widest of their dtypes."""
    dtype = widest(*values)
    return sum((x.astype(dtype) for x in values), start=jnp.zeros((), dtype))


def inner(a: Any, b: Any) -> jax.Array:
    """The inner product over all leaves together, in float32 or better."""

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = widest(x, y)
        return jnp.sum(x.astype(dtype) * y.astype(dtype))

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return _total([product(x, y) for x, y in pairs])


def norm(tree: Any) -> jax.Array:
    """The l2 norm over all leaves together, accumulated in float32 or better."""
    return root(_total([jnp.sum(jnp.square(wide(x))) for x in jax.tree.leaves(tree)]))


def root(square: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0, so that a step can be differentiated."""
    positive = square > 0
    value = jnp.sqrt(jnp.where(positive, square, 1))
    return jnp.where(positive, value, jnp.where(jnp.isnan(square), square, 0))


def lift(length: jax.Array) -> jax.Array:
    """A factor for gradients of this norm, so that their squares do not vanish.

    In float32 squares of entries below 1e-19 vanish. The factor is a power of two, so
    it rounds nothing, and 1 for all but tiny gradients.
    """
    tiny = jax.lax.stop_gradient(length) < 1e-12
    return jnp.where(tiny, 2.0**80, 1).astype(length.dtype)


def tiny_norm(tree: Any) -> jax.Array:
    """The norm, correct also if the squares of the entries vanish."""
    factor = lift(norm(tree))
    return norm(scaled(tree, factor)) / factor


def rescale(tree: Any, length: jax.Array, radius: ArrayLike, eps: float = EPS) -> Any:
    """``radius * tree / (length + eps)``, in float32 or better.

    If the length is zero or not finite, there is no direction. Finite entries then give
    a zero offset. Other entries stay NaN, and the engine rejects such a step.
    """
    radius = jnp.asarray(radius, length.dtype)
    scale = jnp.where(length > 0, radius / (length + eps), 0)
    return scaled(tree, scale)


def beyond_rounding(length: jax.Array, reference: jax.Array) -> jax.Array:
    """The length of a difference, or 0 if it may be rounding error alone.

    A direction of rounding errors must not be scaled up to a given length.
    """
    noise = 100 * jnp.finfo(length.dtype).eps * reference
    return jnp.where(length <= noise, 0, length)


def cache(params: Any) -> Any:
    """Zeros like the parameters, in float32 or better."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=widest(p)), params)


def scaled(tree: Any, scale: jax.Array) -> Any:
    """``scale * tree``, each leaf in its own precision, float32 at least."""
    return jax.tree.map(lambda x: scale.astype(widest(x)) * wide(x), tree)


def weighted(a: jax.Array, x: Any, b: jax.Array, y: Any) -> Any:
    """The sum ``a x + b y`` of two pytrees, in float32 or better."""

    def add(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = widest(x, y)
        x, y = x.astype(dtype), y.astype(dtype)
        return a.astype(dtype) * x + b.astype(dtype) * y

    return jax.tree.map(add, x, y)


def along(a: Any, b: Any, eps: ArrayLike = 0.0) -> jax.Array:
    """The coefficient ``<a, b> / (||b||^2 + eps)`` of ``a`` along ``b``; 0 for zero."""
    square = inner(b, b) + eps
    return jnp.where(square > 0, inner(a, b) / jnp.where(square > 0, square, 1), 0)


def keep(tree: Any, chosen: Any) -> Any:
    """The pytree with zeros where ``chosen`` is False."""
    return jax.tree.map(lambda x, kept: x if kept else jnp.zeros_like(x), tree, chosen)


def of_length(tree: Any, length: jax.Array) -> Any:
    """The direction of a pytree, which may be tiny, at a given length."""
    lifted = scaled(tree, lift(norm(tree)))
    return rescale(lifted, norm(lifted), length, 0)
