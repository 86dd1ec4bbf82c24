"""Training on wrong labels, by all methods in turns, for ``label_noise.py``."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

import optax_sam
from benchmarks.lib import datasets, networks
from benchmarks.studies.label_noise_methods import (
    BATCH_SIZE,
    WINDOW,
    Batch,
    Method,
    all_methods,
    model,
)

NOISE = 0.4  # share of the training labels drawn anew, uniformly from all ten


def make_epoch(method: Method) -> Any:
    """Compiles the training step, and a scan over an epoch's batches around it."""
    tx = optax.with_extra_args_support(method.optimizer)  # SGD alone takes none

    def train_step(state: Any, batch: Batch) -> tuple[Any, None]:
        params, opt_state, previous = state

        def forward(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            logits = model.apply(params, batch.images)
            return networks.losses(logits, batch.labels), logits

        def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            losses, logits = forward(params, batch)
            return losses.mean() + method.penalty(opt_state, batch, logits), logits

        def per_example_loss_fn(params: Any, indices: Any = None) -> jax.Array:
            chosen = (
                batch if indices is None else jax.tree.map(lambda x: x[indices], batch)
            )
            return forward(params, chosen)[0]

        gradient = jax.grad(loss_fn, has_aux=True)
        grads, logits = gradient(params, optax_sam.ascent_batch(batch, method.divisor))
        # Each method takes what it needs; XLA drops the rest.
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            grad_fn=lambda params: gradient(params, batch)[0],
            previous_grad_fn=lambda params: gradient(params, previous)[0],
            per_example_loss_fn=per_example_loss_fn,
            logits=logits,
            indices=batch.indices,
        )
        return (optax.apply_updates(params, updates), opt_state, batch), None

    def epoch(state: Any, batches: Batch) -> Any:
        return jax.lax.scan(train_step, state, batches)[0]

    return jax.jit(epoch, donate_argnums=0)


def train(
    names: list[str], num_seeds: int, num_epochs: int, progress: Progress
) -> dict[str, Any]:
    """Trains the methods in turns of one epoch; SGD is to be among them.

    Args:
      names: which methods.
      num_seeds: number of runs; a seed sets the weights, the noise and the batches.
      num_epochs: epochs of each run.
      progress: where to report.

    Returns:
      A row of the results for each method.
    """
    images, clean_labels, test_images, test_labels = datasets.digits()
    images, test_images = (datasets.flat(x, 16) for x in (images, test_images))
    steps = len(images) // BATCH_SIZE
    methods = all_methods(num_epochs * steps, len(images))

    def start(
        name: str, seed: int, batches: Batch
    ) -> tuple[Any, optax.OptState, Batch]:
        params = model.init(jax.random.key(seed), images[:1])
        first = jax.tree.map(lambda x: x[0], batches)
        return params, methods[name].optimizer.init(params), first

    def shuffled(labels: np.ndarray, rng: np.random.Generator) -> Batch:
        order = rng.permutation(len(labels))[: steps * BATCH_SIZE].reshape(steps, -1)
        return jax.tree.map(jnp.asarray, Batch(images[order], labels[order], order))

    epochs = {name: make_epoch(methods[name]) for name in names}
    progress.add_task("", total=num_seeds * num_epochs * len(names), rate=0.0)
    task = progress.tasks[-1]
    for name, epoch in epochs.items():
        progress.update(task.id, description=f"Compiling {name}")
        batches = shuffled(clean_labels, np.random.default_rng(0))
        epoch(start(name, 0, batches), batches)
    progress.reset(task.id)

    shape = num_seeds, num_epochs
    measured: Any = defaultdict(lambda: defaultdict(lambda: np.zeros(shape)))
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        count = round(NOISE * len(clean_labels))
        labels = datasets.replaced(clean_labels, count, rng)
        batches = shuffled(labels, rng)
        states = {name: start(name, seed, batches) for name in names}
        progress.update(task.id, description=f"Seed {seed + 1} of {num_seeds}")
        for i in range(num_epochs):
            for name, epoch in epochs.items():
                began = time.perf_counter()
                states[name] = jax.block_until_ready(epoch(states[name], batches))
                seconds = time.perf_counter() - began
                (params, opt_state, _), method = states[name], methods[name]
                params = method.eval_params(opt_state, params)
                percent = networks.accuracy(model, params, test_images, test_labels)
                row = {"seconds": seconds, "accuracy": percent, "ascent_rate": 1.0}
                if method.cost.skipped is not None:
                    row |= optax_sam.metrics(opt_state)
                for quantity, value in row.items():
                    measured[name][quantity][seed, i] = value
                progress.update(task.id, advance=1, rate=task.completed / task.elapsed)
            batches = shuffled(labels, rng)
    sgd = measured["SGD"]["seconds"]
    return {name: kept(methods[name], measured[name], sgd) for name in names}


def kept(method: Method, measured: dict[str, Any], sgd: np.ndarray) -> dict[str, Any]:
    """What the file holds of a method: arrays over seeds, or seeds and epochs."""
    rounded = lambda values, digits: np.round(values, digits).tolist()
    gradients = method.cost.mean(measured["ascent_rate"][:, -1])
    # All of training, each epoch by its median over the seeds.
    ratio = np.median(measured["seconds"] / sgd, axis=0).mean()
    row = {
        "settings": method.settings,
        "gradients_per_step": rounded(gradients, 4),
        "time_to_sgd": round(float(ratio), 3),
        "accuracy": rounded(measured["accuracy"], 4),
    }
    if "samples_per_window" in measured:
        # While it warms up, every step is sampled and the rate is not used.
        warm = measured["ascent_rate"] == 1
        rate = np.where(warm, np.nan, measured["samples_per_window"] / WINDOW)
        row["sampling_rate"] = [
            [None if np.isnan(x) else x for x in run] for run in rounded(rate, 4)
        ]
        row["psf_norm"] = rounded(measured["psf_norm"], 5)
    return row
