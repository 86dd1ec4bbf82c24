"""The networks of gallery.py: small ones, on digits with many wrong labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_sam

model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])

BATCH_SIZE, NUM_BATCHES, NOISE, LEARNING_RATE, WINDOW = 64, 28, 0.4, 0.1, 50
OPTIMIZERS = {
    "SGD": optax.sgd(LEARNING_RATE),
    "SAM": optax.chain(optax_sam.sam(0.5), optax.sgd(LEARNING_RATE)),
    "vSAM": optax.chain(optax_sam.vsam(0.7, window=WINDOW), optax.sgd(LEARNING_RATE)),
}


def noisy_digits() -> tuple[jax.Array, jax.Array]:
    """Digits; 40 % of the labels are redrawn."""
    size, rng = NUM_BATCHES * BATCH_SIZE, np.random.default_rng(0)
    images, labels = (x[:size] for x in load_digits(return_X_y=True))
    labels = np.where(rng.random(size) < NOISE, rng.integers(0, 10, size), labels)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)


def model_fn(params: Any, batch: Any) -> jax.Array:
    """The logits."""
    return model.apply(params, batch[0])


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    """The mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """The loss that is trained."""
    return cross_entropy(model_fn(params, batch), batch)


def train(
    optimizer: optax.GradientTransformation, data: Any, num_epochs: int
) -> Iterator[tuple[Any, Any]]:
    """The parameters and the optimizer's state, before and after each epoch."""
    tx = optax.with_extra_args_support(optimizer)  # SGD alone takes none

    def step(state: Any, batch: Any) -> tuple[Any, None]:
        params, opt_state = state
        grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def epoch(state: Any, data: Any, order: jax.Array) -> Any:
        batches = jax.tree.map(lambda x: x[order], data)
        return jax.lax.scan(step, state, batches)[0]

    rng = np.random.default_rng(0)
    params = model.init(jax.random.key(0), data[0][:1])
    state = params, tx.init(params)
    yield state
    for _ in range(num_epochs):
        order = rng.permutation(len(data[0])).reshape(NUM_BATCHES, BATCH_SIZE)
        state = epoch(state, data, order)
        yield state
