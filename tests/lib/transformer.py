"""A small transformer that can be spread over a mesh, as plain functions.

One block with causal attention: embedding and positions, layer norms, heads, an MLP,
and the transposed embedding for the logits. It learns to count on by steps of a
length that each sequence chooses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from problems import Problem

VOCABULARY, LENGTH, WIDTH, HEADS, HIDDEN = 16, 6, 16, 8, 32

# Megatron's split over "model": heads and hidden units, so that a block has two sums
# over devices; FSDP's over "data": the other dimension of each matrix. On a mesh one
# of whose axes has one device, this is the other split alone.
SPECS = {
    "embedding": P("model", "data"),
    "positions": P(None, "data"),
    "attention": {
        "norm": {"scale": P(None), "bias": P(None)},
        **dict.fromkeys(("query", "key", "value"), P("data", "model", None)),
        "out": P("model", None, "data"),
    },
    "mlp": {
        "norm": {"scale": P(None), "bias": P(None)},
        "up": P("data", "model"),
        "up_bias": P("model"),
        "down": P("model", "data"),
        "down_bias": P("data"),
    },
    "norm": {"scale": P(None), "bias": P(None)},
}


def whole(weights):
    """On a mesh with explicit axes: all-gathered over "data", as FSDP does."""
    without_data = lambda spec: P(*(None if x == "data" else x for x in spec))
    return jax.sharding.reshard(weights, jax.tree.map(without_data, SPECS))


def transformer(gathered=lambda weights: weights, einsum=jnp.einsum):
    """``gathered`` and ``einsum`` are what a mesh with explicit axes asks for."""

    def norm(w, x):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        size = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
        return x / size * w["scale"] + w["bias"]

    def attention(w, x):
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", x, w[name])
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(WIDTH // HEADS)
        past = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        shares = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
        mixed = jnp.einsum("bhts,bshk->bthk", shares, v)
        return einsum("bthk,hkd->btd", mixed, w["out"])

    def mlp(w, x):
        hidden = jax.nn.gelu(jnp.einsum("btd,df->btf", x, w["up"]) + w["up_bias"])
        return einsum("btf,fd->btd", hidden, w["down"]) + w["down_bias"]

    def loss_fn(params, batch):
        tokens, following = batch
        w = gathered(params)
        # A sum over the vocabulary, as on TPUs: an index would gather the table.
        one_hot = jax.nn.one_hot(tokens, VOCABULARY, dtype=w["embedding"].dtype)
        x = einsum("btv,vd->btd", one_hot, w["embedding"]) + w["positions"]
        for layer, name in ((attention, "attention"), (mlp, "mlp")):
            x = x + layer(w[name], norm(w[name]["norm"], x))
        logits = jnp.einsum("btd,vd->btv", norm(w["norm"], x), w["embedding"])
        one_hot = jax.nn.one_hot(following, VOCABULARY, dtype=logits.dtype)
        return -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=-1))

    rng = np.random.default_rng(4)
    draw = lambda *shape, fan=1: rng.normal(size=shape) / np.sqrt(fan)
    layer_norm = lambda: {"scale": np.ones(WIDTH), "bias": np.zeros(WIDTH)}
    heads = (WIDTH, HEADS, WIDTH // HEADS)
    start = {
        "embedding": draw(VOCABULARY, WIDTH, fan=WIDTH),
        "positions": draw(LENGTH, WIDTH, fan=WIDTH),
        "attention": {
            "norm": layer_norm(),
            **{name: draw(*heads, fan=WIDTH) for name in ("query", "key", "value")},
            "out": draw(*heads[1:], WIDTH, fan=WIDTH),
        },
        "mlp": {
            "norm": layer_norm(),
            "up": draw(WIDTH, HIDDEN, fan=WIDTH),
            "up_bias": np.zeros(HIDDEN),
            "down": draw(HIDDEN, WIDTH, fan=HIDDEN),
            "down_bias": np.zeros(WIDTH),
        },
        "norm": layer_norm(),
    }
    first, step = rng.integers(VOCABULARY, size=(2, 4, 16, 1))
    counted = (first + (1 + step % 3) * np.arange(LENGTH + 1)) % VOCABULARY
    return Problem(loss_fn, start, (counted[..., :-1], counted[..., 1:]))


explicit = functools.partial(
    transformer, whole, functools.partial(jnp.einsum, out_sharding=P("data"))
)
