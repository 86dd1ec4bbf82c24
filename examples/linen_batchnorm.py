"""Flax Linen, BatchNorm and dropout: a CNN on digits with wrong labels, SGD and SAM.

The running statistics come from the pass at `w`, and both passes use the same dropout
mask. `dispatch` keeps convolutions out of conditionals, where they are slow on a CPU.
Needs flax and scikit-learn too.

    python examples/linen_batchnorm.py
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam
import optax_sam.linen

BATCH_SIZE = 64


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


model = CNN()


def loss_fn(params, model_state, batch, dropout_key):
    x, y = batch
    logits, model_state = model.apply(
        {"params": params, **model_state},
        x,
        train=True,
        mutable=list(model_state),
        rngs={"dropout": dropout_key},
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    accuracy = jnp.mean(logits.argmax(-1) == y)
    return loss, ({"loss": loss, "accuracy": accuracy}, model_state)


def train_step(state, batch, key, ascend=None):
    value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
    (_, (metrics, model_state)), grads, grad_fn = value_and_grad(
        state.params, state.model_state, batch, jax.random.fold_in(key, state.step)
    )
    state = state.apply_gradients(
        grads=grads, grad_fn=grad_fn, ascend=ascend, model_state=model_state
    )
    return state, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="two epochs")
    args = parser.parse_args()
    epochs = 2 if args.quick else args.epochs

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    rng = np.random.default_rng(0)
    y = np.where(rng.random(len(y)) < 0.4, rng.integers(10, size=len(y)), y)

    key = jax.random.key(0)
    for name in ("SGD", "SAM-2"):  # perturbed on every second step
        sharp = name == "SAM-2"
        every_other = optax_sam.when.every_k(2)
        first = optax_sam.sam(0.5, when=every_other) if sharp else optax.identity()
        variables = model.init(key, x[:1], train=False)
        state = optax_sam.linen.TrainState.create(
            apply_fn=model.apply,
            params=variables.pop("params"),
            tx=optax.chain(first, optax.sgd(0.05, momentum=0.9)),
            model_state=variables,
        )
        step = (optax_sam.dispatch if sharp else jax.jit)(train_step, donate_argnums=0)
        order = np.random.default_rng(1)
        for _ in range(epochs):
            for i in order.permutation(len(x) // BATCH_SIZE * BATCH_SIZE).reshape(
                -1, BATCH_SIZE
            ):
                state, metrics = step(state, (x[i], y[i]), key)
        logits = model.apply(
            {"params": state.params, **state.model_state}, test_x, train=False
        )
        accuracy = 100 * np.mean(logits.argmax(-1) == test_y)
        gradients = 1 + (optax_sam.metrics(state)["ascent_rate"] if sharp else 0)
        print(
            f"{name:7}{accuracy:5.1f} % test accuracy, training loss"
            f" {metrics['loss']:.2f}, {gradients:.2f} gradients per step"
        )


if __name__ == "__main__":
    main()
