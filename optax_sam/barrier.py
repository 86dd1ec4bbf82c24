"""A gradient that is computed once, before its uses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def gradients(tree: Any) -> Any:
    """The arrays of a gradient, as things that are computed before they are used.

    A gradient has several uses here, its norm and the offset among them. Where the
    parameters are sharded, XLA otherwise lets each cut its part out of the whole and
    keeps the whole on every device meanwhile, through the perturbed gradient too. Not
    so for a CPU: there the norm of a convolution's gradient would be taken of a
    transposed copy, made for that alone.
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
