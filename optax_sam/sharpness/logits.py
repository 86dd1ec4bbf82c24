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
    features: jax.Array, kernel: jax.Array, labels: ArrayLike, *, num_chunks: int = 16
) -> jax.Array:
    r"""The mean cross-entropy over many classes, a part of the logits at a time.

    .. math:: -\frac{1}{N} \sum_{i=1}^N \log \operatorname{softmax}(h_i W)_{y_i}

    Use it for the last layer of a language model, inside a ``loss_fn``. The logits of
    all tokens are never in memory together. The loss, its gradient and the products
    with its Hessian each compute them again, chunk by chunk.

    Args:
      features: ``h``, ``(..., d)``.
      kernel: ``W``, ``(d, classes)``.
      labels: ``y``, integers ``(...)``.
      num_chunks: into how many parts the tokens are split; the last may be padded.

    Returns:
      The scalar mean over all tokens, in float32 or wider.

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
    if features.shape[:-1] != labels.shape or features.shape[-1:] != kernel.shape[:1]:
        raise ValueError(
            "features (..., d), kernel (d, classes) and labels (...) must fit; their"
            f" shapes are {features.shape}, {kernel.shape} and {labels.shape}."
        )
    number = labels.size
    size = -(-number // num_chunks)
    pad = lambda x: jnp.pad(x, [(0, -number % size)] + [(0, 0)] * (x.ndim - 1))
    rows = pad(features.reshape(number, -1)).reshape(-1, size, features.shape[-1])
    parts = rows, pad(labels.ravel()).reshape(-1, size), pad(jnp.ones(number))

    @jax.checkpoint
    def of_chunk(h: jax.Array, y: jax.Array, real: jax.Array) -> jax.Array:
        z = wide(h @ kernel)
        chosen = jnp.take_along_axis(z, y[:, None], 1)[:, 0]
        return jnp.sum(real * (jax.nn.logsumexp(z, -1) - chosen))

    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + of_chunk(*part), None

    zero = jnp.zeros((), jnp.result_type(jnp.float32, features, kernel))
    parts = (*parts[:2], parts[2].reshape(-1, size).astype(zero.dtype))
    return jax.lax.scan(add, zero, parts)[0] / number
