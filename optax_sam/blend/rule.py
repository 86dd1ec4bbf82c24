"""What a rule is, and the simplest one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.ascent.rule import inner
from optax_sam.step import Step


class Blend(NamedTuple):
    """A rule that makes one gradient out of two, or out of one and a memory.

    Attributes:
      init: ``init(params) -> state``.
      fresh: ``fresh(g, g_s, state, step) -> (d, state)`` on ascended steps. What it
        stores of a gradient must go through ``step.mean``.
      stale: ``stale(g, state, step) -> (d, state)`` on the other steps, and where an
        ascended gradient was not finite.
    """

    init: Callable[[Any], Any]
    fresh: Callable[[Any, Any, Any, Step], tuple[Any, Any]]
    stale: Callable[[Any, Any, Step], tuple[Any, Any]]


def take_ascended() -> Blend:
    """The ascended gradient where there is one, else the plain gradient: SAM.

    Returns:
      A rule for ``blend=``.

    Examples:
      >>> import optax_sam
      >>> tx = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.05), blend=optax_sam.blend.take_ascended())
    """
    return Blend(
        init=lambda params: optax.EmptyState(),
        fresh=lambda g, g_s, state, step: (g_s, state),
        stale=lambda g, state, step: (g, state),
    )


def along(a: Any, b: Any, eps: ArrayLike = 0.0) -> jax.Array:
    """The coefficient ``<a, b> / (||b||^2 + eps)`` of ``a`` along ``b``; 0 for zero."""
    square = inner(b, b) + eps
    return jnp.where(square > 0, inner(a, b) / jnp.where(square > 0, square, 1), 0)
