"""One training of the quality benchmark: its step, its epochs, its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import networks
import optax
import presets

import optax_sam
import optax_sam.linen

LAST = 5  # epochs over which the second accuracy is a mean
EVALUATION_BATCH = 1000
STATISTICS_BATCHES = 50  # that estimate BatchNorm's statistics anew
CHUNK = 10  # steps between two moves of the progress bar


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


class Epoch(NamedTuple):
    """What is known after an epoch.

    Attributes:
      seconds: that it took, without the evaluation.
      cold: whether something was compiled in it.
      loss: mean over its steps, at the parameters, with smoothed labels.
      accuracy: on the test set in percent, if that was looked at.
    """

    seconds: float
    cold: bool
    loss: float
    accuracy: float | None


class Trainer:
    """A compiled training, for any seed.

    Args:
      recipe: how to train.
      method: one of ``presets.METHODS``.
      values: its hyperparameters.
      data: the data set, on the device.
      scan: whether an epoch is one program.
      evaluate_every: epochs; the last ``LAST`` are evaluated in any case.
    """

    def __init__(
        self,
        recipe: presets.Recipe,
        method: str,
        values: dict[str, float],
        data: datasets.Data,
        scan: bool,
        evaluate_every: int = 1,
    ) -> None:
        """Compiles nothing yet."""
        self.recipe, self.method, self.values = recipe, method, values
        self.data, self.scan, self.evaluate_every = data, scan, evaluate_every
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
        self.shuffled = jax.jit(self.order)
        if scan:
            self.whole_epoch = jax.jit(self.scanned, donate_argnums=0)
        elif self.built.ascends:
            self.step = optax_sam.dispatch(self.train_step, donate_argnums=0)
        else:
            self.step = jax.jit(self.train_step, donate_argnums=0)
        self.statistics = jax.jit(self.new_statistics)
        self.correct = jax.jit(self.right_answers)
        self.eval_params = jax.jit(optax_sam.msam_eval_params)

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

    def start(self, seed: int) -> State:
        """The state before the first step."""
        init = jax.jit(lambda key, x: self.model.init(key, x, train=False))
        images = datasets.normalize(self.data, self.data.train_x[:1])
        variables = dict(init(jax.random.key(seed), images))
        params = variables.pop("params")
        averaged = {}
        if self.method == "MESA":
            # From the first weights' own: the average forgets what it starts with too
            # slowly to start with zeros and ones.
            averaged = self.estimated(params, variables, seed)
        opt_state = self.build(seed).tx.init(params)
        # Buffers of their own, for each is donated.
        return jax.tree.map(
            jnp.array,
            State(params, variables, opt_state, averaged, jnp.zeros(())),
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

    def epoch(
        self, state: State, key: jax.Array, epoch: int, tick: Callable[[int], None]
    ) -> State:
        """An epoch; it ends when the device has done it."""
        state = state._replace(loss=jnp.zeros(()))
        number = jnp.int32(epoch)
        if self.scan:
            state = self.whole_epoch(state, self.data, key, number)
            jax.block_until_ready(state)
            tick(self.steps)
            return state
        order = self.shuffled(key, number)
        for i in range(self.steps):
            state = self.step(state, self.data, order, jnp.int32(i), key, number)
            if (i + 1) % CHUNK == 0:
                jax.block_until_ready(state.loss)
                tick(CHUNK)
        jax.block_until_ready(state)
        tick(self.steps % CHUNK)
        return state

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

    def estimated(self, params: Any, model_state: Any, seed: int) -> Any:
        """BatchNorm's statistics at these parameters, from forward passes alone."""
        if not model_state:
            return model_state
        key = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)
        order = self.shuffled(key, 0)
        for i in range(STATISTICS_BATCHES):
            rows, batch_key = order[i % self.steps], jax.random.fold_in(key, i)
            args = self.data, rows, batch_key
            model_state = self.statistics(params, model_state, *args)
        return model_state

    def right_answers(
        self, params: Any, model_state: Any, data: datasets.Data, start: Any
    ) -> jax.Array:
        """How many of a stretch of the test set are right."""
        rows = start + jnp.arange(min(EVALUATION_BATCH, len(data.test_y)))
        inside = rows < len(data.test_y)
        rows = jnp.minimum(rows, len(data.test_y) - 1)
        images = datasets.normalize(data, data.test_x[rows])
        variables = {"params": params, **model_state}
        logits = self.model.apply(variables, images, train=False)
        return jnp.sum((logits.argmax(-1) == data.test_y[rows]) & inside)

    def accuracy(self, state: State, seed: int) -> float:
        """On the test set, in percent.

        MSAM is judged at the weights without its perturbation, where BatchNorm's
        statistics are first estimated anew, as the authors do after training.
        """
        params, model_state = state.params, state.model_state
        if self.method == "MSAM":
            params = self.eval_params(state.opt_state, params)
            model_state = self.estimated(params, model_state, seed)
        total = len(self.data.test_y)
        counts = [
            self.correct(params, model_state, self.data, jnp.int32(start))
            for start in range(0, total, EVALUATION_BATCH)
        ]
        return 100 * sum(map(int, counts)) / total

    def run(
        self,
        seed: int,
        folder: Path,
        stop: Callable[[float], bool] = lambda seconds: False,
        tick: Callable[[int], None] = lambda steps: None,
        say: Callable[[int, Epoch], None] = lambda number, epoch: None,
    ) -> dict[str, Any] | None:
        """Trains, or goes on with a training that was stopped.

        Args:
          seed: of weights, batches, augmentation and of what the method draws.
          folder: for the checkpoint, if the training is stopped.
          stop: asked after each epoch, with the seconds that it took.
          tick: told how many steps were done.
          say: told the number of an epoch and what came of it.

        Returns:
          The results, or ``None`` if stopped.
        """
        state, history = self.start(seed), []
        if (folder / "run.json").exists():
            state, history = restore(folder, state)
            tick(len(history) * self.steps)
        key = jax.random.fold_in(jax.random.key(seed), 1)
        epochs = self.recipe.epochs
        for number in range(len(history) + 1, epochs + 1):
            traces, begin = self.traces, time.perf_counter()
            state = self.epoch(state, key, number - 1, tick)
            seconds = time.perf_counter() - begin
            due = number % self.evaluate_every == 0 or number > epochs - LAST
            history.append(
                Epoch(
                    seconds,
                    traces != self.traces,
                    float(state.loss) / self.steps,
                    self.accuracy(state, seed) if due else None,
                )
            )
            say(number, history[-1])
            took = time.perf_counter() - begin
            if number < epochs and stop(took):
                save(folder, state, history)
                return None
        shutil.rmtree(folder, ignore_errors=True)
        return self.results(state, history)

    def results(self, state: State, history: list[Epoch]) -> dict[str, Any]:
        """What a run is judged by."""
        built, steps = self.built, self.steps * self.recipe.epochs
        ascents = 0
        if built.ascends:
            ascents = int(optax_sam.metrics(state.opt_state)["ascents"])
        cost = built.base_cost + built.ascent_cost * ascents / steps
        accuracies = [epoch.accuracy for epoch in history]
        warm = [epoch.seconds for epoch in history if not epoch.cold]
        images = self.steps * self.recipe.batch_size
        speeds = sorted(images / seconds for seconds in warm)
        middle = len(speeds) // 2
        median = (speeds[middle] + speeds[-middle - 1]) / 2 if speeds else None
        return {
            "accuracy": accuracies[-1],
            "accuracy_last_epochs": sum(accuracies[-LAST:]) / len(accuracies[-LAST:]),
            "train_loss": finite(history[-1].loss),
            "ascents": ascents,
            "steps": steps,
            "gradients_per_step": cost,
            "images_per_second": median,
            # Mean instead of median: what ascends more at times is slower then.
            "ais": images * len(warm) / sum(warm) if warm else None,
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "history": {
                name: [finite(getattr(epoch, name)) for epoch in history]
                for name in Epoch._fields
            },
        }


