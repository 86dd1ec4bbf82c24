"""Which ascent reaches SAM's accuracy at the least cost: on which steps, of how much?

Quarter-batch SAM ascends along the gradient of a part of the batch, which costs
``1 + 1/4`` gradients per step instead of 2. Here the part is the whole batch, a half, a
quarter, an eighth or a sixteenth, on every step or on some (SAM-k, LookSAM, vSAM,
vSAM-A), against SGD and MSAM. The radius is tuned for each of these on clean examples
held out of the training set; then five fresh seeds are trained on all of it and tested.

Costs are counted, not timed. Each training is one program, with conditionals that
really skip, and as many run at once as there are cores: under ``vmap`` every step would
compute both branches.

    python benchmarks/studies/cheap_ascent.py [--data fashion_mnist_20k.npz] [--quick]
        [--sets digits fashion_fast fashion fashion_clean] [--out FILE] [--figure FILE]
    python benchmarks/studies/cheap_ascent.py --report [FILE] [--figure FILE]

Without ``--data`` only digits run. Fashion-MNIST runs at the digits' learning rate
(``fashion_fast``) and at the one that is best for SGD (``fashion``); with right labels
(``fashion_clean``) it runs where that is asked for. The file holds ``train_x``,
``train_y``, ``test_x`` and ``test_y``, uint8, images as (n, 28, 28).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from rich.progress import Progress
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).parents[2]))

import optax_sam
from benchmarks.lib import costs, datasets, networks, study
from benchmarks.lib.study import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from benchmarks.lib.tables import mean_and_error, signed, table, with_error
from optax_sam import when

SETS = "digits", "fashion_fast", "fashion", "fashion_clean"
TITLES = {
    "digits": "Digits, 40 % of the labels replaced",
    "fashion_fast": "Fashion-MNIST, 40 % replaced, learning rate 0.05",
    "fashion": "Fashion-MNIST, 40 % replaced, learning rate 0.01",
    "fashion_clean": "Fashion-MNIST, clean labels",
}
TUNING_SEEDS = 10, 11, 12
SEEDS = 0, 1, 2, 3, 4
# Steps of 10 ** 0.2. The search starts with three of them and goes on until both
# neighbours of the best have been tried.
RADII = 0.016, 0.025, 0.04, 0.063, 0.1, 0.16, 0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0, 6.3
FIRST_RADII = 0.16, 0.4, 1.0
RATES = 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5
FIRST_RATES = 0.02, 0.05, 0.1
WEIGHT_DECAY = 5e-4
WINDOW = 30  # of vSAM, as in the demo: both tasks have too few steps for its 50

model = networks.dense(256, 256)


class Variant(NamedTuple):
    """An optimizer of the study.

    Attributes:
      rule: the method's name.
      divisor: the ascent goes along the gradient of one example in so many.
      whole_difference: whether what is reused is nevertheless the difference to the
        whole batch's gradient. That costs a gradient more, and shows what the noise
        of the part does.
    """

    rule: str
    divisor: int = 1
    whole_difference: bool = False

    @property
    def part(self) -> Fraction:
        """The part of the batch that the ascent goes along."""
        return Fraction(1, self.divisor)


VARIANTS = [
    Variant("SGD"),
    Variant("MSAM"),
    *(Variant("SAM", divisor) for divisor in (1, 2, 4, 8, 16)),
    *(
        Variant(rule, divisor)
        for rule in ("SAM-2", "SAM-5", "LookSAM", "vSAM", "vSAM-A")
        for divisor in (1, 4, 16)
    ),
    *(Variant(rule, k, True) for rule in ("LookSAM", "vSAM") for k in (4, 16)),
]
# The same ascents, as far as the sampler sees the same.
WITHOUT_REUSE = {"LookSAM": "SAM-5", "vSAM": "vSAM-A"}
QUICK_VARIANTS = [
    Variant("SGD"),
    Variant("MSAM"),
    Variant("SAM"),
    Variant("SAM", 4),
    Variant("SAM-5", 4),
    Variant("vSAM-A", 4),
    Variant("vSAM", 4),
    Variant("vSAM", 4, True),
]


def along_part(rho: Any) -> optax.GradientTransformationExtraArgs:
    """SAM's ascent along another gradient than the incoming one."""
    l2 = optax_sam.ascent.l2(rho)

    def update(
        g: Any, state: Any, params: Any = None, *, part: Any, **extra: Any
    ) -> tuple[Any, Any]:
        return l2.update(part, state, params, **extra)

    return optax.GradientTransformationExtraArgs(l2.init, update)


