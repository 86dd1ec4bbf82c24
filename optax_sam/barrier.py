"""A gradient that is computed once, before its uses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def gradients(tree: Any) -> Any:
    """The arrays of a gradient, computed before they are used.

    A gradient has several uses here, such as its norm and the offset. If the parameters
    are sharded, XLA would otherwise cut the part for each use out of the whole
    gradient. It would keep the whole on every device, also while it computes the
    perturbed gradient. On a CPU there is no barrier: with one, XLA would make a
    transposed copy of a convolution's gradient for its norm alone.
    """

    def settled(x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        if not isinstance(x, jax.core.Tracer):
            return x
        return jax.lax.platform_dependent(
            x, cpu=lambda x: x, default=jax.lax.optimization_barrier
        )

    # Leaf by leaf, so that XLA still drops a leaf that nothing uses.
    return jax.tree.map(settled, tree)
