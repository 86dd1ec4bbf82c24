"""What the pods train: ResNet-50 on images and a stack of decoder blocks on tokens.

Both compute in bfloat16 from float32 parameters, as is usual on TPUs. Everything that
a step needs is here as shapes; nothing is allocated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from benchmarks.lib import networks

HALF = jnp.bfloat16


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, with the input added."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images with ``4 * features`` channels."""
        normed = lambda x: nn.BatchNorm(use_running_average=False, dtype=HALF)(x)
        conv = lambda features, size, stride=1: nn.Conv(
            features, (size, size), strides=stride, use_bias=False, dtype=HALF
        )
        y = nn.relu(normed(conv(self.features, 1)(x)))
        y = nn.relu(normed(conv(self.features, 3, self.stride)(y)))
        y = normed(conv(4 * self.features, 1)(y))
        if x.shape != y.shape:
            x = normed(conv(4 * self.features, 1, self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-50 with the default stages; strides are on the 3x3 convolutions."""

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, (batch, classes)."""
        x = nn.Conv(self.width, (7, 7), strides=2, use_bias=False, dtype=HALF)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=HALF)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Bottleneck(self.width * 2**stage, stride)(x)
        return nn.Dense(self.classes, dtype=HALF)(x.mean((1, 2))).astype(jnp.float32)


class Decoder(nn.Module):
    """Pre-norm decoder blocks between an embedding and its transpose."""

    blocks: int = 4
    width: int = 1024
    heads: int = 16
    vocabulary: int = 16384
    dtype: Any = HALF

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next tokens, (batch, length, vocabulary)."""
        embedding = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        normed = lambda x: nn.RMSNorm(dtype=self.dtype)(x)
        dense = lambda name, shape, axis=-1: nn.DenseGeneral(
            shape, axis=axis, use_bias=False, dtype=self.dtype, name=name
        )
        heads = self.heads, self.width // self.heads
        x = embedding(tokens)
        for i in range(self.blocks):
            y = normed(x)
            q, k, v = (dense(f"{name}_{i}", heads)(y) for name in "qkv")
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + dense(f"out_{i}", self.width, (-2, -1))(y)
            y = nn.gelu(dense(f"up_{i}", 4 * self.width)(normed(x)))
            x = x + dense(f"down_{i}", self.width)(y)
        return embedding.attend(normed(x)).astype(jnp.float32)


# How Megatron cuts a block: heads and hidden units over the axis model.
_OVER_MODEL = {
    **dict.fromkeys("qkv", P("data", "model", None)),
    "out": P("model", None, "data"),
    "up": P("data", "model"),
    "down": P("model", "data"),
    "Embed": P(("model", "data"), None),
}


def tensor_parallel(params: Any) -> Any:
    """The place of each leaf of a decoder, cut over both axes of the mesh."""

    def spec(path: Any, leaf: Any) -> P:
        return _OVER_MODEL.get(path[0].key.split("_")[0], P())

    return jax.tree_util.tree_map_with_path(spec, params)


class Task(NamedTuple):
    """A model with its data.

    Attributes:
      model: the module.
      optimizer: what the methods stand before.
      example: one example's input.
      labels: one example's labels.
      per_chip: examples on each chip, or on those that share them.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    example: jax.ShapeDtypeStruct
    labels: jax.ShapeDtypeStruct
    per_chip: int

    def batch(self, chips: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Inputs and labels for so many chips."""
        examples = chips * self.per_chip
        x, y = (
            jax.ShapeDtypeStruct((examples, *x.shape), x.dtype)
            for x in (self.example, self.labels)
        )
        return x, y

    def init(self) -> tuple[Any, Any]:
        """Shapes of the parameters and of the model's other collections."""
        x, _ = self.batch(1)
        variables = dict(jax.eval_shape(self.model.init, jax.random.key(0), x))
        return variables.pop("params"), variables

    def logits(self, params: Any, model_state: Any, x: Any) -> tuple[Any, Any]:
        """The output in training mode, and the collections after it."""
        variables = {"params": params, **model_state}
        return self.model.apply(variables, x, mutable=list(model_state))

    def losses(self, logits: jax.Array, y: jax.Array) -> jax.Array:
        """The loss of each example."""
        return networks.losses(logits, y).reshape(y.shape[0], -1).mean(-1)


def resnet(image: int = 224, per_chip: int = 64, **model: Any) -> Task:
    """ResNet-50 on ImageNet, SGD with momentum."""
    return Task(
        ResNet(**model),
        optax.sgd(0.1, momentum=0.9),
        jax.ShapeDtypeStruct((image, image, 3), HALF),
        jax.ShapeDtypeStruct((), jnp.int32),
        per_chip,
    )


def decoder(length: int = 1024, per_chip: int = 4, **model: Any) -> Task:
    """A decoder on sequences of tokens, AdamW."""
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    return Task(Decoder(**model), optax.adamw(1e-3), tokens, tokens, per_chip)
