"""A network of dense layers with learnt step sizes (LSQ, arXiv 1902.08153)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def initial_step(values: jax.Array, q_p: int, axis: Any = None) -> jax.Array:
    """LSQ's first step size, averaged over ``axis``; ``None`` means all axes."""
    mean = jnp.abs(values).mean(axis, keepdims=axis is not None)
    return 2 * mean / q_p**0.5


def quantize(
    values: jax.Array, step: jax.Array, q_n: int, q_p: int, scale: float
) -> jax.Array:
    """Rounds to multiples of ``step`` from ``-q_n`` to ``q_p``, differentiably.

    Args:
      values: what is quantized.
      step: the step size, of a shape that broadcasts.
      q_n: number of levels below zero.
      q_p: number of levels above zero.
      scale: factor on the gradient of ``step``, which sums over all values.

    Returns:
      The quantized values. Rounding passes gradients straight through: the gradient
      of ``values`` is one within the range and at its bounds, and zero outside.
    """
    step = jnp.maximum(step, 1e-8)  # an update, or an offset, could cross zero
    value = jax.lax.stop_gradient(step)
    step = value + scale * (step - value)  # the same number: only its gradient changes
    level = values / step
    inside = (level >= -q_n) & (level <= q_p)
    level = jnp.where(inside, level, jnp.where(level > 0, q_p, -q_n))
    level += jax.lax.stop_gradient(jnp.round(level) - level)
    return level * step


class QuantizedDense(nn.Module):
    """A dense layer on a grid of ``2**bits`` levels; ``None`` is full precision.

    Its inputs must not be negative, such as pixels or the outputs of a ReLU.
    """

    features: int
    bits: int | None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        size = inputs.shape[-1]
        shape = size, self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.bits is not None:
            top = 2**self.bits - 1
            signed, unsigned = (top // 2 + 1, top // 2), (0, top)
            kernel = self.quantized("weight_step", kernel, *signed, kernel.size)
            # The features of an example count, whatever the size of the batch.
            inputs = self.quantized("input_step", inputs, *unsigned, size)
        return inputs @ kernel + bias

    def quantized(
        self, name: str, values: jax.Array, q_n: int, q_p: int, count: int
    ) -> jax.Array:
        """Quantizes with a learnt step, which starts from the values it first sees."""
        step = self.param(name, lambda key: initial_step(values, q_p))
        return quantize(values, step, q_n, q_p, (count * q_p) ** -0.5)


class Network(nn.Module):
    """Three hidden layers; quantized, the first and the last layer keep 8 bits."""

    bits: int | None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        outer = None if self.bits is None else 8
        hidden = nn.relu(QuantizedDense(64, outer)(images))
        for _ in range(2):
            hidden = nn.relu(QuantizedDense(64, self.bits)(hidden))
        return QuantizedDense(10, outer)(hidden)


def not_steps(params: Any) -> Any:
    """The mask of the leaves to perturb and to decay: all but the step sizes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith("_step"), params
    )
