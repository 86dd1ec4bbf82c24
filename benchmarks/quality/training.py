"""One training of the quality benchmark, from its start or from a checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import optax_sam
from benchmarks.lib import datasets
from benchmarks.quality import presets
from benchmarks.quality.checkpoints import Epoch, brief, restore, save
from benchmarks.quality.step import (
    EVALUATION_BATCH,
    State,
    Steps,
    evaluator,
    initializer,
)

LAST = 5  # epochs over which the second accuracy is a mean
STATISTICS_BATCHES = 50  # that estimate BatchNorm's statistics anew
CHUNK = 10  # steps between two moves of the progress bar


class Trainer(Steps):
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
        super().__init__(recipe, method, values, data)
        self.scan, self.evaluate_every = scan, evaluate_every
        self.shuffled = jax.jit(self.order)
        if scan:
            self.whole_epoch = jax.jit(self.scanned, donate_argnums=0)
        elif self.built.ascends:
            self.step = optax_sam.dispatch(self.train_step, donate_argnums=0)
        else:
            self.step = jax.jit(self.train_step, donate_argnums=0)
        self.statistics = jax.jit(self.new_statistics)
        self.correct = evaluator(self.model)
        self.eval_params = jax.jit(optax_sam.msam_eval_params)

    def start(self, seed: int) -> State:
        """The state before the first step."""
        images = datasets.normalize(self.data, self.data.train_x[:1])
        variables = dict(initializer(self.model)(jax.random.key(seed), images))
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
        cost = built.cost.mean(ascents / steps)
        accuracies = [epoch.accuracy for epoch in history]
        warm = [epoch.seconds for epoch in history if not epoch.cold]
        images = self.steps * self.recipe.batch_size
        speeds = sorted(images / seconds for seconds in warm)
        middle = len(speeds) // 2
        median = (speeds[middle] + speeds[-middle - 1]) / 2 if speeds else None
        return {
            "accuracy": accuracies[-1],
            "accuracy_last_epochs": sum(accuracies[-LAST:]) / len(accuracies[-LAST:]),
            "train_loss": brief(history[-1].loss),
            "ascents": ascents,
            "steps": steps,
            "gradients_per_step": cost,
            "images_per_second": median,
            # Mean instead of median: what ascends more at times is slower then.
            "ais": images * len(warm) / sum(warm) if warm else None,
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "history": {
                name: [brief(getattr(epoch, name)) for epoch in history]
                for name in Epoch._fields
            },
        }


def settings(trainer: Trainer, seed: int) -> dict[str, Any]:
    """All that decides what a training does, apart from the machine."""
    return {
        "method": trainer.method,
        "seed": seed,
        "hyperparameters": trainer.values,
        **dataclasses.asdict(trainer.recipe),
    }
