"""SGD and SAM on digits with 36 % wrong labels (40 % are redrawn from all ten).

A small network on scikit-learn's digits, tested on right labels, within a minute on two
cores. Needs flax, scikit-learn and rich too. A search on held-out training images chose
learning rate, weight decay and radius of each row, also of SGD. "SGD 2x" computes as
many gradients as SAM. Three seeds show no ranking; docs/results/accuracy.md has twenty
seeds and many more methods.

    python examples/digits_label_noise.py [--quick]
"""

from __future__ import annotations

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam

model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])
BATCH_SIZE, NOISE = 64, 0.4  # this share of the labels is redrawn from all ten
VSAM = optax_sam.vsam(rho=0.5, window=30, initial_rate=0.33, max_rate=0.4)
# The transformation that goes first in the chain, the learning rate, the weight decay.
ROWS: dict[str, tuple[Any, float, float]] = {
    "SGD": (None, 0.005, 1e-3),
    "SGD 2x": (None, 0.1, 1e-2),
    "SAM": (optax_sam.sam(rho=0.5), 0.05, 1e-3),
    "vSAM": (VSAM, 0.02, 5e-4),
    "quarter-batch SAM": (optax_sam.sam(rho=1.0), 0.1, 1e-4),
    "MSAM": (None, 0.05, 2e-4),
}
DIVISOR = {"quarter-batch SAM": 4}  # perturbs along one example in four
LENGTH = {"SGD 2x": 2}


def optimizer(name: str, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """The method goes before weight decay and SGD; MSAM goes around SGD."""
    method, rate, decay = ROWS[name]
    sgd = optax.sgd(optax.cosine_decay_schedule(rate, num_steps), momentum=0.9)
    if name == "MSAM":
        sgd = optax_sam.msam(sgd, rho=2.0)
    first = [method] if method else []
    chain = optax.chain(*first, optax.add_decayed_weights(decay), sgd)
    return optax.with_extra_args_support(chain)


def make_epoch(tx: optax.GradientTransformationExtraArgs, divisor: int) -> Any:
    """Compiles the training step, and a scan over an epoch's batches around it."""

    def train_step(state: Any, batch: Any) -> tuple[Any, None]:
        params, opt_state = state

        def loss_fn(params: Any, batch: Any) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(model.apply(params, batch[0]), batch[1]).mean()

        gradient = jax.grad(loss_fn)
        grads = gradient(params, optax_sam.ascent_batch(batch, divisor))
        grad_fn = lambda params: gradient(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.jit(lambda state, batches: jax.lax.scan(train_step, state, batches)[0])


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    seeds, num_epochs = (1, 2) if parser.parse_args().quick else (3, 100)

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    steps = len(images) // BATCH_SIZE
    table = Table("Method", "Test accuracy (%)", "Gradients / SGD's")
    for name in track(ROWS, "Training"):
        length, divisor = LENGTH.get(name, 1), DIVISOR.get(name, 1)
        tx, found = optimizer(name, length * num_epochs * steps), []
        epoch, gradients = make_epoch(tx, divisor), float(length)
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            wrong = rng.permutation(len(labels))[: round(NOISE * len(labels))]
            noisy = labels.copy()
            noisy[wrong] = rng.integers(0, 10, len(wrong))
            params = model.init(jax.random.key(seed), images[:1])
            state = params, tx.init(params)
            for _ in range(length * num_epochs):
                order = rng.permutation(len(images))[: steps * BATCH_SIZE]
                order = order.reshape(steps, -1)
                state = epoch(state, (images[order], noisy[order]))
            params, opt_state = state
            if name == "MSAM":  # its parameters are the perturbed ones
                params = optax_sam.msam_eval_params(opt_state, params)
            right = model.apply(params, test_images).argmax(-1) == test_labels
            found.append(100 * float(jnp.mean(right)))
            if ROWS[name][0]:
                rate = optax_sam.metrics(opt_state)["ascent_rate"]
                gradients += float(rate) / divisor / seeds
        accuracy = f"{np.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})"
        table.add_row(name, accuracy, f"{gradients:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
