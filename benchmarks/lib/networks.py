"""Flax Linen networks of the training runs.

Parameters and BatchNorm's statistics are float32; ``dtype`` is what layers compute in.
All take ``(batch, height, width, channels)`` and ``train``, and return float32 logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Conv = functools.partial(
    nn.Conv,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)


def norm(train: bool, dtype: Any) -> Callable[..., nn.Module]:
    """The BatchNorm of all networks."""
    return functools.partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype
    )


def head(x: jax.Array, classes: int) -> jax.Array:
    """Logits of (batch, features), always in float32."""
    return nn.Dense(classes, dtype=jnp.float32, name="head")(x.astype(jnp.float32))


def dense(*widths: int) -> nn.Module:
    """Ten logits of flat images, through hidden layers of these widths."""
    hidden = [layer for width in widths for layer in (nn.Dense(width), nn.relu)]
    return nn.Sequential((*hidden, nn.Dense(10)))  # hashable, unlike a list


def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@functools.partial(jax.jit, static_argnums=0)
def accuracy(
    model: nn.Module, params: Any, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """The share of right answers, in percent."""
    return 100 * jnp.mean(model.apply(params, images).argmax(-1) == labels)


class MLP(nn.Module):
    """Two hidden layers."""

    classes: int = 10
    width: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype)(x))
        return head(x, self.classes)


class CNN(nn.Module):
    """Three convolutions of stride 2 with BatchNorm, for CPUs."""

    classes: int = 10
    width: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(3):
            x = Conv(self.width * 2**i, (3, 3), (2, 2), dtype=self.dtype)(x)
            x = nn.relu(norm(train, self.dtype)()(x))
        return head(x.mean((1, 2)), self.classes)


class BasicBlock(nn.Module):
    """ResNet's block: convolution, BatchNorm, ReLU, twice."""

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        bn = norm(train, self.dtype)
        strides = (self.stride, self.stride)
        y = Conv(self.width, (3, 3), strides, padding=1, dtype=self.dtype)(x)
        y = Conv(self.width, (3, 3), dtype=self.dtype)(nn.relu(bn()(y)))
        y = bn()(y)
        if x.shape != y.shape:
            x = bn()(Conv(self.width, (1, 1), strides, dtype=self.dtype)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18 with the stem for 32 x 32 images (He et al., 2016)."""

    classes: int = 10
    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    dtype: Any = jnp.float32
    stem: tuple[int, int] = (3, 1)  # the first kernel's side, and its stride

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        side, stride = self.stem
        sides, strides = (side, side), (stride, stride)
        x = Conv(self.width, sides, strides, dtype=self.dtype)(x)
        x = nn.relu(norm(train, self.dtype)()(x))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage and not i else 1
                x = BasicBlock(self.width * 2**stage, stride, self.dtype)(x, train)
        return head(x.mean((1, 2)), self.classes)


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021) with patches of 8 x 8 pixels, for CPUs."""

    classes: int = 10
    width: int = 64
    blocks: int = 4
    patch: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        side = self.patch
        x = x.reshape(len(x), x.shape[1] // side, side, x.shape[2] // side, -1)
        x = x.swapaxes(2, 3)
        x = dense(self.width)(x.reshape(len(x), x.shape[1] * x.shape[2], -1))
        tokens = x.shape[1]
        for _ in range(self.blocks):
            y = norm()(x).swapaxes(1, 2)
            y = dense(tokens)(nn.gelu(dense(2 * tokens)(y)))
            x = x + y.swapaxes(1, 2)
            x = x + dense(self.width)(nn.gelu(dense(2 * self.width)(norm()(x))))
        return head(norm()(x).mean(1), self.classes)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "mixer": Mixer,
    "resnet18": ResNet,
    # For a CPU: the first convolution already halves the sides.
    "resnet8": functools.partial(ResNet, width=16, blocks=(1, 1, 1), stem=(5, 2)),
    # For tests and trials: the same code, but small.
    "tiny-resnet": functools.partial(ResNet, width=4, blocks=(1, 1)),
}
CONVOLUTIONAL = set(NETWORKS) - {"mlp", "mixer"}
