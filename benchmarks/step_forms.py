"""What each form of a step costs on this machine, as a ratio to plain SGD.

The same method can run as one program with a conditional (``ascend=None``), or as two
straight-line programs chosen on the host (``optax_sam.dispatch``). Each row is timed
in blocks of steps, interleaved in one process with blocks of plain SGD; the ratio to
the neighbouring SGD block is taken per round and its median reported. "Ideal" is
``1 + ascents per step``: the gradients that the method needs, in units of SGD steps.

    python benchmarks/step_forms.py [--rounds 9] [--out benchmarks/results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_sam
from optax_sam import when


class MLP(nn.Module):
    """Three hidden layers of 512, 1.3 million parameters on 32x32x3 inputs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, (batch, 10)."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(3):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Three convolutions of 32, 64 and 64 channels, the last two with stride 2."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, (batch, 10)."""
        for features, stride in ((32, 1), (64, 2), (64, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.mean((1, 2)))


MODELS: dict[str, tuple[nn.Module, int]] = {"MLP": (MLP(), 128), "CNN": (CNN(), 16)}
STEPS_PER_BLOCK = 40  # two windows of the vSAM below
NUM_BATCHES = 8


def methods() -> dict[str, tuple[optax.GradientTransformation | None, bool]]:
    """Name to method (None: plain SGD) and whether it runs through dispatch."""
    # Sensitive, so that it soon samples at its cap, a rate as in the published runs.
    vsam = optax_sam.vsam(
        0.05, window=20, num_slices=4, sensitivity=3.0, warmup_steps=40, max_rate=0.4
    )
    sam_5 = optax_sam.sam(0.05, when=when.every_k(5))
    return {
        "SGD": (None, False),
        "SAM": (optax_sam.sam(0.05), False),
        "SAM-5, conditional": (sam_5, False),
        "SAM-5, dispatch": (sam_5, True),
        "vSAM, conditional": (vsam, False),
        "vSAM, dispatch": (vsam, True),
    }


class Run:
    """One method training one model: a block of steps at a time."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[tuple[jax.Array, jax.Array]],
        method: optax.GradientTransformation | None,
        dispatched: bool,
    ) -> None:
        """Makes the state; nothing is compiled yet."""
        sgd = optax.sgd(0.01, momentum=0.9)
        tx = sgd if method is None else optax.chain(method, sgd)
        tx = optax.with_extra_args_support(tx)
        self.batches = batches
        self.params = model.init(jax.random.key(0), batches[0][0])
        self.opt_state = tx.init(self.params)
        self.has_method = method is not None

        def train_step(
            params: Any, opt_state: Any, batch: Any, ascend: bool | None = None
        ) -> Any:
            x, y = batch

            def loss_fn(p: Any) -> jax.Array:
                logits = model.apply(p, x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

            grad_fn = jax.grad(loss_fn)
            updates, opt_state = tx.update(
                grad_fn(params), opt_state, params, grad_fn=grad_fn, ascend=ascend
            )
            return optax.apply_updates(params, updates), opt_state

        compiler: Callable[..., Any] = optax_sam.dispatch if dispatched else jax.jit
        self.step = compiler(train_step, donate_argnums=(0, 1))

    def ascents(self) -> int:
        """Second gradients so far."""
        if not self.has_method:
            return 0
        return int(optax_sam.metrics(self.opt_state)["ascents"])

    def block(self) -> tuple[float, float]:
        """Seconds per step and ascents per step of one block."""
        jax.block_until_ready(self.params)
        before, start = self.ascents(), time.perf_counter()
        for i in range(STEPS_PER_BLOCK):
            self.params, self.opt_state = self.step(
                self.params, self.opt_state, self.batches[i % NUM_BATCHES]
            )
        jax.block_until_ready(self.params)
        seconds = (time.perf_counter() - start) / STEPS_PER_BLOCK
        return seconds, (self.ascents() - before) / STEPS_PER_BLOCK


def measure(name: str, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Rows of one model, each method interleaved with SGD."""
    model, batch_size = MODELS[name]
    batches = [
        (
            jax.random.normal(key, (batch_size, 32, 32, 3)),
            jax.random.randint(key, (batch_size,), 0, 10),
        )
        for key in jax.random.split(jax.random.key(1), NUM_BATCHES)
    ]
    runs = {
        label: Run(model, batches, method, dispatched)
        for label, (method, dispatched) in methods().items()
    }
    task = progress.add_task(name, total=len(runs) * (rounds + 3))
    rows = []
    for label, run in runs.items():
        sgd = runs["SGD"]
        for _ in range(3):  # compile both variants, and pass the warm-up
            run.block()
            before, _ = sgd.block()
            progress.advance(task)
        ratios, rates, sgd_times = [], [], []
        for _ in range(rounds):
            seconds, rate = run.block()
            after, _ = sgd.block()
            sgd_times.append((before + after) / 2)
            ratios.append(seconds / sgd_times[-1])
            rates.append(rate)
            before = after
            progress.advance(task)
        ideal = 1 + statistics.mean(rates)
        overhead = statistics.median(
            ratio / (1 + rate) for ratio, rate in zip(ratios, rates, strict=True)
        )
        rows.append(
            {
                "model": name,
                "method": label,
                "ms_per_sgd_step": round(1e3 * statistics.median(sgd_times), 2),
                "ratio_to_sgd": round(statistics.median(ratios), 3),
                "ideal": round(ideal, 3),
                "ratio_to_ideal": round(overhead, 3),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the README."""
    lines = [
        "| model | method | time / SGD | ideal | time / ideal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        numbers = (row[k] for k in ("ratio_to_sgd", "ideal", "ratio_to_ideal"))
        cells = row["model"], row["method"], *(f"{x:.2f}" for x in numbers)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--report", help="JSON file to print as Markdown, and stop")
    options = parser.parse_args()
    if options.report:
        with open(options.report) as file:
            print(markdown(json.load(file)["rows"]))
        return
    console = Console()
    with Progress(console=console) as progress:
        rows = [
            row
            for name in options.models
            for row in measure(name, options.rounds, progress)
        ]
    table = Table("model", "method", "time / SGD", "ideal", "time / ideal")
    for row in rows:
        table.add_row(
            row["model"],
            row["method"],
            *(f"{row[k]:.2f}" for k in ("ratio_to_sgd", "ideal", "ratio_to_ideal")),
        )
    console.print(table)
    device = jax.devices()[0]
    print(f"JAX {jax.__version__}, {device.platform}, {platform.machine()}")
    if options.out:
        settings = {
            "jax": jax.__version__,
            "optax": optax.__version__,
            "python": platform.python_version(),
            "device": device.device_kind,
            "rounds": options.rounds,
            "steps_per_block": STEPS_PER_BLOCK,
            "parameters": {
                name: sum(
                    x.size
                    for x in jax.tree.leaves(
                        model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
                    )
                )
                for name, (model, _) in MODELS.items()
            },
        }
        with open(options.out, "w") as file:
            json.dump({"settings": settings, "rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
