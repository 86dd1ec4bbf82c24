"""Models whose leaves have roles: scanned, lifted, stacked, in four libraries."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def filled(tree, seed=0):
    """Numbers for arrays, or for shapes as tuples of integers; none of them zero."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    shape = lambda x: x if is_shape(x) else x.shape
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=shape(x)) + 0.3), tree, is_leaf=is_shape
    )


class Block(nn.Module):
    """Attention, a layer and three kinds of normalization."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(h)
        x = x + nn.Dense(6, name="scale")(nn.RMSNorm()(x))
        return nn.GroupNorm(2)(x), None


class Scanned(nn.Module):
    """Three blocks under ``nn.scan`` between an embedding and a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 6)(tokens)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=3, **axes)()(x, None)
        return nn.Dense(2)(x.mean(-2))


def scanned():
    """Its parameters, none of them zero."""
    init = functools.partial(Scanned().init, jax.random.key(0))
    return filled(jax.eval_shape(init, jnp.zeros((2, 4), int))["params"])


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.ln = nnx.LayerNorm(4, rngs=rngs)
        self.weight = nnx.Linear(4, 4, rngs=rngs)
        self.free = nnx.Linear(4, 4, use_bias=False, rngs=rngs)


class Stacked(nnx.Module):
    """Three layers of ``nnx.vmap``, attention and LoRA."""

    def __init__(self, rngs):
        make = nnx.vmap(Layer, in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, 4, rngs=rngs, decode=False)
        self.lora = nnx.LoRALinear(4, 2, lora_rank=3, rngs=rngs)
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


class Modules(eqx.Module):
    """Layers of Equinox under names that say nothing, stacked ones among them."""

    a: eqx.nn.Embedding
    b: eqx.nn.Linear
    c: eqx.nn.Conv2d
    d: eqx.nn.LayerNorm
    e: eqx.nn.GroupNorm
    f: eqx.nn.GRUCell
    g: eqx.nn.ConvTranspose1d
    h: list
    i: eqx.nn.PReLU


def _modules():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    stack = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(2, 3, 1, key=key))
    return Modules(
        eqx.nn.Embedding(5, 4, key=next(keys)),
        eqx.nn.Linear(4, 4, key=next(keys)),
        eqx.nn.Conv2d(2, 3, 1, key=next(keys)),
        eqx.nn.LayerNorm((2, 3)),
        eqx.nn.GroupNorm(1, 4),
        eqx.nn.GRUCell(2, 3, key=next(keys)),
        eqx.nn.ConvTranspose1d(2, 3, 2, key=next(keys)),
        [stack(jax.random.split(next(keys), 6)), eqx.nn.RMSNorm(4)],
        eqx.nn.PReLU(),
    )


def equinox():
    """The shapes of its floats."""
    is_float = lambda x: jnp.issubdtype(getattr(x, "dtype", bool), jnp.inexact)
    return eqx.filter(eqx.filter_eval_shape(_modules), is_float)
