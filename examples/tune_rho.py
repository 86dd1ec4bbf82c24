"""Tunes rho in one run: a population over radii and seeds, trained by one vmap.

A small network learns digits for each radius and seed; 36 % of the labels are wrong.
Held-out right labels choose the radius, and the test images are used once, at the end.
Under vmap a conditional computes both branches. So vSAM decides as it would alone, but
computes a perturbed gradient on every step. Tune its radius here, and train without
vmap. Needs scikit-learn and rich too.

    python examples/tune_rho.py [--method vsam] [--quick]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam

RADII = 0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0
METHODS: dict[str, Any] = {
    "sam": optax_sam.sam,
    "vsam": lambda rho: optax_sam.vsam(rho, window=30, initial_rate=0.33),
}
BATCH_SIZE, HIDDEN, NOISE = 64, 64, 0.4


def logits(params: Any, images: jax.Array) -> jax.Array:
    """One hidden layer."""
    return jax.nn.relu(images @ params["a"]) @ params["b"]


def make_train(method: str, images: Any, labels: Any, num_steps: int) -> Any:
    """A whole training run, as a function of a radius and a seed."""

    def train(rho: jax.Array, seed: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed), 4)
        wrong = jax.random.bernoulli(keys[0], NOISE, labels.shape)
        drawn = jax.random.randint(keys[1], labels.shape, 0, 10)
        noisy = jnp.where(wrong, drawn, labels)
        first = jax.random.normal(keys[2], (64, HIDDEN)) / 8
        params = {"a": first, "b": jnp.zeros((HIDDEN, 10))}
        rate = optax.cosine_decay_schedule(0.05, num_steps)
        # The radius is an array: each training run has its own.
        tx = optax.chain(METHODS[method](rho), optax.sgd(rate, momentum=0.9))

        def step(state: Any, key: jax.Array) -> tuple[Any, None]:
            params, opt_state = state
            chosen = jax.random.randint(key, (BATCH_SIZE,), 0, len(images))

            def loss_fn(params: Any) -> jax.Array:
                losses = optax.softmax_cross_entropy_with_integer_labels
                return losses(logits(params, images[chosen]), noisy[chosen]).mean()

            grad_fn = jax.grad(loss_fn)
            grads = grad_fn(params)
            updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), opt_state), None

        state, steps = (params, tx.init(params)), jax.random.split(keys[3], num_steps)
        return jax.lax.scan(step, state, steps)[0][0]

    return train


def main() -> None:
    """Tunes the radius, and times the same runs one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="sam")
    parser.add_argument("--quick", action="store_true", help="two seeds, 100 steps")
    options = parser.parse_args()
    seeds, num_steps = (jnp.arange(2), 100) if options.quick else (jnp.arange(4), 2000)

    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    rows, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0)
    rows, held_out = train_test_split(rows, test_size=0.25, random_state=0)
    train = make_train(options.method, images[rows], labels[rows], num_steps)
    # The inner vmap is over seeds, the outer over radii: one program for all runs.
    population = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))
    radii, alone = jnp.array(RADII), jax.jit(train)

    def timed(run: Any) -> tuple[Any, float]:
        begin = time.perf_counter()
        return jax.block_until_ready(run()), time.perf_counter() - begin

    params, together = timed(lambda: population(radii, seeds))
    _, apart = timed(lambda: [alone(rho, seed) for rho in radii for seed in seeds])

    def accuracy(params: Any, rows: Any) -> jax.Array:
        right = logits(params, images[rows]).argmax(-1) == labels[rows]
        return 100 * right.mean()

    judge = jax.vmap(jax.vmap(accuracy, (0, None)), (0, None))
    percents = judge(params, held_out)
    means, best = percents.mean(1), int(percents.mean(1).argmax())
    table, console = Table("rho", "Held-out accuracy (%)", "seeds", ""), Console()
    for rho, mean, found in zip(RADII, means, percents, strict=True):
        bar = "━" * int(2 * (mean - means.max()) + 30)  # two signs a point, at most 15
        spread = f"{found.min():.1f} to {found.max():.1f}"
        table.add_row(f"{rho:g}", f"{mean:.1f}", spread, bar)
    console.print(table)
    tested = judge(params, test)[best].mean()
    console.print(f"Chosen: rho {RADII[best]:g}, test accuracy {tested:.1f} %")
    runs = f"{len(RADII) * len(seeds)} training runs, with compilation"
    console.print(f"{runs}: {together:.1f} s, one after the other {apart:.1f} s")


if __name__ == "__main__":
    main()