def optimizer(
    variant: Variant, rho: Any, rate: optax.Schedule, seed: Any
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum, with the sharpness-aware member before or around it."""
    decay, sgd = optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(rate, momentum=0.9)
    key = jax.random.key(seed)  # what vSAM samples is another matter in each run
    whole = optax_sam.sharpness_aware
    methods: dict[tuple[str, bool], Callable[[], Any]] = {
        ("SAM", False): lambda: optax_sam.sam(rho),
        ("SAM-2", False): lambda: optax_sam.sam(rho, when=when.every_k(2)),
        ("SAM-5", False): lambda: optax_sam.sam(rho, when=when.every_k(5)),
        ("LookSAM", False): lambda: optax_sam.looksam(rho),
        ("vSAM", False): lambda: optax_sam.vsam(rho, window=WINDOW, key=key),
        ("vSAM-A", False): lambda: optax_sam.vsam(
            rho, window=WINDOW, reuse_decay=0.0, key=key
        ),
        ("LookSAM", True): lambda: whole(
            along_part(rho), when.every_k(5), optax_sam.blend.reuse_normal()
        ),
        ("vSAM", True): lambda: whole(
            along_part(rho),
            when.variance_controlled(window=WINDOW, key=key),
            optax_sam.blend.reuse_difference(),
        ),
    }
    if variant.rule == "SGD":
        return optax.with_extra_args_support(optax.chain(decay, sgd))
    if variant.rule == "MSAM":
        return optax.chain(decay, optax_sam.msam(sgd, rho=rho))
    method = methods[variant.rule, variant.whole_difference]
    return optax.chain(method(), decay, sgd)


def gradients(variant: Variant, batch_size: int) -> costs.Cost:
    """What a step costs."""
    tx = optimizer(variant._replace(whole_difference=False), 0.1, 0.1, 0)
    # The part of the batch, rounded up; the control takes the whole one as well.
    part = -(-batch_size // variant.divisor) / batch_size
    return costs.cost(tx, part + variant.whole_difference)


class Job(NamedTuple):
    """The examples of a run: its labels, and which ones make which batch.

    Attributes:
      images: (n, features), those of the whole training set.
      labels: (n,), some of them replaced.
      order: (steps or more, batch size), places in the training set.
      steps: how many of these are batches; the others only fill the shape, so that
        tuning and evaluation are one program.
      seed: of the weights.
    """

    images: jax.Array
    labels: jax.Array
    order: jax.Array
    steps: jax.Array
    seed: jax.Array


class Outcome(NamedTuple):
    """What a run leaves behind.

    Attributes:
      params: the parameters to test.
      ascents: number of steps that ascended.
      noise: sum over these of the length of the part's noise, relative to that of the
        difference that is reused; only where that is the whole batch's.
    """

    params: Any
    ascents: Any
    noise: Any


def train(variant: Variant, job: Job, learning_rate: Any, rho: Any) -> Outcome:
    """One whole training, to compile with the variant fixed."""
    rate = lambda count: learning_rate * (1 + jnp.cos(jnp.pi * count / job.steps)) / 2
    tx = optimizer(variant, rho, rate, job.seed)
    params = model.init(jax.random.key(job.seed), job.images[:1])
    opt_state = tx.init(params)
    has_ascents = variant.rule not in ("SGD", "MSAM")

    def gradient(params: Any, batch: tuple[jax.Array, jax.Array]) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            return networks.losses(model.apply(params, batch[0]), batch[1]).mean()

        return jax.grad(loss_fn)(params)

    def step(i: jax.Array, carry: Any) -> Any:
        params, opt_state, noise = carry
        chosen = job.order[i]
        batch = job.images[chosen], job.labels[chosen]
        of_part = lambda: gradient(
            params, optax_sam.ascent_batch(batch, variant.divisor)
        )
        of_batch = lambda: gradient(params, batch)
        ascends = has_ascents and optax_sam.ascends_next(opt_state)
        extra: Any = {"grad_fn": lambda params: gradient(params, batch)}
        if variant.whole_difference:
            grads, extra["part"] = of_batch(), of_part()
        elif variant.divisor == 1:
            grads = of_batch()
        elif ascends is True:
            grads = of_part()
        else:
            # Without an ascent the incoming gradient is what the step follows.
            grads = jax.lax.cond(ascends, of_part, of_batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        if variant.whole_difference and variant.rule == "vSAM":
            off = optax.tree.norm(optax.tree.sub(extra["part"], grads))
            reused = optax.tree.norm(opt_state[0].blend.psf)
            noise += jnp.where(ascends, off / reused, 0)
        return optax.apply_updates(params, updates), opt_state, noise

    start = params, opt_state, jnp.zeros(())
    params, opt_state, noise = jax.lax.fori_loop(0, job.steps, step, start)
    if variant.rule == "MSAM":
        params = optax_sam.msam_eval_params(opt_state, params)
    ascents = optax_sam.metrics(opt_state)["ascents"] if has_ascents else 0
    return Outcome(params, ascents, noise)


class Task(NamedTuple):
    """A data set and how long to train on it; images are flat, from 0 to 1.

    Attributes:
      images: (n, features), for training.
      labels: (n,), right ones.
      test_images: (m, features).
      test_labels: (m,).
      noise: share of the training labels that each run replaces.
      batch_size: examples of a step.
      epochs: of each run.
      learning_rate: where the cosine starts; ``None`` means to tune it on SGD.
    """

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    noise: float
    batch_size: int
    epochs: int
    learning_rate: float | None


def load(name: str, data: Path | None) -> Task:
    """The data set of that name."""
    if name == "digits":  # as in the demo
        images, labels, test_images, test_labels = datasets.digits()
        images, test_images = (datasets.flat(x, 16) for x in (images, test_images))
        return Task(images, labels, test_images, test_labels, 0.4, 64, 100, 0.05)
    assert data is not None
    images, labels, test_images, test_labels = datasets.npz(data)
    labels = labels.astype(np.int32)
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:400] for c in range(10)]
    )
    return Task(
        datasets.flat(images[rows], 255),
        labels[rows],
        datasets.flat(test_images, 255),
        test_labels.astype(np.int32),
        noise=0.0 if name == "fashion_clean" else 0.4,
        batch_size=128,
        epochs=40,
        # That of the digits, or the best one for SGD, which is so small that SGD stops
        # before it learns the wrong labels.
        learning_rate=0.05 if name == "fashion_fast" else None,
    )


class Study:
    """All runs on one data set."""

    def __init__(self, task: Task, progress: Progress, quick: bool) -> None:
        """Splits off what tunes the radii; nothing is trained yet."""
        if quick:
            task = task._replace(epochs=2)
        self.task, self.progress, self.quick = task, progress, quick
        everything = np.arange(len(task.labels))
        rows, held_out = train_test_split(
            everything, test_size=0.2, stratify=task.labels, random_state=1
        )
        self.seeds = SEEDS[:2] if quick else SEEDS
        self.tuning_seeds = TUNING_SEEDS[:1] if quick else TUNING_SEEDS
        images = jnp.asarray(task.images)
        self.jobs = {
            **{seed: self.job(images, everything, seed) for seed in self.seeds},
            **{seed: self.job(images, rows, seed) for seed in self.tuning_seeds},
        }
        self.test = jnp.asarray(task.test_images), jnp.asarray(task.test_labels)
        self.held_out = images[held_out], jnp.asarray(task.labels[held_out])
        self.learning_rate = task.learning_rate

    def job(self, images: jax.Array, rows: np.ndarray, seed: int) -> Job:
        """Replaces labels and draws batches, on these rows of the training set."""
        task, rng = self.task, np.random.default_rng(seed)
        labels, size = task.labels.copy(), task.batch_size
        count = round(task.noise * len(rows))
        labels[rows] = datasets.replaced(labels[rows], count, rng)
        per_epoch = len(rows) // size
        steps, room = per_epoch * task.epochs, len(labels) // size * task.epochs
        order = np.zeros((room, size), np.int32)
        order[:steps] = np.concatenate(
            [
                rows[rng.permutation(len(rows))[: per_epoch * size]].reshape(-1, size)
                for _ in range(task.epochs)
            ]
        )
        return Job(images, *map(jnp.asarray, (labels, order, steps, seed)))

    def run(
        self, program: Any, settings: list[tuple[int, float, float]], tuning: bool
    ) -> list[tuple[float, float, float]]:
        """Accuracy, ascents per step and noise of some runs, as many at once as fit.

        Args:
          program: a compiled :func:`train`.
          settings: seed, learning rate and radius of each run.
          tuning: whether to judge by what was held out, or by the test set.
        """

        def one(setting: tuple[int, float, float]) -> tuple[float, float, float]:
            seed, learning_rate, rho = setting
            job = self.jobs[seed]
            out = program(job, jnp.float32(learning_rate), jnp.float32(rho))
            judged = self.held_out if tuning else self.test
            percent = networks.accuracy(model, out.params, *judged)
            rate = float(out.ascents) / int(job.steps)
            self.progress.advance(self.progress.task_ids[-1])
            return float(percent), rate, float(out.noise) / max(float(out.ascents), 1)

        bar = self.progress.tasks[-1]
        self.progress.update(bar.id, total=(bar.total or 0) + len(settings))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(one, settings))

    def tune(
        self,
        program: Any,
        ladder: tuple[float, ...],
        first: tuple[float, ...],
        setting: Callable[[float], tuple[float, float]],
    ) -> tuple[float, dict[float, list[float]]]:
        """The best value, and the held-out accuracies of all that were tried."""
        found: dict[float, list[float]] = {}
        wanted = list(first[1:3] if self.quick else first)
        while wanted:
            settings = [(s, *setting(v)) for v in wanted for s in self.tuning_seeds]
            percents = [x[0] for x in self.run(program, settings, tuning=True)]
            for i, value in enumerate(wanted):
                n = len(self.tuning_seeds)
                found[value] = [round(x, 3) for x in percents[i * n : (i + 1) * n]]
            best = max(found, key=lambda value: np.mean(found[value]))
            place = ladder.index(best)
            beside = ladder[max(place - 1, 0) : place + 2]
            wanted = [] if self.quick else [v for v in beside if v not in found]
        return best, {value: found[value] for value in sorted(found)}

    def compiled(self, variant: Variant) -> Any:
        """The program of a variant, which serves all of its runs."""
        job, number = next(iter(self.jobs.values())), jnp.float32(0)
        program = jax.jit(train, static_argnums=0)
        return program.lower(variant, job, number, number).compile()

    def row(self, variant: Variant) -> dict[str, Any]:
        """Tunes and evaluates one variant."""
        program = self.compiled(variant)
        row: dict[str, Any] = {**variant._asdict(), "rho": None, "tuning": {}}
        if variant.rule == "SGD" and self.learning_rate is None:
            self.learning_rate, row["tuning_of_learning_rate"] = self.tune(
                program, RATES, FIRST_RATES, lambda rate: (rate, 0.0)
            )
        rate: Any = self.learning_rate
        if variant.rule != "SGD":
            row["rho"], row["tuning"] = self.tune(
                program, RADII, FIRST_RADII, lambda rho: (rate, rho)
            )
        settings = [(seed, rate, row["rho"] or 0.0) for seed in self.seeds]
        results = np.array(self.run(program, settings, tuning=False))
        row["accuracy"] = results[:, 0].round(3).tolist()
        row["ascents_per_step"] = results[:, 1].round(4).tolist()
        price = gradients(variant, self.task.batch_size).mean(results[:, 1].mean())
        row["gradients_per_step"] = round(price, 4)
        if results[:, 2].any():
            row["noise_of_the_difference"] = results[:, 2].round(3).tolist()
        return row

    def settings(self) -> dict[str, Any]:
        """What to know about the data set and its training."""
        task = self.task
        numbers = "noise", "batch_size", "epochs"
        return {
            "training_images": len(task.images),
            "held_out_for_tuning": len(self.held_out[1]),
            "test_images": len(task.test_images),
            **{name: getattr(task, name) for name in numbers},
            "learning_rate": self.learning_rate,
            "seeds": self.seeds,
            "tuning_seeds": self.tuning_seeds,
        }


def difference(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The mean difference between two rows' runs of one seed, and its error."""
    return mean_and_error(np.subtract(row["accuracy"], other["accuracy"]))


def markdown(results: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/results/cheap_ascents.md, by name."""
    tables = {}
    for name, rows in results["rows"].items():
        tables[name] = comparison(rows)
        tables[f"{name}, radii"] = radii(rows)
        if any(row["whole_difference"] for row in rows):
            tables[f"{name}, reuse"] = reuse(rows)
    return tables


def variant(row: dict[str, Any]) -> Variant:
    """The variant of a row."""
    return Variant(*(row[field] for field in Variant._fields))


def find(rows: list[dict[str, Any]], *wanted: Any) -> dict[str, Any]:
    """The row of a variant."""
    return next(row for row in rows if variant(row) == Variant(*wanted))


def radius(row: dict[str, Any]) -> str:
    """The radius, with a star if no larger or no smaller one was tried."""
    if row["rho"] is None:
        return ""
    tried = [float(value) for value in row["tuning"]]
    return f"{row['rho']:g}{'*' * (row['rho'] in (min(tried), max(tried)))}"


def comparison(rows: list[dict[str, Any]]) -> str:
    """All variants of the study but those that only show the noise."""
    sam, sgd = find(rows, "SAM"), find(rows, "SGD")
    header = ["rule", "ascent batch", "`rho`", "gradients per step"]
    header += ["test accuracy (%)", "minus SAM", "minus SGD"]
    lines = []
    for row in rows:
        if row["whole_difference"]:
            continue
        ascends = row["rule"] not in ("SGD", "MSAM")
        part = f"{variant(row).part}" if ascends else ""
        cells = [row["rule"], part, radius(row), f"{row['gradients_per_step']:.3f}"]
        cells.append(with_error(row["accuracy"]))
        for other in (sam, sgd):
            cells.append("" if row is other else signed(*difference(row, other)))
        lines.append(cells)
    return table(header, lines)


def radii(rows: list[dict[str, Any]]) -> str:
    """Held-out accuracies of SAM by radius and part of the batch."""
    family = [row for row in rows if row["rule"] == "SAM"]
    columns = sorted({float(rho) for row in family for rho in row["tuning"]})
    lines = []
    for row in family:
        means = {float(rho): np.mean(x) for rho, x in row["tuning"].items()}
        cells = [f"{means[rho]:.1f}" if rho in means else "" for rho in columns]
        lines.append([f"{variant(row).part}", *cells])
    return table(["ascent batch", *(f"{rho:g}" for rho in columns)], lines)


def reuse(rows: list[dict[str, Any]]) -> str:
    """What reuse gains, and what the part's noise does to it."""
    header = ["rule", "ascent batch", "ascents per step"]
    header += ["minus the same without reuse"]
    header += ["control's `rho`", "its ascents per step", "its test accuracy (%)"]
    header += ["minus control", "noise / difference"]
    lines = []
    for row in rows:
        if row["rule"] not in WITHOUT_REUSE or row["whole_difference"]:
            continue
        rate = lambda row: f"{np.mean(row['ascents_per_step']):.3f}"
        without = find(rows, WITHOUT_REUSE[row["rule"]], row["divisor"])
        cells = [row["rule"], f"{variant(row).part}", rate(row)]
        cells.append(signed(*difference(row, without)))
        if row["divisor"] == 1:
            cells += [""] * 5
        else:
            control = find(rows, row["rule"], row["divisor"], True)
            cells += [radius(control), rate(control), with_error(control["accuracy"])]
            cells.append(signed(*difference(row, control)))
            noise = control.get("noise_of_the_difference")
            cells.append(f"{np.mean(noise):.1f}" if noise else "")
        lines.append(cells)
    return table(header, lines)


COLOURS = {"SAM": BLUE, "SAM-2": SKY, "SAM-5": ORANGE, "LookSAM": GREEN}
COLOURS |= {"vSAM": RED, "vSAM-A": PINK}
# One for each part of the batch.
MARKERS = {1: "o", 2: "D", 4: "s", 8: "v", 16: "^"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy against cost, one panel per data set."""
    panels = len(results["rows"])
    figure = Figure(figsize=(4.2 * panels, 4.4), dpi=120, layout="constrained")
    for axes, (name, rows) in zip(
        figure.subplots(1, panels, squeeze=False)[0],
        results["rows"].items(),
        strict=True,
    ):
        axes.set_title(TITLES[name], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        shown = [row for row in rows if row["rule"] in COLOURS]
        shown = [row for row in shown if not row["whole_difference"]]
        for rule, colour in COLOURS.items():
            family = [row for row in shown if row["rule"] == rule]
            x = [row["gradients_per_step"] - 1 for row in family]
            means = [mean_and_error(row["accuracy"]) for row in family]
            style: Any = {"color": colour, "linewidth": 1.6 if rule == "SAM" else 0.6}
            axes.plot(x, [mean for mean, _ in means], **style)
            for cost, row, (mean, error) in zip(x, family, means, strict=True):
                marker: Any = {"marker": MARKERS[row["divisor"]], "markersize": 5}
                axes.errorbar(cost, mean, error, color=colour, elinewidth=0.8, **marker)
        low, high = axes.get_ylim()
        for rule, line in (("MSAM", "--"), ("SGD", ":")):
            mean, error = mean_and_error(find(rows, rule)["accuracy"])
            # One that is far off would press the others together.
            if mean > low - (high - low):
                axes.axhline(mean, color=GREY, linewidth=1, linestyle=line)
                axes.axhspan(mean - error, mean + error, color=GREY, alpha=0.1)
            else:
                text = f"{rule}: {mean:.1f}"
                text += ", below" if np.isnan(error) else f" ± {error:.1f}, below"
                place: Any = {"transform": axes.transAxes, "fontsize": 8, "ha": "right"}
                axes.text(0.99, 0.02, text, color=GREY, **place)
        axes.set_xscale("log")
        ticks = 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{1 + x:g}" for x in ticks])
        axes.set_xlabel("Gradients per step")
    figure.axes[0].set_ylabel("Test accuracy, clean labels (%)")
    handles = [Line2D([], [], color=c, label=rule) for rule, c in COLOURS.items()]
    handles += [
        Line2D([], [], color=GREY, linestyle=line, label=rule)
        for rule, line in (("MSAM (1)", "--"), ("SGD (1)", ":"))
    ]
    handles += [
        Line2D(
            [],
            [],
            color=GREY,
            marker=marker,
            linestyle="",
            label="whole batch" if k == 1 else f"{Fraction(1, k)} of it",
        )
        for k, marker in MARKERS.items()
    ]
    figure.legend(
        handles=handles,
        frameon=False,
        fontsize=8,
        ncols=7 if panels > 1 else 4,
        loc="outside lower center",
    )
    study.save(figure, path)


def run(options: argparse.Namespace) -> None:
    """Trains, and writes each set when it is done."""
    sets = options.sets
    if options.data is None and sets != ["digits"]:
        print("No --data: only digits run, without Fashion-MNIST.")
        sets = ["digits"]
    # Results of other sets stay, so that one can be run anew.
    results = study.read(options.out, {})
    results["settings"] = {
        **study.environment(),
        "weight_decay": WEIGHT_DECAY,
        "momentum": 0.9,
        "vsam_window": WINDOW,
    }
    with study.progress() as progress:
        for name in sets:
            progress.add_task(name, total=0)  # the search adds to it as it goes
            runs = Study(load(name, options.data), progress, options.quick)
            rows = []
            for variant in QUICK_VARIANTS if options.quick else VARIANTS:
                if name == "fashion_fast" and variant.whole_difference:
                    continue  # the dearest runs; the other two sets have them
                part = f" {variant.part}" * (variant.divisor > 1)
                bar = progress.task_ids[-1]
                progress.update(bar, description=f"{name}, {variant.rule}{part}")
                rows.append(runs.row(variant))
            for key, value in (("data", runs.settings()), ("rows", rows)):
                results.setdefault(key, {})[name] = value
            study.write(results, options.out)


def main() -> None:
    """Trains, writes, draws and prints."""
    name, quick = "cheap_ascent.json", "two epochs, few variants"
    parser = study.parser(__doc__, name, quick=quick, data=True, figure=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS[:3]))
    options = parser.parse_args()
    if not options.report:
        run(options)
    study.show(options, markdown, draw)


if __name__ == "__main__":
    main()
