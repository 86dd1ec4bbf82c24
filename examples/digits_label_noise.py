"""Digits with 40 % of the training labels replaced: SGD learns them by heart.

A small network is trained on scikit-learn's digits by SGD, SAM, SAM-5, ASAM and vSAM,
or by the methods of your choice, and tested on clean labels. Prints a table and draws
learning curves, in one to two minutes on two cores; all of them take two. Needs flax,
scikit-learn, matplotlib and rich too.

    python examples/digits_label_noise.py [--methods LookSAM,MSAM | --methods all]
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits_figure import average, draw
from jax.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam

model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])

BATCH_SIZE = 64
NOISE = 0.4  # share of the training labels drawn anew, uniformly from all ten
WINDOW = 30  # vSAM decides every 30 steps how many of the next 30 ascend
DEFAULT = "SGD,SAM,SAM-5,ASAM,vSAM"


class Batch(NamedTuple):
    """Some examples, or an epoch of batches, with their places in the data set."""

    images: jax.Array
    labels: jax.Array
    indices: jax.Array


class Method(NamedTuple):
    """An optimizer and what the training needs to know about it.

    Attributes:
      optimizer: with all that is its own.
      base_cost: gradients per step without the ascents.
      ascent_cost: gradients that an ascent adds.
      first: the examples of a batch that the first gradient is taken of.
      penalty: term of the loss, from the optimizer's state, the batch and its logits.
      eval_params: the parameters to test, from the optimizer's state and those trained.
    """

    optimizer: optax.GradientTransformation
    base_cost: float = 1.0
    ascent_cost: float = 0.0
    first: Callable[[Batch], Batch] = lambda batch: batch
    penalty: Callable[[Any, Batch, jax.Array], ArrayLike] = lambda *_: 0.0
    eval_params: Callable[[Any, Any], Any] = lambda opt_state, params: params


def saf_penalty(opt_state: Any, batch: Batch, logits: jax.Array) -> jax.Array:
    """Holds the logits near those of three epochs ago."""
    past, known = optax_sam.saf_past_logits(opt_state, batch.indices)
    return optax_sam.trajectory_loss(logits, past, coefficient=20.0, where=known)


def mesa_penalty(opt_state: Any, batch: Batch, logits: jax.Array) -> jax.Array:
    """Holds the logits near those at the averaged weights."""
    past = model.apply(optax_sam.mesa_params(opt_state), batch.images)
    return optax_sam.trajectory_loss(logits, past, coefficient=10.0)


def all_methods(steps: int, examples: int) -> dict[str, Method]:
    """The methods by name, for a run of some steps on a data set of some examples.

    Radii and coefficients are from small grids, judged on a part of the training set,
    see docs/demo.md. Methods that do not ascend on every step want larger radii.
    """
    lr = optax.cosine_decay_schedule(0.05, steps)
    decay, sgd = optax.add_decayed_weights(5e-4), optax.sgd(lr, momentum=0.9)
    falling = lambda start, end: optax.linear_schedule(start, end, steps)
    growing = optax.cosine_decay_schedule(5e-4, steps, alpha=5.0)
    rho_gsam = optax_sam.rho_from_lr(lr, rho_min=0.14, rho_max=0.7)
    every_5, half = optax_sam.when.every_k(5), optax_sam.when.bernoulli(0.5)
    wsam = optax_sam.wsam(optax.chain(decay, sgd), learning_rate=lr, rho=0.7, gamma=0.9)

    def ascending(member: Any, ascent_cost: float = 1.0) -> Method:
        return Method(optax.chain(member, decay, sgd), ascent_cost=ascent_cost)

    def on_part(divisor: int, rho: float) -> Method:
        first = lambda batch: optax_sam.ascent_batch(batch, divisor)
        return ascending(optax_sam.sam(rho))._replace(
            first=first, base_cost=1 / divisor
        )

    return {
        "SGD": Method(optax.chain(decay, sgd)),
        "SAM": ascending(optax_sam.sam(rho=0.5)),
        "SAM-5": ascending(optax_sam.sam(rho=1.3, when=every_5)),
        "RST": ascending(optax_sam.sam(rho=1.0, when=half)),
        "SAM 1/4": on_part(4, rho=1.0),
        "SAM 1/16": on_part(16, rho=1.0),
        "ASAM": ascending(optax_sam.asam(rho=2.5)),
        "GSAM": ascending(optax_sam.gsam(rho_gsam, alpha=0.01)),
        "LookSAM": ascending(optax_sam.looksam(rho=0.5, alpha=0.7)),
        "Look-LayerSAM": ascending(optax_sam.look_layer_sam(rho=0.03, alpha=0.5)),
        # A forward pass to choose half of the examples, less one.
        "ESAM": ascending(optax_sam.esam(rho=0.3), ascent_cost=1 / 3 + 31 / BATCH_SIZE),
        "AE-SAM": ascending(optax_sam.ae_sam(rho=1.0, threshold=falling(1.0, -1.0))),
        "AE-LookSAM": ascending(
            optax_sam.ae_looksam(rho=0.5, threshold=falling(2.0, 0.0), alpha=0.5)
        ),
        "vSAM": ascending(optax_sam.vsam(rho=0.7, window=WINDOW)),
        "vSAM-A": ascending(optax_sam.vsam(rho=1.3, window=WINDOW, reuse_decay=0.0)),
        "R-SAM": ascending(optax_sam.random_sam(rho=0.7, sigma=growing)),
        "RSAM": ascending(optax_sam.renyi_sam(rho=1.5, max_offset_norm=0.7)),
        "GNP": ascending(optax_sam.gnp(rho=0.7, alpha=0.8)),
        "G-RST": ascending(optax_sam.gnp(rho=0.5, alpha=2.0, when=half)),
        "F-SAM": ascending(optax_sam.friendly_sam(rho=0.7, decay=0.9)),
        "WSAM": Method(wsam, ascent_cost=1.0),
        "Fisher SAM": ascending(optax_sam.fisher_sam(rho=0.5)),
        "AMP": ascending(optax_sam.amp(epsilon=0.5)),
        "GAM": ascending(optax_sam.gam(0.5, norm_rho=0.1), ascent_cost=3.0),
        "StableSAM": ascending(optax_sam.stable_sam(rho=0.5)),
        "SAMPa": Method(
            optax_sam.sampa(optax.chain(decay, sgd), rho=0.7, interpolation=0.2),
            base_cost=2.0,
        ),
        "MSAM": Method(
            optax.chain(decay, optax_sam.msam(sgd, rho=2.0)),
            eval_params=optax_sam.msam_eval_params,
        ),
        "SAF": Method(
            optax.chain(optax_sam.saf(examples, 10, delay=3, start=5), decay, sgd),
            penalty=saf_penalty,
        ),
        "MESA": Method(
            optax.chain(decay, sgd, optax_sam.mesa(decay=0.995)),
            base_cost=1 + 1 / 3,
            penalty=mesa_penalty,
        ),
    }


def make_epoch(method: Method) -> Any:
    """Compiles the training step, and a scan over an epoch's batches around it."""
    tx = optax.with_extra_args_support(method.optimizer)  # SGD alone takes none

    def train_step(state: Any, batch: Batch) -> tuple[Any, None]:
        params, opt_state, previous = state

        def forward(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            logits = model.apply(params, batch.images)
            labels = batch.labels
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses, logits

        def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            losses, logits = forward(params, batch)
            return losses.mean() + method.penalty(opt_state, batch, logits), logits

        def per_example_loss_fn(params: Any, indices: Any = None) -> jax.Array:
            chosen = (
                batch if indices is None else jax.tree.map(lambda x: x[indices], batch)
            )
            return forward(params, chosen)[0]

        gradient = jax.grad(loss_fn, has_aux=True)
        grads, logits = gradient(params, method.first(batch))
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


@jax.jit
def accuracy(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of right answers, in percent."""
    return 100 * jnp.mean(model.apply(params, images).argmax(-1) == labels)


def corrupt(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replaces a share of the labels by random ones."""
    chosen = rng.permutation(len(labels))[: round(NOISE * len(labels))]
    labels = labels.copy()
    labels[chosen] = rng.integers(0, 10, len(chosen))
    return labels


def train(
    names: list[str], num_seeds: int, num_epochs: int, progress: Progress
) -> dict[str, Any]:
    """Trains the methods, in turns of one epoch so that their times compare.

    Args:
      names: which methods.
      num_seeds: number of runs; a seed sets the weights, the noise and the batches.
      num_epochs: epochs of each run.
      progress: where to report.

    Returns:
      What was measured, by method and name: after each epoch, (num_seeds, num_epochs).
    """
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    images, test_images, clean_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
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
        labels = corrupt(clean_labels, rng)
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
                percent = accuracy(params, test_images, test_labels)
                row = {"seconds": seconds, "accuracy": percent, "ascent_rate": 0.0}
                if method.ascent_cost:  # else there are no ascents to read
                    row |= optax_sam.metrics(opt_state)
                ascents = method.ascent_cost * row["ascent_rate"]
                row["gradients"] = method.base_cost + ascents
                for quantity, value in row.items():
                    measured[name][quantity][seed, i] = value
                progress.update(task.id, advance=1, rate=task.completed / task.elapsed)
            batches = shuffled(labels, rng)
    return measured


def results_table(measured: dict[str, Any]) -> Table:
    """One line per method; accuracies are those of the last epoch."""
    seeds, epochs = measured["SGD"]["accuracy"].shape
    table = Table(
        "Method",
        title="Digits, 40 % of the training labels replaced",
        caption=f"Clean test labels, epoch {epochs}, mean ± standard deviation (seeds:"
        f" {seeds}). A forward pass alone counts as a third of a gradient. On so small"
        " a network the times show all bookkeeping.",
    )
    for header in ("Test accuracy (%)", "Gradients per step", "Time (SGD = 1)"):
        table.add_column(header, justify="right")
    # All of training, each epoch by its median over the seeds.
    total = {k: np.median(v["seconds"], axis=0).sum() for k, v in measured.items()}
    for name, values in measured.items():
        mean, sd = average(values["accuracy"][:, -1])
        spread = f" ± {sd:.1f}" if seeds > 1 else ""
        cells = f"{mean:.1f}{spread}", f"{values['gradients'][:, -1].mean():.2f}"
        table.add_row(name, *cells, f"{total[name] / total['SGD']:.2f}")
    return table


def conclusion(measured: dict[str, Any]) -> str:
    """What the reader should see."""
    sgd = measured["SGD"]["accuracy"].mean(0)
    if len(sgd) < 50:
        return "Too short a run to see a difference: wrong labels are learnt late."
    text = (
        f"SGD reaches {sgd.max():.0f} % and falls to {sgd[-1]:.0f} % as it learns the"
        " wrong labels by heart."
    )
    notes = {
        "SAM": ".",
        "vSAM": ": it chooses how often to take the second, and reuses it in between.",
    }
    for name in [name for name in notes if name in measured]:
        end, cost = (measured[name][k][:, -1].mean() for k in ("accuracy", "gradients"))
        text += f" {name} ends at {end:.1f} % for {cost:.2f} gradients per step"
        text += notes[name]
    return text


def chosen(text: str) -> list[str]:
    """The names in a comma-separated list, and SGD, the reference for times."""
    known = {name.lower(): name for name in all_methods(1, 1)}
    wanted = {name.strip().lower() for name in text.split(",")}
    if unknown := sorted(wanted - known.keys() - {"all"}):
        raise argparse.ArgumentTypeError(
            f"no method {', '.join(unknown)}; choose all, or from"
            f" {', '.join(known.values())}"
        )
    wanted |= known.keys() if "all" in wanted else {"sgd"}
    return [name for key, name in known.items() if key in wanted]


def main() -> None:
    """Trains, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = f"names with commas between, or all; default {DEFAULT}"
    parser.add_argument("--methods", type=chosen, default=DEFAULT, help=which)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (3)")
    parser.add_argument("--epochs", type=int, default=100, help="of each run (100)")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    out = Path("out/digits_label_noise.png")
    parser.add_argument("--out", type=Path, default=out, help=f"figure ({out})")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.epochs = 1, 2
    if min(args.seeds, args.epochs) < 1:
        parser.error("--seeds and --epochs must be at least 1")

    console = Console()
    speed = TextColumn("{task.fields[rate]:.1f} epochs/s")
    columns = *Progress.get_default_columns(), speed
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        measured = train(args.methods, args.seeds, args.epochs, progress)
    draw(measured, WINDOW, args.out)
    console.print(results_table(measured))
    console.print(conclusion(measured))
    console.print(f"Figure: {args.out}")


if __name__ == "__main__":
    main()
