"""The models for step costs, by backend: an MLP, a CNN, a decoder, a ResNet.

They have a million parameters or more, and a step takes milliseconds to a tenth of a
second. The small ones are for tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.lib import networks
from benchmarks.lib.models import Decoder

MODELS = "MLP", "CNN", "transformer"
ALL = *MODELS, "ResNet-18"  # the last one is for accelerators


class MLP(nn.Module):
    """Three hidden layers."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, (batch, 10)."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(10, dtype=self.dtype)(x).astype(jnp.float32)


class CNN(nn.Module):
    """Four 3x3 convolutions with group norms, of 1, 2, 4 and 4 times the width."""

    width: int
    strides: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, (batch, 10)."""
        for factor, stride in zip((1, 2, 4, 4), self.strides, strict=True):
            size = factor * self.width
            x = nn.Conv(size, (3, 3), stride, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8, dtype=self.dtype)(x))
        x = nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))
        return x.astype(jnp.float32)


class ResNet18(nn.Module):
    """ResNet-18 with the stem for 32 x 32 images, and group norms."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, (batch, 10)."""

        def conv(x: jax.Array, features: int, size: int = 3, stride: int = 1) -> Any:
            shape = {"kernel_size": (size, size), "strides": stride, "use_bias": False}
            x = nn.Conv(features, **shape, dtype=self.dtype)(x)
            return nn.GroupNorm(num_groups=8, dtype=self.dtype)(x)

        x = nn.relu(conv(x, self.width))
        for stage in range(4):
            for stride in (2 if stage else 1, 1):
                features = self.width * 2**stage
                y = conv(nn.relu(conv(x, features, stride=stride)), features)
                if x.shape != y.shape:
                    x = conv(x, features, 1, stride)
                x = nn.relu(x + y)
        x = nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))
        return x.astype(jnp.float32)


class Subject(NamedTuple):
    """A model with the data of its steps.

    Attributes:
      module: the model.
      example: the shape of one example's input; for a decoder, its length in tokens.
      classes: the number of classes, or of words.
      batch_size: the number of examples in a step.
      steps: the number of steps in a timed block, a multiple of five.
    """

    module: nn.Module
    example: tuple[int, ...]
    classes: int
    batch_size: int
    steps: int = 10

    @property
    def is_decoder(self) -> bool:
        """Whether inputs are tokens and each has a label."""
        return isinstance(self.module, Decoder)

    def batches(self, count: int) -> list[dict[str, jax.Array]]:
        """Random examples on the device, with their places in the data set."""
        shape = self.batch_size, *self.example
        made = []
        for i, key in enumerate(jax.random.split(jax.random.key(1), count)):
            x_key, y_key = jax.random.split(key)
            x = jax.random.normal(x_key, shape)
            if self.is_decoder:
                x = jax.random.randint(x_key, shape, 0, self.classes)
            labels = shape if self.is_decoder else shape[:1]
            y = jax.random.randint(y_key, labels, 0, self.classes)
            places = i * self.batch_size + jnp.arange(self.batch_size)
            made.append({"x": x, "y": y, "indices": places})
        return made

    def init(self) -> Any:
        """The parameters, float32."""
        x = self.batches(1)[0]["x"]
        return jax.jit(self.module.init)(jax.random.key(0), x)

    def losses(self, logits: jax.Array, y: jax.Array) -> jax.Array:
        """The loss of each example, (batch,)."""
        return networks.losses(logits, y).reshape(len(y), -1).mean(-1)

    @property
    def parameters(self) -> int:
        """How many there are."""
        shapes = jax.eval_shape(self.init)
        return sum(x.size for x in jax.tree.leaves(shapes))


def subject(name: str, backend: str, half: bool, tiny: bool = False) -> Subject:
    """The model of that name, in the size for the backend."""
    dtype = jnp.bfloat16 if half else jnp.float32
    size = "tiny" if tiny else "cpu" if backend == "cpu" else "accelerator"
    image = (32, 32, 3)
    if name == "MLP":
        width, batch, steps = {
            "tiny": (16, 4, 10),
            "cpu": (512, 128, 10),
            "accelerator": (4096, 2048, 50),
        }[size]
        return Subject(MLP(width, dtype), image, 10, batch, steps)
    if name == "CNN":
        width, strides, batch, steps = {
            "tiny": (8, (2, 2, 2, 2), 4, 10),
            "cpu": (72, (2, 2, 2, 1), 16, 5),
            "accelerator": (256, (1, 2, 2, 1), 512, 20),
        }[size]
        return Subject(CNN(width, strides, dtype), image, 10, batch, steps)
    if name == "ResNet-18":
        width, batch, steps = {
            "tiny": (8, 4, 10),
            "cpu": (16, 16, 5),
            "accelerator": (64, 512, 20),
        }[size]
        return Subject(ResNet18(width, dtype), image, 10, batch, steps)
    blocks, width, heads, words, length, batch, steps = {
        "tiny": (1, 16, 2, 32, 8, 4, 10),
        "cpu": (4, 128, 4, 2048, 64, 4, 5),
        "accelerator": (6, 768, 12, 8192, 512, 16, 20),
    }[size]
    module = Decoder(blocks, width, heads, words, dtype)
    return Subject(module, (length,), words, batch, steps)
