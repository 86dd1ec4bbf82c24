"""vSAM on a transformer that is split over 8 devices: FSDP times tensor parallel.

A language model of bytes reads the source of optax_sam. Its weights lie on a mesh of
2 x 4 devices: heads and hidden units are split over "model", the other dimension of
each matrix and the batch over "data". The step is the same as on one device; only the
shardings of the arrays differ. A CPU simulates the devices. Needs flax and rich too.

    python examples/sharded_transformer.py
"""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track

import optax_sam

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)  # so that rounding hides no difference

STEPS, BATCH, LENGTH, WIDTH, HEADS, VOCABULARY = 60, 16, 32, 32, 4, 128
INWARD = "query", "key", "value", "up", "logits"
SPECS = {  # by the end of a weight's path; all other leaves are on every device
    **{f"{name}/kernel": P("data", "model") for name in INWARD},
    **{f"{name}/bias": P("model") for name in INWARD},
    **{f"{name}/kernel": P("model", "data") for name in ("embed", "down")},
    "out/kernel": P("model", None, "data"),
}
tx = optax.chain(optax_sam.vsam(0.05, window=10), optax.adam(3e-3))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(HEADS, name="attention")
        x += attention(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        one_hot = jax.nn.one_hot(tokens, VOCABULARY)  # an index would gather the table
        x = nn.Dense(WIDTH, use_bias=False, name="embed")(one_hot)
        x += self.param("positions", nn.initializers.normal(0.1), (LENGTH, WIDTH))
        for _ in range(2):
            x = Block()(x, nn.make_causal_mask(tokens))
        return nn.Dense(VOCABULARY, name="logits")(nn.LayerNorm()(x))


def train_step(params, opt_state, tokens):
    def loss_fn(params):
        logits = Transformer().apply({"params": params}, tokens[:, :-1])
        following = jax.nn.one_hot(tokens[:, 1:], VOCABULARY)
        return optax.softmax_cross_entropy(logits, following).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    grad_fn = jax.grad(loss_fn)  # of the whole batch, wherever its rows are
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state, loss


def train(params, batches, shape):
    """The final parameters, optimizer state and loss."""
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("data", "model"))

    def place(path, x):
        name = "/".join(key.key for key in path[-2:])
        return NamedSharding(mesh, SPECS.get(name, P()))

    with jax.set_mesh(mesh):  # outside jit, so vSAM's cache is sharded like the weights
        params = jax.device_put(params, jax.tree.map_with_path(place, params))
        opt_state = tx.init(params)
    placed = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    step = jax.jit(train_step, out_shardings=(*placed, None))
    for tokens in track(batches, f"{mesh.size} of 8 devices"):
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("data")))
        params, opt_state, loss = step(params, opt_state, tokens)
    return params, opt_state, loss


def main():
    files = sorted(Path(optax_sam.__file__).parent.rglob("*.py"))
    text = np.frombuffer(b"".join(map(Path.read_bytes, files)), np.uint8)
    rng, last = np.random.default_rng(0), len(text) - LENGTH
    rows = rng.integers(last, size=(STEPS, BATCH, 1))
    batches = text[rows + np.arange(LENGTH + 1)] % VOCABULARY
    params = Transformer().init(jax.random.key(0), batches[0, :, :-1])["params"]
    params = jax.tree.map(lambda x: x.astype(float), params)
    ends = [train(params, batches, shape) for shape in ((1, 1), (2, 4))]

    part = lambda x: x.addressable_shards[0].data
    block = ends[1][0]["Block_1"]
    for name, layer in (block | block["attention"]).items():
        if "kernel" in layer:
            w = layer["kernel"]
            print(f"{name:6}{w.shape!s:11} on each device {part(w).shape}")
    arrays = jax.tree.leaves(ends[1][:2])
    share = sum(part(x).nbytes for x in arrays) / sum(x.nbytes for x in arrays)
    print(f"Each device has {share:.0%} of weights and state; loss {ends[1][2]:.2f}.")
    ascents = [int(optax_sam.metrics(state)["ascents"]) for _, state, _ in ends]
    one, eight = (jax.tree.leaves(jax.device_get(params)) for params, *_ in ends)
    apart = max(np.abs(x - y).max() for x, y in zip(one, eight, strict=True))
    print(
        f"{ascents[0]} of {STEPS} steps perturbed on one device, {ascents[1]} on eight,"
        f" weights {apart:.0e} apart.\nExpected: equally many, and below 1e-8."
    )


if __name__ == "__main__":
    main()
