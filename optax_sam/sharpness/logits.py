"""Logits without their scale, so that losses of different models can be compared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam import schedules
from optax_sam.trees import wide


def normalize_logits(
    logits: ArrayLike, *, axis: int = -1, eps: float = 1e-10
) -> jax.Array:
    r"""Logits centred over the classes and brought to length one.

    .. math:: \frac{f - \bar f}{\max(\|f - \bar f\|_2, \epsilon)}

    Use it inside a ``loss_fn`` before the cross-entropy, at temperature 1. The loss and
    all its measures of sharpness are then the same for :math:`f` and :math:`s f + b`
    with :math:`s > 0`. The sharpness of a plain cross-entropy falls with the scale of
    the logits, and so with longer training runs.

    Args:
      logits: an array; half precision is widened to float32.
      axis: the axis of the classes.
      eps: the least length to divide by, above 0.

    Returns:
      An array of the same shape. Equal logits give zeros, with a finite gradient.

    Raises:
      ValueError: if ``eps`` is not above 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> print(sharpness.normalize_logits(jnp.array([1.0, 5.0, 9.0, 5.0])).round(3))
      [-0.707  0.     0.707  0.   ]

    References:
      Andriushchenko et al., `A Modern Look at the Relationship between Sharpness and
      Generalization <https://arxiv.org/abs/2302.07011>`_, 2023
    """
    schedules.check_number("eps", eps, 0, open_low=True)
    f = wide(jnp.asarray(logits))
    f = f - f.mean(axis, keepdims=True)
    # The square is bounded and not the root, whose slope at 0 is infinite.
    square = jnp.sum(jnp.square(f), axis, keepdims=True)
    return f / jnp.sqrt(jnp.maximum(square, eps**2))


def chunked_cross_entropy(
    features: jax.Array,
    kernel: jax.Array,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    num_chunks: int = 16,
) -> jax.Array:
    r"""The mean cross-entropy over many classes, a part of the logits at a time.

    .. math:: -\frac{1}{N} \sum_{i=1}^N \log \operatorname{softmax}(h_i W)_{y_i}

    Use it for the last layer of a language model, inside a ``loss_fn``. The logits of
    all tokens are never in memory together. The loss, its gradient and the products
    with its Hessian each compute them again, chunk by chunk.

    Args:
      features: ``h``, ``(..., d)``.
      kernel: ``W``, ``(d, classes)``.
      labels: ``y``, integers ``(...)``. A label of no class, such as -100, makes the
        loss NaN if its token counts.
      where: bools ``(...)``, which tokens count; ``None``: all, so give it if some are
        padding.
      num_chunks: into how many parts the tokens are split; the last may be padded.

    Returns:
      The scalar mean over the tokens that count, in float32 or wider; 0 if none does.

    Raises:
      ValueError: if the shapes do not fit, or ``num_chunks`` is not above 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> h, W = jnp.ones((2, 3, 4)), jnp.zeros((4, 1000))
      >>> loss = sharpness.chunked_cross_entropy(h, W, jnp.zeros((2, 3), int))
      >>> print(f"{loss:.3f}")  # log 1000
      6.908
    """
    schedules.check_integer("num_chunks", num_chunks, 1)
    labels = jnp.asarray(labels)
    counts = jnp.ones(labels.shape, bool) if where is None else jnp.asarray(where, bool)
    if (
        features.shape != (*labels.shape, kernel.shape[0])
        or counts.shape != labels.shape
    ):
        raise ValueError(
            "features (..., d), kernel (d, classes), labels (...) and where (...) must"
            f" fit; their shapes are {features.shape}, {kernel.shape}, {labels.shape}"
            f" and {counts.shape}."
        )
    number = labels.size
    size = -(-number // num_chunks)
    pad = lambda x: jnp.pad(x, [(0, -number % size)] + [(0, 0)] * (x.ndim - 1))
    rows = pad(features.reshape(number, -1)).reshape(-1, size, features.shape[-1])
    parts = rows, *(pad(x.ravel()).reshape(-1, size) for x in (labels, counts))

    @jax.checkpoint
    def of_chunk(h: jax.Array, y: jax.Array, real: jax.Array) -> jax.Array:
        z = wide(h @ kernel)
        chosen = jnp.take_along_axis(z, y[:, None], 1, mode="fill")[:, 0]
        chosen = jnp.where(y < 0, jnp.nan, chosen)  # else -1 would be the last class
        return jnp.sum(jax.nn.logsumexp(z, -1) - chosen, where=real)

    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + of_chunk(*part), None

    zero = jnp.zeros((), jnp.result_type(jnp.float32, features, kernel))
    total = jax.lax.scan(add, zero, parts)[0]
    return total / jnp.maximum(counts.sum(), 1).astype(zero.dtype)
