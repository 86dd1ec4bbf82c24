"""What is compiled for the quality benchmark: a step, an epoch, an evaluation."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_sam
import optax_sam.linen
from benchmarks.lib import datasets, networks
from benchmarks.quality import presets

EVALUATION_BATCH = 1000


class State(NamedTuple):
    """All that a training step changes.

    Attributes:
      params: the parameters, float32.
      model_state: BatchNorm's statistics, or nothing.
      opt_state: of the optimizer.
      averaged: MESA's average of ``model_state``; nothing for other methods.
      loss: sum over the steps of this epoch.
    """

    params: Any
    model_state: Any
    opt_state: Any
    averaged: Any
    loss: jax.Array


class Batch(NamedTuple):
    """What a step trains on: images, smoothed labels, places in the training set."""

    images: jax.Array
    targets: jax.Array
    rows: jax.Array


@functools.cache
def initializer(model: Any) -> Any:
    """Makes a model's variables; compiled once for all methods and seeds."""
    return jax.jit(lambda key, x: model.init(key, x, train=False))


@functools.cache
def evaluator(model: Any) -> Any:
    """How many of a stretch of the test set are right; compiled once as well."""

    def right_answers(
        params: Any, model_state: Any, data: datasets.Data, start: Any
    ) -> jax.Array:
        rows = start + jnp.arange(min(EVALUATION_BATCH, len(data.test_y)))
        inside = rows < len(data.test_y)
        rows = jnp.minimum(rows, len(data.test_y) - 1)
        images = datasets.normalize(data, data.test_x[rows])
        logits = model.apply({"params": params, **model_state}, images, train=False)
        return jnp.sum((logits.argmax(-1) == data.test_y[rows]) & inside)

    return jax.jit(right_answers)


class Steps:
    """The functions of a training; none of them is compiled yet.

    Args:
      recipe: how to train.
      method: one of ``presets.METHODS``.
      values: its hyperparameters.
      data: the data set, on the device.
    """

    def __init__(
        self,
        recipe: presets.Recipe,
        method: str,
        values: dict[str, float],
        data: datasets.Data,
    ) -> None:
        """Makes the model and the optimizer."""
        self.recipe, self.method, self.values, self.data = recipe, method, values, data
        self.examples = len(data.train_y)
        self.classes = datasets.CLASSES[recipe.data]
        self.steps = self.examples // recipe.batch_size
        if not self.steps:
            raise SystemExit(f"{self.examples} examples do not fill a batch")
        self.model = networks.NETWORKS[recipe.model](
            classes=self.classes, dtype=jnp.dtype(recipe.dtype)
        )
        self.built = self.build(0)
        self.traces = 0  # a count that moves when a step is compiled

    def build(self, seed: int) -> presets.Method:
        """The optimizer; the seed is in the state that it starts with."""
        return presets.build(
            self.method,
            self.values,
            self.recipe,
            steps=self.steps * self.recipe.epochs,
            examples=self.examples,
            classes=self.classes,
            seed=seed,
        )

    def order(self, key: jax.Array, epoch: Any) -> jax.Array:
        """Which examples make which batch: (steps, batch size)."""
        size = self.recipe.batch_size
        rows = jax.random.permutation(jax.random.fold_in(key, epoch), self.examples)
        return rows[: self.steps * size].reshape(self.steps, size)

    def batch(self, data: Any, rows: jax.Array, key: jax.Array) -> Batch:
        """The examples in these rows, augmented."""
        images = datasets.training_images(
            key, data, data.train_x[rows], self.recipe.augmentation
        )
        # The share is that of the wrong classes; Optax's is of all of them.
        alpha = self.recipe.smoothing * self.classes / (self.classes - 1)
        one_hot = jax.nn.one_hot(data.train_y[rows], self.classes)
        return Batch(images, optax.smooth_labels(one_hot, alpha), rows)

    def penalty(self, state: State, logits: jax.Array, batch: Batch, epoch: Any) -> Any:
        """What SAF and MESA add to the loss."""
        get = self.values.__getitem__
        if self.method == "SAF":
            past, known = optax_sam.saf_past_logits(state.opt_state, batch.rows)
            return optax_sam.trajectory_loss(
                logits,
                past,
                coefficient=get("coefficient"),
                temperature=get("temperature"),
                where=known,
            )
        if self.method == "MESA":
            average = optax_sam.mesa_params(state.opt_state)
            variables = {"params": average, **state.averaged}
            past = self.model.apply(variables, batch.images, train=False)
            return optax_sam.trajectory_loss(
                logits,
                past,
                coefficient=jnp.where(epoch > get("start"), get("coefficient"), 0.0),
                temperature=get("temperature"),
            )
        return 0.0

    def train_step(
        self,
        state: State,
        data: datasets.Data,
        order: jax.Array,
        i: Any,
        key: jax.Array,
        epoch: Any,
        ascend: bool | None = None,
    ) -> State:
        """One step: the same code for all methods, in a scan and out of one."""
        self.traces += 1
        step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), i + 1)
        batch = self.batch(data, order[i], step_key)

        def forward(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
            variables = {"params": params, **state.model_state}
            logits, model_state = self.model.apply(
                variables, batch.images, train=True, mutable=list(state.model_state)
            )
            losses = optax.softmax_cross_entropy(logits, batch.targets)
            return losses, logits, model_state

        def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
            losses, logits, model_state = forward(params, batch)
            loss = losses.mean() + self.penalty(state, logits, batch, epoch)
            return loss, (losses, logits, model_state)

        def per_example_loss_fn(params: Any, indices: Any = None) -> jax.Array:
            chosen = batch
            if indices is not None:
                chosen = jax.tree.map(lambda x: x[indices], batch)
            return forward(params, chosen)[0]

        value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
        first = optax_sam.ascent_batch(batch, self.built.divisor)
        (_, aux), grads, grad_fn = value_and_grad(state.params, first)
        if self.built.divisor > 1:
            grad_fn = lambda params: jax.grad(loss_fn, has_aux=True)(params, batch)[0]
        losses, logits, model_state = aux
        extra: dict[str, Any] = {}
        if self.method == "ESAM":
            extra["per_example_loss_fn"] = per_example_loss_fn
            extra["per_example_losses"] = losses
        elif self.method == "SAF":
            extra |= {"logits": logits, "indices": batch.rows}
        elif self.built.ascends:
            extra["grad_fn"] = grad_fn
        if ascend is not None:
            extra["ascend"] = ascend
        updates, opt_state = self.built.tx.update(
            grads, state.opt_state, state.params, **extra
        )
        averaged = state.averaged
        if self.method == "MESA":
            averaged = optax.incremental_update(
                model_state, averaged, 1 - self.values["decay"]
            )
        return State(
            optax.apply_updates(state.params, updates),
            dict(model_state),
            opt_state,
            averaged,
            state.loss + losses.mean(),
        )

    def scanned(
        self, state: State, data: datasets.Data, key: jax.Array, epoch: Any
    ) -> State:
        """An epoch as one program."""
        order = self.order(key, epoch)
        body = lambda state, i: (
            self.train_step(state, data, order, i, key, epoch),
            None,
        )
        return jax.lax.scan(body, state, jnp.arange(self.steps))[0]

    def new_statistics(
        self, params: Any, model_state: Any, data: Any, rows: Any, key: Any
    ) -> Any:
        """BatchNorm's statistics after one more batch."""
        images = self.batch(data, rows, key).images
        variables = {"params": params, **model_state}
        return dict(
            self.model.apply(variables, images, train=True, mutable=list(model_state))[
                1
            ]
        )
