"""One method in one form: its programs, and blocks of its steps, timed."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_sam
from benchmarks.steps import cost_methods
from benchmarks.steps.cost_methods import METHODS, NUM_BATCHES
from benchmarks.steps.cost_models import Subject


def compiled(function: Callable[..., Any], *args: Any, **jit_options: Any) -> Any:
    """A compiled program, and the seconds to trace and compile it."""
    start = time.perf_counter()
    # A new function each time, because JAX caches the trace of a known one.
    fresh = jax.jit(lambda *args: function(*args), **jit_options)
    program = fresh.lower(*args).compile()
    return program, time.perf_counter() - start


AS_IT_IS = "glibc"


def allocator() -> str:
    """The allocator of the memory, with its settings in the environment."""
    given = (f"{x}={y}" for x, y in sorted(os.environ.items()) if "MALLOC" in x)
    return " ".join((AS_IT_IS, *given))


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class Row:
    """One method in one form, training one model: a block of steps at a time."""

    def __init__(
        self, name: str, form: str, model: Subject, start: Any, batches: list[Any]
    ) -> None:
        self.name, self.form, self.model = name, form, model
        self.method, self.cost = METHODS[name], cost_methods.cost(name)
        base = optax.sgd(0.01, momentum=0.9)
        tx = self.method.build(base, model)
        self.step = cost_methods.train_step(name, model, tx)
        self.params = jax.tree.map(jnp.copy, start)
        self.opt_state = tx.init(self.params)
        self.state_bytes = size(self.opt_state)
        self.batches = batches
        self.forced = {"ascended": True, "skipped": False}.get(form)
        self.seconds: list[float] = []  # of each compilation ...
        self.baseline: list[float] = []  # ... and of SGD's just before
        self.programs: list[Any] = []
        self.call: Callable[..., Any] = self.step
        self.count = 0
        self.measured: list[dict[str, float]] = []

    def compile(self) -> None:
        """Compiles all programs of the row; a dispatched row has two."""
        pair = (True, False) if self.form == "dispatched" else (self.forced,)
        made = [
            compiled(
                functools.partial(self.step, ascend=ascend),
                *(self.params, self.opt_state, *self.batches[:2]),
                donate_argnums=(0, 1),
            )
            for ascend in pair
        ]
        self.programs = [program for program, _ in made]
        self.seconds.append(sum(seconds for _, seconds in made))

    @functools.cached_property
    def counted(self) -> list[Any]:
        """The programs in which the compiler counts each operation."""
        if self.method.written_out is None:
            return self.programs
        tx = self.method.written_out(optax.sgd(0.01, momentum=0.9), self.model)
        step = cost_methods.train_step(self.name, self.model, tx)
        arguments = self.params, self.opt_state, *self.batches[:2]
        return [compiled(step, *arguments)[0]]

    def warm(self) -> None:
        """Runs past the warm-up of sampled methods, and compiles both programs."""
        self.call = self.programs[0]
        if self.form == "dispatched":
            self.call = optax_sam.dispatch(self.step, donate_argnums=(0, 1))
        sampled = self.form in cost_methods.MIXED and self.name.startswith("vsam")
        self.run(30 if sampled else 6 if self.form in cost_methods.MIXED else 2)
        jax.block_until_ready(self.params)

    def run(self, steps: int) -> None:
        """Enqueues some steps."""
        for _ in range(steps):
            for _ in range(self.method.calls):
                self.params, self.opt_state = self.call(
                    self.params,
                    self.opt_state,
                    self.batches[self.count % NUM_BATCHES],
                    self.batches[(self.count - 1) % NUM_BATCHES],
                )
            self.count += 1

    def ascents(self) -> float:
        """Perturbed gradients so far, to compute the share in a block."""
        if self.form in cost_methods.MIXED:
            return float(optax_sam.metrics(self.opt_state)["ascents"])
        return 0.0 if self.form == "skipped" else float(self.count)

    def block(self) -> tuple[float, float]:
        """Seconds per step and ascents per step of one block."""
        steps, before = self.model.steps, self.ascents()
        jax.block_until_ready(self.params)
        start = time.perf_counter()
        self.run(steps)
        jax.block_until_ready(self.params)
        seconds = (time.perf_counter() - start) / steps
        return seconds, (self.ascents() - before) / steps


def timer(function: Callable[..., Any], steps: int, params: Any, batches: Any) -> Any:
    """A function that times a block of a program without a state."""
    program, _ = compiled(function, params, batches[0])

    def block() -> float:
        start, result = time.perf_counter(), None
        for i in range(steps):
            result = program(params, batches[i % NUM_BATCHES])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / steps

    block()
    return block
