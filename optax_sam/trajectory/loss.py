"""The trajectory loss of SAF and MESA (Du et al., arXiv 2205.14083)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.schedules import check_number
from optax_sam.trees import widest


def trajectory_loss(
    logits: ArrayLike,
    past_logits: ArrayLike,
    *,
    coefficient: ArrayLike = 0.3,
    temperature: ArrayLike = 5.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""The distance of the predictions from earlier ones of the training run.

    A sudden drop of the loss along the trajectory is a sign of a sharp minimum. The
    term keeps the predictions near earlier ones:

    .. math::
      \lambda \tau^2 \, \frac{1}{n} \sum_i \mathrm{KL}\big(
        \mathrm{softmax}(z^\text{past}_i / \tau) \,\big\|\,
        \mathrm{softmax}(z_i / \tau) \big)

    The gradient goes through ``logits`` alone. Add the term to the loss. With
    :func:`optax_sam.saf` the past logits come from an earlier epoch, with
    :func:`optax_sam.mesa` from the averaged weights. The term is computed in float32 or
    better. A temperature in the hundreds needs float64, since :math:`\tau^2` then
    scales up the rounding error of a difference.

    Args:
      logits: ``z``, outputs of the model before the softmax, (..., C).
      past_logits: outputs for the same examples, of the same shape.
      coefficient: ``lambda``, at least 0, possibly traced. The authors take the default
        for SAF and 0.8 for MESA.
      temperature: ``tau``, above 0.
      where: which examples have a past, bool, of the leading axes' shape; ``None``
        means all. The others contribute zero, whatever their past is. They still count
        in ``n``, so that the loss of an example does not depend on the batch.

    Returns:
      The term, () float.

    Raises:
      ValueError: if the shapes do not match, ``where`` is not bool, or a number is
        out of its range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> logits, past = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> print(f"{optax_sam.trajectory_loss(logits, past):.4f}")
      0.3358
      >>> print(optax_sam.trajectory_loss(logits, past, where=jnp.array([False])))
      0.0
      >>> gradient = jax.grad(optax_sam.trajectory_loss)(logits, past)
      >>> print(gradient.round(3))
      [[ 0.223 -0.223]]

    Differs from the authors' code in:
      1. The logarithm of the softmax is taken as one function, without overflow.
      2. ``where`` leaves out examples whose past is missing.

    References:
      Du et al., `Sharpness-Aware Training for Free
      <https://arxiv.org/abs/2205.14083>`_, 2022; code: AngusDujw/SAF. The factor
      ``tau**2`` is in the code, not in the paper.
    """
    coefficient = check_number("coefficient", coefficient, 0.0)
    temperature = check_number("temperature", temperature, 0.0, open_low=True)
    z, past = jnp.asarray(logits), jax.lax.stop_gradient(jnp.asarray(past_logits))
    if z.ndim == 0 or z.shape != past.shape:
        raise ValueError(
            "trajectory_loss compares two outputs for the same examples, both (..., C);"
            f" got logits {z.shape} and past_logits {past.shape}. For SAF write past,"
            " known = optax_sam.saf_past_logits(opt_state, indices); for MESA take the"
            " model's output at optax_sam.mesa_params(opt_state)."
        )
    dtype = widest(z, past)
    z, past = z.astype(dtype), past.astype(dtype)
    if where is not None:
        known = jnp.asarray(where)
        if known.shape != z.shape[:-1] or known.dtype != bool:
            raise ValueError(
                f"where must hold a bool for each example, {z.shape[:-1]} for logits"
                f" {z.shape}; got {known.dtype} {known.shape}."
            )
        # Equal rows have no divergence. A mask on the divergence would let a NaN from
        # an invalid past into the gradient.
        z, past = (jnp.where(known[..., None], x, 0) for x in (z, past))
    tau = jnp.asarray(temperature, dtype)
    divergence = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(z / tau), jax.nn.log_softmax(past / tau)
    )
    return jnp.asarray(coefficient, dtype) * tau**2 * jnp.mean(divergence)
