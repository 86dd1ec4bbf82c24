"""All layers of whole models by one call: scanned, grouped, fused, adapted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_sam import sharpness
from optax_sam.roles import named_leaves
from optax_sam.sharpness.located import locate

D, K = 6, 2  # width of the model and of a head


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attend = nn.MultiHeadDotProductAttention(num_heads=3, dtype="float64")
        return x + jnp.tanh(attend(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


class Pair(nnx.Module):
    def __init__(self, rngs):
        make = lambda: nnx.MultiHeadAttention(
            3, D, decode=False, rngs=rngs, param_dtype="float64"
        )
        self.a, self.b = make(), make()

    def __call__(self, x):
        return self.b(x + jnp.tanh(self.a(x)))


def attention(q, k, v):
    """Of heads ``(batch, tokens, heads, k)``, grouped where keys have fewer."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v)


def projected(p, x, heads):
    y = x @ p["kernel"] + p.get("bias", 0)
    return y.reshape(*x.shape[:2], heads, -1)


def grouped(p, x):
    p = p["self_attn"]
    parts = zip(("q_proj", "k_proj", "v_proj"), (4, 2, 2), strict=True)
    y = attention(*(projected(p[name], x, heads) for name, heads in parts))
    return y.reshape(*x.shape[:2], -1) @ p["o_proj"]["kernel"]


def fused(p, x):
    y = projected(p["attn"]["qkv"], x, 9)
    y = attention(*jnp.split(y, 3, 2)).reshape(*x.shape[:2], -1)
    return y @ p["attn"]["out_proj"]["kernel"] + p["attn"]["out_proj"]["bias"]


def adapted(p, x):
    return x @ (p["fc"]["kernel"] + p["fc"]["lora_a"] @ p["fc"]["lora_b"])


def model(name):
    """A function of parameters and tokens, the parameters, and the pairs."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    find = sharpness.attention_gl_pairs
    x = draw(1, 2, 4, D)
    if name == "scanned":
        net = Stack()
        p = net.init(jax.random.key(0), x[0])["params"]
        p = jax.tree.map(lambda x: draw(*x.shape), p)
        return (lambda p, x: net.apply({"params": p}, x)), p, find(p), x
    if name == "nnx":
        graphdef, p = nnx.split(Pair(nnx.Rngs(0)), nnx.Param)
        p = jax.tree.map(lambda x: draw(*x.shape), p)
        return (lambda p, x: nnx.merge(graphdef, p)(x)), p, find(p), x
    if name == "grouped":
        sizes = {"q_proj": 4 * K, "k_proj": 2 * K, "v_proj": 2 * K}
        p = {name: {"kernel": draw(D, size)} for name, size in sizes.items()}
        p = {"self_attn": p | {"o_proj": {"kernel": draw(4 * K, D)}}}
        return grouped, p, find(p, num_heads=4), x
    if name == "fused":
        out = {"kernel": draw(3 * K, D), "bias": draw(D)}
        p = {"attn": {"qkv": {"kernel": draw(D, 9 * K), "bias": draw(9 * K)}}}
        p["attn"]["out_proj"] = out
        return fused, p, find(p, "attn", num_heads=3), x
    leaves = {"kernel": draw(D, D), "lora_a": draw(D, K), "lora_b": draw(K, D)}
    return adapted, {"fc": leaves}, sharpness.lora_gl_pairs({"fc": leaves}), x


def acted(params, pairs):
    """Other factors of the same products: for each pair a matrix of condition 100."""
    leaves, rng = named_leaves(params), np.random.default_rng(1)
    for pair in locate(pairs, params, params):
        G, H = pair.read(leaves)
        U, V = (np.linalg.qr(rng.normal(size=(len(G), K, K)))[0] for _ in range(2))
        A = U * np.geomspace(0.1, 10, K) @ V
        leaves = pair.write(G @ np.linalg.inv(A), H @ A.mT, leaves)
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


@pytest.mark.parametrize(
    ("name", "metric", "key", "dtype"),
    [
        *((name, "mix", None, "float64") for name in ("scanned", "fused", "lora")),
        pytest.param("nnx", "mix", None, "float64", marks=pytest.mark.slow),
        # A random start moves along, too.
        pytest.param("grouped", "inv", 3, "float64", marks=pytest.mark.slow),
        pytest.param("scanned", "inv", 3, "float64", marks=pytest.mark.slow),
        ("lora", "inv", 3, "float32"),
    ],
)
def test_geodesic_sharpness_of_whole_models(name, metric, key, dtype, x64):
    apply, params, pairs, x = model(name)
    assert sum(pair.number for pair in locate(pairs, params, params)) == {
        "scanned": 12, "nnx": 12, "grouped": 4, "fused": 6, "lora": 1
    }[name]  # fmt: skip
    loss = lambda p, x: jnp.mean(jnp.sin(apply(p, x) + 0.3))
    other = acted(params, pairs)
    np.testing.assert_allclose(loss(other, x[0]), loss(params, x[0]), rtol=1e-9)

    @jax.jit
    def measured(p):
        p, batches = jax.tree.map(lambda x: x.astype(dtype), (p, x))
        args, few = (loss, p, batches, 0.1), dict(num_steps=3)
        adaptive = dict(adaptive=True, random_init=False)
        return (
            sharpness.geodesic_sharpness(*args, pairs, key, metric=metric, **few).value,
            sharpness.worst_case_sharpness(*args, **adaptive, **few).value,
        )

    (before, adaptive), (after, moved) = measured(params), measured(other)
    assert before > 0
    assert before.dtype == dtype
    # In float32 the other factors are rounded: a hundred times its epsilon.
    np.testing.assert_allclose(after, before, rtol=1e-5 if dtype == "float64" else 3e-5)
    assert abs(moved / adaptive - 1) > 1e-3


def test_heads_are_asked_for():
    params = model("grouped")[1]
    with pytest.raises(ValueError, match=r"q_proj/kernel.*\(6, 8\).*num_heads=8"):
        sharpness.attention_gl_pairs(params)
    paths = (f"self_attn/{x}/kernel" for x in ("q_proj", "k_proj"))
    pair = sharpness.gl_pair(*paths)
    with pytest.raises(
        ValueError, match=r"head is a separate pair.*num_heads=8.*shape="
    ):
        locate([pair], params, params)
    with pytest.raises(ValueError, match="no lora_a and lora_b"):
        sharpness.lora_gl_pairs(params)
