"""Logits without their scale, so that losses of different models compare."""

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

    To be used inside a ``loss_fn`` before the cross-entropy, at temperature 1. The loss
    and every sharpness of it are then the same for :math:`f` and :math:`s f + b` with
    :math:`s > 0`, where that of a plain cross-entropy falls with the logits' scale,
    and so with longer training.

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
