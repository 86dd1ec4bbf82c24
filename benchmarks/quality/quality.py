"""What each method gains in accuracy, at what cost, beside the published figures.

Trains a network on a data set with any of the methods and the papers' hyperparameters,
for several seeds. Data stay on the device; where that pays (accelerators; networks
without convolutions) an epoch is one program.

    python benchmarks/quality/quality.py --data-set digits --model mlp --seeds 0 1 2
    python benchmarks/quality/quality.py --data-set cifar10 --model resnet18 \\
        --data cifar-10-batches-py --epochs 30 --minutes 8 --out FILE
    python benchmarks/quality/quality.py --plan plan.json --out FILE
    python benchmarks/quality/quality.py --report FILE [--no-times] [--figure FILE]

Each finished training is a line of JSON in ``--out``, and what is there already is not
trained again. After ``--minutes`` the training at hand stops at the end of an epoch and
is saved in ``--checkpoints``; the same command goes on from there. A plan is a list of
objects with the names of these options, such as ``{"model": "cnn", "seeds": [0, 1]}``;
what it states wins over the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import datasets, networks, study
from benchmarks.quality import presets, report
from benchmarks.quality.checkpoints import Epoch
from benchmarks.quality.training import Trainer, settings

CHECKPOINTS = study.ROOT / "benchmarks/checkpoints"
OVERRIDES = (  # options that replace a field of the recipe
    *("epochs", "batch_size", "learning_rate", "weight_decay", "smoothing"),
    *("augmentation", "label_noise", "limit", "dtype"),
)


class Speed(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")


class Job(NamedTuple):
    """A training to be done: how, with what, and from where its images come."""

    recipe: presets.Recipe
    method: str
    seed: int
    data: str | None
    options: argparse.Namespace


def parser() -> argparse.ArgumentParser:
    """All options; those of a training can be in a plan too."""
    new = study.parser(
        __doc__, "quality_cpu.jsonl", out=Path("out/quality.jsonl"), figure=True
    )
    new.add_argument("--data-set", choices=datasets.NAMES, default="digits")
    new.add_argument("--data", help="folder of the standard archive, or .npz")
    new.add_argument("--model", choices=networks.NETWORKS, default="mlp")
    new.add_argument("--methods", nargs="+", choices=presets.METHODS)
    new.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    new.add_argument("--hyper", type=json.loads, default={}, help='{"SAM": {"rho": 1}}')
    for name in OVERRIDES:
        kind = type(getattr(presets.Recipe("", ""), name))
        new.add_argument(f"--{name.replace('_', '-')}", type=kind)
    new.add_argument("--evaluate-every", type=int, default=1, help="epochs")
    new.add_argument("--scan", choices=("auto", "on", "off"), default="auto")
    new.add_argument("--plan", type=Path, help="JSON: a list of such options")
    new.add_argument("--minutes", type=float, help="stop in time")
    new.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    new.add_argument("--no-times", action="store_true", help="report counts alone")
    return new


def all_jobs(options: argparse.Namespace) -> list[Job]:
    """The list of trainings: all methods of a seed before the next seed."""
    entries: list[dict[str, Any]] = [{}]
    if options.plan:
        entries = json.loads(options.plan.read_text())
    found = []
    for entry in entries:
        one = argparse.Namespace(**vars(options))
        for name, value in entry.items():
            field = name.replace("-", "_")
            if not hasattr(one, field):
                raise SystemExit(f"{options.plan}: there is no option {name}")
            setattr(one, field, value)
        recipe = presets.recipe(one.data_set, one.model)
        if one.dtype is None and jax.default_backend() != "cpu":
            one.dtype = "bfloat16"
        given = {name: getattr(one, name) for name in OVERRIDES}
        given = {name: x for name, x in given.items() if x is not None}
        recipe = dataclasses.replace(recipe, **given)
        methods = one.methods or presets.METHODS
        if unknown := {*methods, *one.hyper} - {*presets.METHODS}:
            raise SystemExit(f"no such method: {', '.join(sorted(unknown))}")
        found += [
            Job(recipe, method, seed, one.data, one)
            for seed in one.seeds
            for method in methods
        ]
    return found


class Bench:
    """Trainings that share data and compiled programs."""

    def __init__(self) -> None:
        """Loads nothing yet."""
        self.data: dict[Any, datasets.Data] = {}
        self.trainers: dict[str, Trainer] = {}

    def load(self, job: Job) -> datasets.Data:
        """The data set, on the device."""
        recipe = job.recipe
        key = recipe.data, job.data, recipe.limit, recipe.label_noise
        if key not in self.data:
            path = Path(job.data) if job.data else None
            found = datasets.load(recipe.data, path, recipe.limit, recipe.label_noise)
            self.data[key] = jax.device_put(found)
        return self.data[key]

    def trainer(self, job: Job) -> Trainer:
        """Compiled once for all seeds."""
        recipe, options = job.recipe, job.options
        data = self.load(job)
        on_cpu = jax.default_backend() == "cpu"
        slow = on_cpu and recipe.model in networks.CONVOLUTIONAL
        per_epoch = len(data.train_y) // recipe.batch_size
        values = presets.hyperparameters(job.method, recipe, per_epoch)
        values |= options.hyper.get(job.method, {})
        scan = options.scan == "on" or (options.scan == "auto" and not slow)
        if job.method == "AE-SAM" and slow and not scan:
            # Decided a step ahead, so that no convolution is in a conditional.
            values["lag"] = options.hyper.get("AE-SAM", {}).get("lag", 1)
        key = json.dumps([dataclasses.asdict(recipe), job.method, values, job.data])
        key += str(scan)
        if key not in self.trainers:
            every = options.evaluate_every
            trainer = Trainer(recipe, job.method, values, data, scan, every)
            self.trainers[key] = trainer
        return self.trainers[key]


def identity(given: dict[str, Any]) -> str:
    """A name for a training: equal settings, equal name."""
    text = json.dumps(given, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(path: Path) -> list[dict[str, Any]]:
    """The results in a file, which need not exist; a cut off line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: left out a line that is no JSON: {line[:60]}")
    return rows


