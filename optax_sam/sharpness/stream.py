"""Means over data that do not fit on the device, batch by batch from the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam.trees import widest


def accumulate(
    f: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    weight: Callable[[Any], ArrayLike] | None = None,
) -> Any:
    r"""The mean of a function of a batch, over any iterable of batches.

    .. math:: \frac{\sum_S m_S\, f(S)}{\sum_S m_S}

    :math:`m_S` is the number of examples in batch :math:`S`, so a short last batch
    counts less. Measures take such batches by themselves. Use this function for other
    means, such as a gradient or a metric. While one batch is computed, the next one is
    fetched. Only these two are on the device.

    Jit ``f`` outside of the loops that call this function, and pass it everything that
    changes between calls as arguments. A batch of another size compiles once more.

    Args:
      f: ``f(batch)``, an array or a pytree of arrays, each the mean over the batch.
      batches: the batches, pytrees of arrays ``(m, ...)``: a list, or a loader. An
        iterator is used up by one pass, so make a new one for each call.
      weight: ``weight(batch)``, the number of examples that count, for instance
        ``lambda batch: batch["mask"].sum()`` for padded batches; ``None``: the length
        of the batch's arrays.

    Returns:
      The mean, a pytree like what ``f`` returns, in float32 or wider, on the device.

    Raises:
      ValueError: if there is no batch, the arrays of one differ in their length and no
        ``weight`` is given, or the weights sum to no positive number.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> batches = [jnp.array([1.0, 2.0, 3.0]), jnp.array([10.0])]
      >>> print(sharpness.accumulate(jax.jit(jnp.mean), batches))
      4.0

      A Hessian-vector product; ``x[None]`` makes it a stack of one batch:

      >>> loss = lambda w, batch: jnp.mean((batch * w) ** 2)
      >>> @jax.jit
      ... def hvp(w, v, batch):
      ...     return sharpness.hvp(loss, w, batch[None], v)
      >>> w, v = jnp.array(2.0), jnp.array(1.0)
      >>> print(sharpness.accumulate(lambda batch: hvp(w, v, batch), batches))
      57.0
    """
    count = count_examples if weight is None else weight
    sum_: Any = None
    total: Any = 0.0
    for batch in batches:
        # Else the host would run ahead, and put all batches on the device.
        jax.block_until_ready(sum_)
        m = jnp.asarray(count(batch), jnp.result_type(float))
        part = f(batch)
        sum_ = _scale(m, part) if sum_ is None else _add(sum_, m, part)
        total = total + m
    if sum_ is None:
        raise ValueError(
            "There was no batch to take the mean over. An iterator is used up after one"
            " pass: make a new one for each call, or give a list."
        )
    check_total(total)
    return _scale(1 / total, sum_)


def check_total(total: Any) -> None:
    """Raises unless something counts."""
    if not float(total) > 0:
        raise ValueError(
            f"The weights of all batches must have a positive sum; got {total}."
        )


def count_examples(batch: Any, option: str = "weight") -> int:
    """The length of a batch's arrays; ``option`` gives another number."""
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "The arrays of a batch must have the same number of examples along their"
            f" first axis; these have {sorted(lengths)}. Otherwise give the number of"
            f" examples that count: {option}=lambda batch: ...."
        )
    return lengths.pop()[0]


@jax.jit
def _scale(m: jax.Array, part: Any) -> Any:
    def scaled(x: ArrayLike) -> jax.Array:
        dtype = widest(x)
        return jnp.asarray(x, dtype) * m.astype(dtype)

    return jax.tree.map(scaled, part)


@jax.jit
def _add(sum_: Any, m: jax.Array, part: Any) -> Any:
    return jax.tree.map(jnp.add, sum_, _scale(m, part))
