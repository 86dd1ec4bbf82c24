"""Digits with 40 % of the training labels replaced: SGD learns them by heart.

A small network is trained on scikit-learn's digits by SGD, SAM, SAM-5, ASAM and vSAM,
and tested on clean labels. Prints a table and draws learning curves, in one to two
minutes on two cores. Needs flax, scikit-learn, matplotlib and rich too.

    python examples/digits_label_noise.py
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam

model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])


def make_epoch(tx: optax.GradientTransformationExtraArgs) -> Any:
    """Compiles the training step, and a scan over an epoch's batches around it."""

    def train_step(state: Any, batch: Any) -> tuple[Any, None]:
        params, opt_state = state
        images, labels = batch

        def loss_fn(params: Any) -> jax.Array:
            logits = model.apply(params, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        grad_fn = jax.grad(loss_fn)
        grads = grad_fn(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(state: Any, batches: Any) -> Any:
        return jax.lax.scan(train_step, state, batches)[0]

    return jax.jit(epoch, donate_argnums=0)


BATCH_SIZE = 64
NOISE = 0.4  # share of the training labels drawn anew, uniformly from all ten
WINDOW = 30  # vSAM decides every 30 steps how many of the next 30 ascend

# What stands before weight decay and SGD. Radii from small grids, judged on a part of
# the training set; methods that do not ascend on every step want larger ones.
METHODS = {
    "SGD": optax.identity(),
    "SAM": optax_sam.sam(rho=0.5),
    "SAM-5": optax_sam.sam(rho=1.3, when=optax_sam.when.every_k(5)),
    "ASAM": optax_sam.asam(rho=2.5),
    "vSAM": optax_sam.vsam(rho=0.7, window=WINDOW),
}
PALETTE = "#666666", "#0072B2", "#E69F00", "#009E73", "#D55E00"  # Okabe and Ito's
COLORS = dict(zip(METHODS, PALETTE, strict=True))


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


def train(num_seeds: int, num_epochs: int, progress: Progress) -> dict[str, Any]:
    """Trains all methods, in turns of one epoch so that their times compare.

    Args:
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
    schedule = optax.cosine_decay_schedule(0.05, num_epochs * steps)

    def optimizer(member: optax.GradientTransformation) -> Any:
        sgd = optax.sgd(schedule, momentum=0.9)
        tx = optax.chain(member, optax.add_decayed_weights(5e-4), sgd)
        return optax.with_extra_args_support(tx)  # SGD alone takes no grad_fn

    def start(name: str, seed: int) -> tuple[Any, optax.OptState]:
        params = model.init(jax.random.key(seed), images[:1])
        return params, optimizers[name].init(params)

    def shuffled(labels: np.ndarray, rng: np.random.Generator) -> Any:
        order = rng.permutation(len(labels))[: steps * BATCH_SIZE].reshape(steps, -1)
        return jnp.asarray(images[order]), jnp.asarray(labels[order])

    optimizers = {name: optimizer(member) for name, member in METHODS.items()}
    epochs = {name: make_epoch(tx) for name, tx in optimizers.items()}
    progress.add_task("", total=num_seeds * num_epochs * len(METHODS), rate=0.0)
    task = progress.tasks[-1]
    for name, epoch in epochs.items():
        progress.update(task.id, description=f"Compiling {name}")
        epoch(start(name, 0), shuffled(clean_labels, np.random.default_rng(0)))
    progress.reset(task.id)

    shape = num_seeds, num_epochs
    measured: Any = defaultdict(lambda: defaultdict(lambda: np.zeros(shape)))
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        labels = corrupt(clean_labels, rng)
        states = {name: start(name, seed) for name in METHODS}
        progress.update(task.id, description=f"Seed {seed + 1} of {num_seeds}")
        for i in range(num_epochs):
            batches = shuffled(labels, rng)
            for name, epoch in epochs.items():
                began = time.perf_counter()
                states[name] = jax.block_until_ready(epoch(states[name], batches))
                seconds = time.perf_counter() - began
                params, opt_state = states[name]
                percent = accuracy(params, test_images, test_labels)
                row = {"seconds": seconds, "accuracy": percent, "ascent_rate": 0.0}
                if name != "SGD":  # there are no ascents to read
                    row |= optax_sam.metrics(opt_state)
                for quantity, value in row.items():
                    measured[name][quantity][seed, i] = value
                progress.update(task.id, advance=1, rate=task.completed / task.elapsed)
    return measured


def results_table(measured: dict[str, Any]) -> Table:
    """One line per method; accuracies are those of the last epoch."""
    seeds, epochs = measured["SGD"]["accuracy"].shape
    table = Table(
        "Method",
        title="Digits, 40 % of the training labels replaced",
        caption=f"Clean test labels, epoch {epochs}, mean ± standard deviation (seeds:"
        f" {seeds}). On so small a network the times show all bookkeeping.",
    )
    for header in ("Test accuracy (%)", "Gradients per step", "Time (SGD = 1)"):
        table.add_column(header, justify="right")
    # All of training, each epoch by its median over the seeds.
    total = {k: np.median(v["seconds"], axis=0).sum() for k, v in measured.items()}
    for name, values in measured.items():
        last = values["accuracy"][:, -1]
        spread = f" ± {last.std(ddof=1):.1f}" if seeds > 1 else ""
        gradients = 1 + values["ascent_rate"][:, -1].mean()
        cells = f"{last.mean():.1f}{spread}", f"{gradients:.2f}"
        table.add_row(name, *cells, f"{total[name] / total['SGD']:.2f}")
    return table


def conclusion(measured: dict[str, Any]) -> str:
    """What the reader should see."""
    sgd, sam, vsam = (measured[k]["accuracy"].mean(0) for k in ("SGD", "SAM", "vSAM"))
    if len(sgd) < 50:
        return "Too short a run to see a difference: wrong labels are learnt late."
    cost = 1 + measured["vSAM"]["ascent_rate"][:, -1].mean()
    return (
        f"SGD reaches {sgd.max():.0f} % and falls to {sgd[-1]:.0f} % as it learns the"
        f" wrong labels by heart; SAM ends at {sam[-1]:.1f} % for two gradients per"
        f" step. vSAM ends at {vsam[-1]:.1f} % for {cost:.2f}: it chooses how often to"
        " take the second gradient, and reuses it in between."
    )


def draw(measured: dict[str, Any], path: Path) -> None:
    """Learning curves, and how vSAM chose its rate."""
    figure = Figure(figsize=(8, 4), dpi=200, layout="constrained")
    axes = figure.subplot_mosaic("AAB;AAC")

    def curve(panel: str, name: str, values: np.ndarray, **settings: Any) -> None:
        epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * mean
        ax, low, high = axes[panel], mean - spread, mean + spread
        ax.plot(epochs, mean, label=name, color=COLORS[name], linewidth=1.6)
        ax.fill_between(epochs, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
        ax.set(xlabel="Epoch", xlim=(0, len(mean)), **settings)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)

    for name, values in measured.items():
        curve("A", name, values["accuracy"], ylim=(68, 100))
    axes["A"].set_title("Trained with 40 % of the labels replaced (mean ± sd)")
    axes["A"].set_ylabel("Test accuracy, clean labels (%)")
    handles = axes["A"].get_lines()
    figure.legend(handles=handles, frameon=False, ncols=5, loc="outside lower center")
    vsam = measured["vSAM"]
    # While it warms up, every step is sampled and the rate is not used.
    sampling = np.where(vsam["ascent_rate"] < 1, vsam["samples_per_window"], np.nan)
    curve("B", "vSAM", 100 * sampling / WINDOW, ylabel="Steps (%)", ylim=(0, None))
    axes["B"].set_title("vSAM's sampling rate")
    curve("C", "vSAM", vsam["psf_norm"], ylabel="Nats per weight", ylim=(0, None))
    axes["C"].set_title("vSAM's PSF norm")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Trains, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
        measured = train(args.seeds, args.epochs, progress)
    draw(measured, args.out)
    console.print(results_table(measured))
    console.print(conclusion(measured))
    console.print(f"Figure: {args.out}")


if __name__ == "__main__":
    main()