def append(row: dict[str, Any], path: Path) -> None:
    """Adds a line, also to a file whose last line a killed process left open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        file.seek(0)
        kept = file.read()
        if kept and not kept.endswith("\n"):
            file.write("\n")
        file.write(json.dumps(row) + "\n")


def train(options: argparse.Namespace, console: Console) -> bool:
    """Does what is not done; whether all of it is."""
    begin, budget = time.perf_counter(), options.minutes
    late = lambda seconds: (
        budget is not None and time.perf_counter() - begin + seconds > 60 * budget
    )
    jobs, bench = all_jobs(options), Bench()
    done = {row["id"] for row in read(options.out)}
    columns = (
        *(TextColumn("{task.description}"), BarColumn()),
        *(TextColumn("{task.percentage:.0f} %"), Speed(), Remaining()),
    )
    log = not console.is_terminal  # in which no bar moves
    shown: Any = {"console": console, "refresh_per_second": 2, "disable": log}
    with Progress(*columns, **shown) as progress:
        bar = progress.add_task("")
        for place, job in enumerate(jobs, 1):
            trainer = bench.trainer(job)
            given = settings(trainer, job.seed)
            name = identity(given)
            if name in done:
                continue
            size, steps = job.recipe.batch_size, trainer.steps
            title = f"{job.method}, seed {job.seed} ({place}/{len(jobs)})"
            total = size * steps * job.recipe.epochs
            progress.reset(bar, total=total, description=title)
            tick = lambda steps, size=size: progress.advance(bar, steps * size)

            def say(
                number: int,
                epoch: Epoch,
                title: str = title,
                images: int = size * steps,
            ) -> None:
                if log:
                    accuracy = (
                        "" if epoch.accuracy is None else f"{epoch.accuracy:.2f} %"
                    )
                    console.print(
                        f"{title}: epoch {number}, {images / epoch.seconds:,.0f}"
                        f" images/s{' with compiling' * epoch.cold},"
                        f" loss {epoch.loss:.4f} {accuracy}",
                        soft_wrap=True,
                    )

            results = trainer.run(job.seed, options.checkpoints / name, late, tick, say)
            if results is None:
                console.print(f"Stopped in {title}; the same command goes on.")
                return False
            row = {
                "id": name,
                **given,
                "scan": trainer.scan,
                **study.environment("jax", "jaxlib", "flax", "optax"),
                **results,
            }
            row["train_examples"] = trainer.examples
            append(row, options.out)
            done.add(name)
            speed = results["images_per_second"] or 0
            console.print(
                f"{title}: {results['accuracy']:.2f} %, {speed:,.0f} images/s,"
                f" {results['gradients_per_step']:.3f} gradients per step",
                soft_wrap=True,
            )
            if place < len(jobs) and late(0):
                console.print("Out of time; the same command goes on.")
                return False
    return True


def main() -> None:
    """Trains and reports."""
    options, console = parser().parse_args(), Console()
    if not options.report:
        train(options, console)
    markdown = lambda rows: report.markdown(rows, not options.no_times)
    study.show(options, markdown, report.draw, read)


if __name__ == "__main__":
    main()
