"""Equinox: an MLP on digits with wrong labels, SGD and SAM.

The optimizer sees the model's floats; functions and static leaves stay as they are.
Both passes draw the same dropout masks, because the keys are a part of the batch. Needs
equinox and scikit-learn too.

    python examples/equinox_digits.py
"""

import argparse

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam
import optax_sam.equinox

BATCH_SIZE = 64


class MLP(eqx.Module):
    inner: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    outer: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.inner = eqx.nn.Linear(64, 256, key=keys[0])
        self.dropout = eqx.nn.Dropout(0.2)
        self.outer = eqx.nn.Linear(256, 10, key=keys[1])

    def __call__(self, x, key=None):
        return self.outer(self.dropout(jax.nn.relu(self.inner(x)), key=key))


def loss_fn(model, batch):
    x, y, keys = batch
    logits = jax.vmap(model)(x, keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_step(tx):
    @eqx.filter_jit
    def train_step(model, opt_state, batch):
        value_and_grad = optax_sam.equinox.value_and_grad(loss_fn)
        loss, grads, grad_fn = value_and_grad(model, batch)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return eqx.apply_updates(model, updates), opt_state, loss

    return train_step


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

    methods = {
        "SGD": optax.with_extra_args_support(optax.identity()),
        "SAM": optax_sam.sam(rho=0.5),
    }
    for name, method in methods.items():
        tx = optax.chain(method, optax.sgd(0.1, momentum=0.9))
        model = MLP(jax.random.key(0))
        opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        step, key = make_step(tx), jax.random.key(1)
        order = np.random.default_rng(1)
        for _ in range(epochs):
            shuffled = order.permutation(len(x) // BATCH_SIZE * BATCH_SIZE)
            for i in shuffled.reshape(-1, BATCH_SIZE):
                key, drawn = jax.random.split(key)
                batch = x[i], y[i], jax.random.split(drawn, BATCH_SIZE)
                model, opt_state, loss = step(model, opt_state, batch)
        tested = jax.vmap(eqx.nn.inference_mode(model))(test_x)
        accuracy = 100 * np.mean(tested.argmax(-1) == test_y)
        print(f"{name:4}{accuracy:5.1f} % test accuracy, training loss {loss:.2f}")


if __name__ == "__main__":
    main()
