"""The memory that a measure needs, known before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_sam.sharpness.data import is_streamed


class Memory(NamedTuple):
    """The memory of a measure beside its arguments.

    Attributes:
      temporary_bytes: what the compiled program allocates while it runs.
      parameter_bytes: the size of the parameters.
      parameter_vectors: ``temporary_bytes`` in units of ``parameter_bytes``.
    """

    temporary_bytes: int
    parameter_bytes: int
    parameter_vectors: float


def memory(
    measure: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    *args: Any,
    **options: Any,
) -> Memory:
    """The memory that a measure will need, from its program, without running it.

    Args:
      measure: a function ``(loss_fn, params, batches, ...)``, such as
        :func:`hessian_trace`.
      loss_fn: the loss.
      params: the weights, or a pytree of ``jax.ShapeDtypeStruct`` like them, such as
        ``jax.eval_shape`` returns.
      batches: stacked batches, or their shapes. For a list or a loader give one batch,
        stacked, because only one is in memory at a time.
      *args: further arguments of the measure.
      **options: its options.

    Returns:
      A :class:`Memory`.

    Raises:
      ValueError: if the batches are a list or a loader.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: jnp.mean(jnp.tanh(batch @ w) ** 2)
      >>> shape = lambda *x: jax.ShapeDtypeStruct(x, "float32")
      >>> of = lambda **options: sharpness.memory(
      ...     sharpness.hessian_trace, loss, shape(100_000), shape(1, 1, 100_000), 0,
      ...     **options).parameter_vectors
      >>> of(method="hutchinson") < 8, of(method="xtrace") > 100
      (True, True)
    """
    if isinstance(batches, list) or is_streamed(batches):
        raise ValueError(
            "memory needs stacked batches. In place of a list or a loader, give one"
            " batch: jax.tree.map(lambda x: x[None], batch)."
        )
    run = lambda params, batches: measure(loss_fn, params, batches, *args, **options)
    compiled = jax.jit(run).lower(params, batches).compile()
    analysis: Any = compiled.memory_analysis()
    temporary = int(analysis.temp_size_in_bytes)
    leaves = jax.tree.leaves(params)
    size = sum(x.size * jnp.result_type(x.dtype).itemsize for x in leaves)
    return Memory(temporary, size, temporary / size)
