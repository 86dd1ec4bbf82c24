"""Flax NNX, BatchNorm and dropout: an MLP on digits with wrong labels, SGD and SAM.

The model's statistics and random streams advance once per step. The perturbed pass runs
on a copy from before the pass at `w`, and draws the same dropout mask. Needs flax and
scikit-learn too.

    python examples/nnx_batchnorm.py
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam
import optax_sam.nnx

BATCH_SIZE = 64


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.outer = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.inner(x)))
        return self.outer(self.dropout(x))


def loss_fn(model, batch):
    x, y = batch
    logits = model(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, {"accuracy": jnp.mean(logits.argmax(-1) == y)}


@nnx.jit
def train_step(model, optimizer, batch):
    value_and_grad = optax_sam.nnx.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads, grad_fn = value_and_grad(model, batch)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return metrics | {"loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="two epochs")
    args = parser.parse_args()
    epochs = 2 if args.quick else args.epochs

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    rng = np.random.default_rng(0)
    y = np.where(rng.random(len(y)) < 0.4, rng.integers(10, size=len(y)), y)

    methods = {"SGD": optax.identity(), "SAM": optax_sam.sam(rho=0.2)}
    for name, method in methods.items():
        model = MLP(nnx.Rngs(0))
        # An optimizer without SAM must be told to ignore grad_fn.
        tx = optax.with_extra_args_support(
            optax.chain(method, optax.sgd(0.05, momentum=0.9))
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        order = np.random.default_rng(1)
        for _ in range(epochs):
            shuffled = order.permutation(len(x) // BATCH_SIZE * BATCH_SIZE)
            for i in shuffled.reshape(-1, BATCH_SIZE):
                metrics = train_step(model, optimizer, (x[i], y[i]))
        model.eval()
        accuracy = 100 * np.mean(model(test_x).argmax(-1) == test_y)
        print(
            f"{name:4}{accuracy:5.1f} % test accuracy, training loss"
            f" {metrics['loss']:.2f} after {int(optimizer.step[...])} steps"
        )


if __name__ == "__main__":
    main()