def finite(x: Any) -> Any:
    """``None`` for a number that JSON cannot hold."""
    return x if not isinstance(x, float) or math.isfinite(x) else None


def save(folder: Path, state: State, history: list[Epoch]) -> None:
    """Writes a checkpoint; what ``run.json`` names is complete."""
    import orbax.checkpoint as ocp

    leaves = {f"{i:05d}": x for i, x in enumerate(jax.tree.leaves(state))}
    name = f"epoch_{len(history)}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / name).absolute(), leaves)
        checkpointer.wait_until_finished()
    new = folder / "run.new"
    new.write_text(json.dumps({"leaves": name, "history": history}))
    new.replace(folder / "run.json")
    for old in folder.glob("epoch_*"):
        if old.name != name:
            shutil.rmtree(old)


def restore(folder: Path, like: State) -> tuple[State, list[Epoch]]:
    """Reads it, into arrays like these."""
    import orbax.checkpoint as ocp

    kept = json.loads((folder / "run.json").read_text())
    leaves, structure = jax.tree.flatten(like)
    target = {
        f"{i:05d}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for i, x in enumerate(leaves)
    }
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore((folder / kept["leaves"]).absolute(), target)
    found = [jnp.array(found[name]) for name in sorted(found)]
    history = [Epoch(*epoch) for epoch in kept["history"]]
    return jax.tree.unflatten(structure, found), history


def settings(trainer: Trainer, seed: int) -> dict[str, Any]:
    """All that decides what a training does, apart from the machine."""
    return {
        "method": trainer.method,
        "seed": seed,
        "hyperparameters": trainer.values,
        **dataclasses.asdict(trainer.recipe),
    }
