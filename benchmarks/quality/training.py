"""A training run of the protocol: the step of a row, the epochs, and the result."""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam
import optax_sam.linen
from benchmarks.lib import datasets, networks
from benchmarks.quality import rows
from benchmarks.quality.tasks import Source, Split

STATISTICS_BATCHES = 50  # batches to estimate BatchNorm's statistics again
CURVE = 20  # looks at the held-out images during a run of SGD's search
JUDGED = 1000  # examples at once
TEMPERATURE = 5.0  # of the term of SAF and MESA, as in their code


class OutOfTime(Exception):
    """The process must end; the state of the training run is saved."""


class State(NamedTuple):
    """Everything that a step changes.

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
    """The examples of a step: images, labels, places in the training set."""

    images: jax.Array
    labels: jax.Array
    rows: jax.Array


class Result(NamedTuple):
    """The result of a run.

    Attributes:
      accuracy: in percent after the last epoch, on the images that judge the run.
      loss: the mean loss of the training batches in the last epoch.
      gradients: all gradient evaluations of the run, in gradients of a batch.
      seconds: wall-clock time of the steps alone.
      cpu_seconds: processor time of the steps alone.
      sgd_cpu_seconds: processor time of a run of SGD in the same process, if tested.
      curve: accuracies after each twentieth of the epochs, if requested.
    """

    accuracy: float
    loss: float | None
    gradients: float
    seconds: float
    cpu_seconds: float
    sgd_cpu_seconds: float | None
    curve: list[float] | None


class Training:
    """A row of a task, compiled once for all settings and seeds.

    Args:
      source: the images.
      name: of the row.
    """

    def __init__(self, source: Source, name: str) -> None:
        """Compiles nothing yet."""
        self.source, self.task, self.name = source, source.task, name
        self.row = rows.ROWS[name]
        self.epochs = self.task.epochs * self.row.length
        network = networks.NETWORKS[self.task.network]
        self.model = network(classes=source.classes, dtype=jnp.dtype(self.task.dtype))
        on_cpu = jax.default_backend() == "cpu"
        # A CPU's convolutions are slow in loops and conditionals.
        self.looped = not (on_cpu and self.task.network in networks.CONVOLUTIONAL)
        self.warm: set[int] = set()  # numbers of images for which it is compiled
        self.begin = jax.jit(self._begin)
        self.estimate = jax.jit(self._estimate)
        self.right = jax.jit(self._right)

    def optimizer(self, values: Any, steps: int, examples: int, key: Any) -> Any:
        """The whole optimizer, for these values and this length."""
        task, rate = self.task, rows.cosine(values["rate"], steps)
        setting = rows.Setting(
            *(rate, steps, task.batch_size, examples),
            *(self.source.classes, key, not self.looped),
        )
        return rows.optimizer(self.row, values, setting)

    def _begin(self, values: Any, split: Split, key: Any) -> State:
        images = self.scaled(split.x[:1])
        variables = dict(self.model.init(jax.random.wrap_key_data(key), images, False))
        params = variables.pop("params")
        steps = len(split.y) // self.task.batch_size * self.epochs
        tx = self.optimizer(values, steps, len(split.y), key)
        return State(params, variables, tx.init(params), {}, jnp.zeros(()))

    @functools.cached_property
    def sgd(self) -> Training:
        """SGD on the same task, against which the row is timed."""
        return self if self.name == "SGD" else Training(self.source, "SGD")

    @functools.cached_property
    def advance(self) -> Callable[..., State]:
        """Takes an epoch's steps."""
        if self.looped:

            def whole(state: State, values: Any, split: Split, *now: Any) -> State:
                order, key, epoch = now
                body = lambda state, i: (
                    self.step(state, values, split, order[i], key, epoch, i),
                    None,
                )
                return jax.lax.scan(body, state, jnp.arange(len(order)))[0]

            return jax.jit(whole)
        jitted: Any = (optax_sam.dispatch if self.row.ascends else jax.jit)(self.step)

        def stepped(state: State, values: Any, split: Split, *now: Any) -> State:
            order, key, epoch = now
            for i, chosen in enumerate(order):
                state = jitted(state, values, split, chosen, key, epoch, np.int32(i))
            return state

        return stepped

    def scaled(self, images: jax.Array) -> jax.Array:
        """From 0 to 1."""
        largest = 16 if self.task.data == "digits" else 255
        return images.astype(jnp.float32) / largest

    def batch(self, split: Split, chosen: Any, key: Any) -> Batch:
        """The examples at these places, augmented."""
        images = datasets.augmented(key, split.x[chosen], self.task.augmentation)
        return Batch(self.scaled(images), split.y[chosen], chosen)

    def penalty(
        self, state: State, values: Any, logits: Any, batch: Batch, epoch: Any
    ) -> Any:
        """The term that SAF and MESA add to the loss."""
        if "coefficient" not in values:
            return 0.0
        given: Any = {"temperature": TEMPERATURE, "coefficient": values["coefficient"]}
        if self.name == "SAF":
            past, known = optax_sam.saf_past_logits(state.opt_state, batch.rows)
            return optax_sam.trajectory_loss(logits, past, where=known, **given)
        average = optax_sam.mesa_params(state.opt_state)
        variables = {"params": average, **state.averaged}
        past = self.model.apply(variables, batch.images, train=False)
        began = epoch > min(5, round(0.3 * self.epochs))
        given["coefficient"] = jnp.where(began, given["coefficient"], 0.0)
        return optax_sam.trajectory_loss(logits, past, **given)

    def step(
        self,
        state: State,
        values: Any,
        split: Split,
        chosen: Any,
        key: Any,
        epoch: Any,
        i: Any,
        ascend: bool | None = None,
    ) -> State:
        """One step: the same code for all rows, inside a scan and outside."""
        per_epoch = len(split.y) // self.task.batch_size
        step_key = jax.random.fold_in(jax.random.wrap_key_data(key), epoch)
        batch = self.batch(split, chosen, jax.random.fold_in(step_key, i))
        tx = self.optimizer(values, per_epoch * self.epochs, len(split.y), key)

        def forward(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
            variables = {"params": params, **state.model_state}
            logits, model_state = self.model.apply(
                variables, batch.images, train=True, mutable=list(state.model_state)
            )
            return networks.losses(logits, batch.labels), logits, model_state

        def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
            losses, logits, model_state = forward(params, batch)
            loss = losses.mean() + self.penalty(state, values, logits, batch, epoch)
            return loss, (losses, logits, model_state)

        def per_example_loss_fn(params: Any, indices: Any = None) -> jax.Array:
            some = batch
            if indices is not None:
                some = jax.tree.map(lambda x: x[indices], batch)
            return forward(params, some)[0]

        value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
        first = optax_sam.ascent_batch(batch, self.row.divisor)
        (_, aux), grads, grad_fn = value_and_grad(state.params, first)
        if self.row.divisor > 1:
            grad_fn = lambda params: jax.grad(loss_fn, has_aux=True)(params, batch)[0]
        losses, logits, model_state = aux
        extra: dict[str, Any] = {"logits": logits, "indices": batch.rows}
        extra |= {"grad_fn": grad_fn, "per_example_loss_fn": per_example_loss_fn}
        if self.name == "ESAM":
            extra["per_example_losses"] = losses
        if ascend is not None:
            extra["ascend"] = ascend
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        averaged = state.averaged
        if self.row.base == "mesa" and model_state:
            kept = rows.averaged(per_epoch * self.epochs)
            averaged = optax.incremental_update(model_state, averaged, 1 - kept)
        return State(
            optax.apply_updates(state.params, updates),
            dict(model_state),
            opt_state,
            averaged,
            state.loss + losses.mean(),
        )

    def order(self, seed: int, epoch: int, examples: int) -> np.ndarray:
        """The examples of each batch of an epoch, (steps, batch size)."""
        size = self.task.batch_size
        drawn = np.random.default_rng([seed, epoch]).permutation(examples)
        return drawn[: len(drawn) // size * size].reshape(-1, size).astype(np.int32)

    def _estimate(self, params: Any, model_state: Any, batch: Batch) -> Any:
        """BatchNorm's statistics after one more batch."""
        found = self.model.apply(
            {"params": params, **model_state},
            batch.images,
            train=True,
            mutable=list(model_state),
        )
        return dict(found[1])

    def estimated(self, params: Any, model_state: Any, split: Split, seed: int) -> Any:
        """BatchNorm's statistics at these parameters, from forward passes alone."""
        if not model_state:
            return model_state
        order = self.order(seed, self.epochs, len(split.y))
        for i in range(STATISTICS_BATCHES):
            key = jax.random.fold_in(jax.random.key(seed), i)
            batch = self.batch(split, order[i % len(order)], key)
            model_state = self.estimate(params, model_state, batch)
        return model_state

    def _right(self, params: Any, model_state: Any, images: Any, labels: Any) -> Any:
        variables = {"params": params, **model_state}
        logits = self.model.apply(variables, self.scaled(images), train=False)
        return jnp.sum(logits.argmax(-1) == labels)

    def judged(self, state: State, split: Split, seed: int) -> float:
        """The accuracy in percent.

        MSAM is judged at the unperturbed weights. BatchNorm's statistics are estimated
        again there, as the authors do after training.
        """
        params, model_state = state.params, state.model_state
        if self.row.base == "msam":
            params = optax_sam.msam_eval_params(state.opt_state, params)
            model_state = self.estimated(params, model_state, split, seed)
        total = len(split.judge_y)
        counts = [
            self.right(params, model_state, split.judge_x[part], split.judge_y[part])
            for part in (slice(i, i + JUDGED) for i in range(0, total, JUDGED))
        ]
        return 100 * sum(map(int, counts)) / total

    def epoch(
        self, state: State, traced: Any, split: Split, seed: int, epoch: int
    ) -> tuple[State, tuple[float, float]]:
        """The state after an epoch, and the epoch's wall-clock and processor time."""
        order = self.order(seed, epoch, len(split.y))
        begun = time.perf_counter(), time.process_time()
        state = state._replace(loss=jnp.zeros(()))
        now = order, rows.key(seed), np.int32(epoch)
        split = split._replace(judge_x=(), judge_y=())  # its shapes would differ
        state = jax.block_until_ready(self.advance(state, traced, split, *now))
        self.warm.add(len(split.y))
        return state, (time.perf_counter() - begun[0], time.process_time() - begun[1])

    def sgd_cpu_seconds(self, split: Split, seed: int) -> float:
        """The processor time of a run of SGD in this process, from one epoch."""
        start = rows.start(self.sgd.row, {})
        values = {name: jnp.float32(value) for name, value in start.items()}
        state = self.sgd.begin(values, split, rows.key(seed))
        for _ in range(1 + (len(split.y) not in self.sgd.warm)):
            state, took = self.sgd.epoch(state, values, split, seed, 0)
        return took[1] * self.task.epochs

    def run(
        self,
        values: dict[str, float],
        seed: int,
        *,
        tested: bool,
        stop: int | None = None,
        late: Callable[[], bool] = lambda: False,
        saved: Path | None = None,
    ) -> Result:
        """Trains, or continues a training run that ran out of time.

        Args:
          values: the values of the row.
          seed: for images, weights, batches, augmentation and the method's draws.
          tested: whether the test set judges, or the held-out images.
          stop: the last epoch, if the run ends before its schedule.
          late: called after each epoch; whether the process must end.
          saved: the file for an unfinished training run.

        Raises:
          OutOfTime: if the process must end.
        """
        split = self.source.split(seed, tested)
        key = rows.key(seed)
        traced = {name: jnp.float32(value) for name, value in values.items()}
        state, done, times, curve = self.begin(traced, split, key), 0, [], []
        if self.row.base == "mesa" and state.model_state:
            start = self.estimated(state.params, state.model_state, split, seed)
            state = state._replace(averaged=start)
        if saved and saved.exists():
            leaves, done, times, curve = pickle.loads(saved.read_bytes())
            structure = jax.tree.structure(state)
            state = jax.tree.unflatten(structure, map(jnp.asarray, leaves))
        watched = not tested and self.name == "SGD"
        for epoch in range(done, stop or self.epochs):
            # An epoch that compiles is not timed. Another epoch's time replaces it.
            cold = len(split.y) not in self.warm
            state, took = self.epoch(state, traced, split, seed, epoch)
            times.append(None if cold else took)
            if watched and (epoch + 1) % max(1, self.epochs // CURVE) == 0:
                curve.append(self.judged(state, split, seed))
            if saved and epoch + 1 < (stop or self.epochs) and late():
                saved.parent.mkdir(parents=True, exist_ok=True)
                leaves = jax.tree.leaves(jax.device_get(state))
                saved.write_bytes(pickle.dumps((leaves, epoch + 1, times, curve)))
                raise OutOfTime
        if saved:
            saved.unlink(missing_ok=True)
        warm = [pair for pair in times if pair] or [took]
        mean = lambda taken: sum(taken) / len(warm) * len(times)
        clock, processor = map(mean, zip(*warm, strict=True))
        sgd = processor if self is self.sgd else None
        if tested and not sgd:
            sgd = self.sgd_cpu_seconds(split, seed)
        per_epoch = len(split.y) // self.task.batch_size
        steps = per_epoch * len(times)
        loss = float(state.loss) / per_epoch
        return Result(
            round(self.judged(state, split, seed), 4),
            round(loss, 5) if np.isfinite(loss) else None,
            round(self.gradients(state, steps), 2),
            round(clock, 3),
            round(processor, 3),
            sgd and round(sgd, 3),
            [round(x, 4) for x in curve] or None,
        )

    def gradients(self, state: State, steps: int) -> float:
        """All gradient evaluations so far, in gradients of a batch."""
        fixed = dict.fromkeys({"rate", "decay", *self.row.start}, 0.1)
        tx = self.optimizer(fixed, steps, self.source.images, rows.key(0))
        price = rows.cost(self.row, tx, self.task.batch_size, self.name)
        share = 1.0
        if price.skipped is not None:
            share = int(optax_sam.metrics(state.opt_state)["ascents"]) / steps
        return float(price.mean(share)) * steps
