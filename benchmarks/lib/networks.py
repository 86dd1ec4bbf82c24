"""Flax Linen networks of the quality benchmark.

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
    """BatchNorm as all of them have it."""
    return functools.partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype
    )


def head(x: jax.Array, classes: int) -> jax.Array:
    """Logits of (batch, features), in float32 in any case."""
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
    """Three convolutions with BatchNorm, for CPUs."""

    classes: int = 10
    width: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(3):
            x = Conv(self.width * 2**i, (3, 3), dtype=self.dtype)(x)
            x = nn.relu(norm(train, self.dtype)()(x))
            if i < 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(self.width, (3, 3), dtype=self.dtype)(x)
        x = nn.relu(norm(train, self.dtype)()(x))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage and not i else 1
                x = BasicBlock(self.width * 2**stage, stride, self.dtype)(x, train)
        return head(x.mean((1, 2)), self.classes)


class WideBlock(nn.Module):
    """A block whose BatchNorm and ReLU come first."""

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        bn = norm(train, self.dtype)
        strides = (self.stride, self.stride)
        before = nn.relu(bn()(x))
        y = Conv(self.width, (3, 3), strides, padding=1, dtype=self.dtype)(before)
        y = Conv(self.width, (3, 3), dtype=self.dtype)(nn.relu(bn()(y)))
        if x.shape[-1] != self.width:
            x = Conv(self.width, (1, 1), strides, dtype=self.dtype)(before)
        return x + y


class WideResNet(nn.Module):
    """WideResNet-28-10 (Zagoruyko and Komodakis, 2016)."""

    classes: int = 10
    depth: int = 28
    factor: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(16, (3, 3), dtype=self.dtype)(x)
        for stage in range(3):
            for i in range((self.depth - 4) // 6):
                stride = 2 if stage and not i else 1
                width = 16 * self.factor * 2**stage
                x = WideBlock(width, stride, self.dtype)(x, train)
        x = nn.relu(norm(train, self.dtype)()(x))
        return head(x.mean((1, 2)), self.classes)


class PyramidBlock(nn.Module):
    """A block with three BatchNorms, and a shortcut without weights."""

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        bn = norm(train, self.dtype)
        strides = (self.stride, self.stride)
        y = Conv(self.width, (3, 3), strides, padding=1, dtype=self.dtype)(bn()(x))
        y = Conv(self.width, (3, 3), dtype=self.dtype)(nn.relu(bn()(y)))
        y = bn()(y)
        if self.stride > 1:
            x = nn.avg_pool(x, strides, strides)
        more = self.width - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))) + y


class PyramidNet(nn.Module):
    """PyramidNet-110 with basic blocks, widened by 270 (Han et al., 2017)."""

    classes: int = 10
    depth: int = 110
    alpha: int = 270
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        count = (self.depth - 2) // 6
        x = norm(train, self.dtype)()(Conv(16, (3, 3), dtype=self.dtype)(x))
        for i in range(3 * count):
            width = int(16 + self.alpha * (i + 1) / (3 * count))
            stride = 2 if i in (count, 2 * count) else 1
            x = PyramidBlock(width, stride, self.dtype)(x, train)
        x = nn.relu(norm(train, self.dtype)()(x))
        return head(x.mean((1, 2)), self.classes)


class ViT(nn.Module):
    """A small vision transformer: patches of 4 x 4, mean instead of a class token."""

    classes: int = 10
    width: int = 192
    depth: int = 6
    heads: int = 3
    patch: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, padding="VALID", dtype=self.dtype)(x)
        x = x.reshape(len(x), -1, self.width)
        init = nn.initializers.normal(0.02)
        x = x + self.param("place", init, x.shape[1:]).astype(x.dtype)
        for _ in range(self.depth):
            y = nn.LayerNorm(dtype=self.dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y)
            y = nn.LayerNorm(dtype=self.dtype)(x)
            y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(y))
            x = x + nn.Dense(self.width, dtype=self.dtype)(y)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return head(x.mean(1), self.classes)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "vit": ViT,
    "resnet18": ResNet,
    "wrn28-10": WideResNet,
    "pyramidnet110": PyramidNet,
    # For tests and for trying out: the same code, small.
    "tiny-resnet": functools.partial(ResNet, width=4, blocks=(1, 1)),
}
CONVOLUTIONAL = set(NETWORKS) - {"mlp", "vit"}
