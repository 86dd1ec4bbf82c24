"""Plain functions, no framework: an MLP on digits with wrong labels, AdamW and vSAM.

Clipping, AdamW and its schedule go after the method in the chain. `dispatch` compiles
two programs, with and without the perturbed gradient, and the host runs the right one.
Needs scikit-learn too.

    python examples/plain_functions.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam

BATCH_SIZE = 64
SIZES = (64, 128, 128, 10)


def init(key):
    """Kernels and biases, a dict for each layer."""

    def layer(key, fan_in, fan_out):
        kernel = jax.nn.initializers.he_normal()(key, (fan_in, fan_out))
        return {"kernel": kernel, "bias": jnp.zeros(fan_out)}

    keys = jax.random.split(key, len(SIZES) - 1)
    return [layer(*of) for of in zip(keys, SIZES[:-1], SIZES[1:], strict=True)]


def forward(params, x):
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss_fn(params, batch):
    x, y = batch
    logits = forward(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_step(tx, compile):
    def train_step(params, opt_state, batch, ascend=None):
        grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=grad_fn, ascend=ascend
        )
        return optax.apply_updates(params, updates), opt_state, loss

    return compile(train_step, donate_argnums=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="four epochs")
    args = parser.parse_args()
    epochs = 4 if args.quick else args.epochs

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    rng = np.random.default_rng(0)
    y = np.where(rng.random(len(y)) < 0.4, rng.integers(10, size=len(y)), y)

    steps = epochs * (len(x) // BATCH_SIZE)
    lr = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    plain = optax.with_extra_args_support(optax.identity())
    methods = {
        "AdamW": (plain, jax.jit),
        "vSAM": (optax_sam.vsam(rho=0.5, window=20), optax_sam.dispatch),
    }
    for name, (method, compile) in methods.items():
        tx = optax.chain(
            method, optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=1e-3)
        )
        params = init(jax.random.key(0))
        opt_state, step = tx.init(params), make_step(tx, compile)
        order = np.random.default_rng(1)
        for _ in range(epochs):
            shuffled = order.permutation(len(x) // BATCH_SIZE * BATCH_SIZE)
            for i in shuffled.reshape(-1, BATCH_SIZE):
                params, opt_state, loss = step(params, opt_state, (x[i], y[i]))
        accuracy = 100 * np.mean(forward(params, test_x).argmax(-1) == test_y)
        rate = optax_sam.metrics(opt_state)["ascent_rate"] if name == "vSAM" else 0
        print(
            f"{name:6}{accuracy:5.1f} % test accuracy, training loss {loss:.2f},"
            f" {1 + rate:.2f} gradients per step"
        )


if __name__ == "__main__":
    main()
