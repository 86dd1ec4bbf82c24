"""The models for the pods: ResNet-50 on images, decoders of two sizes on tokens.

They compute in bfloat16 from float32 parameters, as is usual on TPUs. Everything that
a step needs is given as shapes; nothing is allocated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
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


def rotated(x: jax.Array) -> jax.Array:
    """Queries or keys, (batch, length, heads, features), turned by their positions."""
    size = x.shape[-1] // 2
    rates = 1e-4 ** (jnp.arange(size) / size)
    angles = jnp.arange(x.shape[1])[:, None, None] * rates
    a, b, sin, cos = x[..., :size], x[..., size:], jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


class Decoder(nn.Module):
    """Pre-norm decoder blocks between an embedding and its transpose.

    Attributes:
      rotary: whether attention uses rotary position embeddings.
    """

    blocks: int = 4
    width: int = 1024
    heads: int = 16
    vocabulary: int = 16384
    dtype: Any = HALF
    rotary: bool = False

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
            if self.rotary:
                q, k = rotated(q), rotated(k)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + dense(f"out_{i}", self.width, (-2, -1))(y)
            y = nn.gelu(dense(f"up_{i}", 4 * self.width)(normed(x)))
            x = x + dense(f"down_{i}", self.width)(y)
        return embedding.attend(normed(x)).astype(jnp.float32)


def placed(x: jax.Array, spread: NamedSharding | None) -> jax.Array:
    """The activations with their sharding."""
    return x if spread is None else jax.lax.with_sharding_constraint(x, spread)


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU, as one round of a scan over layers."""

    width: int
    heads: int
    hidden: int
    spread: NamedSharding | None

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """The input of the next layer, and no further output of the scan."""
        x = placed(x, self.spread)
        normed = lambda x: nn.RMSNorm(dtype=HALF)(x)
        dense = lambda name, shape, axis=-1: nn.DenseGeneral(
            shape, axis=axis, use_bias=False, dtype=HALF, name=name
        )
        heads = self.heads, self.width // self.heads
        y = normed(x)
        q, k, v = (dense(name, heads)(y) for name in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + dense("out", self.width, (-2, -1))(y)
        y = normed(x)
        y = nn.silu(dense("gate", self.hidden)(y)) * dense("up", self.hidden)(y)
        return x + dense("down", self.width)(y), None


class ScannedDecoder(nn.Module):
    """A decoder in the usual form of large ones: a loop over layers.

    The loop keeps the inputs of the layers. Their parameters are stacked, and the
    backward pass computes each layer again. The defaults are Llama's with 7 billion
    parameters, but without rotation.

    Attributes:
      spread: the sharding of the activations. Without it XLA cuts them like the
        weights, along the width, and each chip has the whole batch.
    """

    layers: int = 32
    width: int = 4096
    heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    spread: NamedSharding | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next tokens, (batch, length, vocabulary)."""
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )(self.width, self.heads, self.hidden, self.spread, name="layers")
        x = nn.Embed(self.vocabulary, self.width, dtype=HALF)(tokens)
        x, _ = layers(x, None)
        x = nn.RMSNorm(dtype=HALF)(placed(x, self.spread))
        head = nn.Dense(self.vocabulary, use_bias=False, dtype=HALF, name="head")
        return head(x).astype(jnp.float32)


# Megatron's partition of a block: heads and hidden units over the axis model.
_OVER_MODEL = {
    **dict.fromkeys("qkv", P("data", "model", None)),
    "out": P("model", None, "data"),
    **dict.fromkeys(("up", "gate"), P("data", "model")),
    "down": P("model", "data"),
    "Embed": P(("model", "data"), None),
    "head": P("data", "model"),
}


def tensor_parallel(params: Any) -> Any:
    """The specs of the leaves of a decoder, cut over both axes of the mesh."""

    def spec(path: Any, leaf: Any) -> P:
        names = [key.key for key in path]
        stacked = names[0] == "layers"
        own = _OVER_MODEL.get(names[stacked].split("_")[0], P())
        return P(None, *own) if stacked else own

    return jax.tree_util.tree_map_with_path(spec, params)


class Task(NamedTuple):
    """A model with its data.

    Attributes:
      model: the module.
      optimizer: the base optimizer, which goes after the method.
      example: one example's input.
      labels: one example's labels.
      per_chip: examples on each chip, or on each group of chips that share them.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    example: jax.ShapeDtypeStruct
    labels: jax.ShapeDtypeStruct
    per_chip: int

    def batch(self, chips: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Inputs and labels for this number of chips."""
        examples = chips * self.per_chip
        x, y = (
            jax.ShapeDtypeStruct((examples, *x.shape), x.dtype)
            for x in (self.example, self.labels)
        )
        return x, y

    def on(self, mesh: Mesh) -> Task:
        """The task with the sharding of the activations, if the model needs it."""
        if not hasattr(self.model, "spread"):
            return self
        spread = NamedSharding(mesh, P("data"))
        return self._replace(model=self.model.clone(spread=spread))

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


def seven_billion(length: int = 2048, per_chip: int = 4, **model: Any) -> Task:
    """The scanned decoder, AdamW."""
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    return Task(ScannedDecoder(**model), optax.adamw(1e-3), tokens, tokens, per_chip)
