"""The tasks of the protocol: data, network and length of a training run.

A task uses its test set only for the final accuracy at a chosen setting. Settings are
chosen on images of the training set that the run does not train on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib import datasets


@dataclasses.dataclass(frozen=True)
class Task:
    """The settings of a task, equal for all rows.

    Attributes:
      title: the title on the page.
      data: name of the data set.
      network: name of the network.
      images: the number of training images of a run.
      held_out: the number of images that judge the search.
      epochs: the number of epochs.
      batch_size: examples in a step; an incomplete last batch is left out.
      augmentation: see ``datasets.augmented``.
      redrawn: share of the training labels that are drawn again from all classes.
      budget: settings that the search tries for each row; 0 takes the start.
      search_seeds: seeds of the search; a setting's score is the mean over them.
      seeds: the seeds of the tested runs, which the search has not seen; more may be
        added to a file.
      starts: starts of the search that replace the rows' own.
      dtype: the dtype in which the network computes.
    """

    title: str
    data: str
    network: str
    images: int
    held_out: int
    epochs: int
    batch_size: int
    augmentation: str = "none"
    redrawn: float = 0.0
    budget: int = 20
    search_seeds: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    starts: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"


TASKS = {
    "digits": Task(
        "Digits, 40 % of the labels redrawn, MLP",
        *("digits", "mlp", 1437, 287, 100, 64),
        redrawn=0.4,
        search_seeds=(100, 101),
        seeds=tuple(range(20)),
    ),
    "fashion_mlp": Task(
        "Fashion-MNIST, 4,000 images, MLP",
        *("fashion-mnist", "mlp", 4000, 5000, 60, 128),
    ),
    "fashion_cnn": Task(
        "Fashion-MNIST, 2,000 images, CNN",
        *("fashion-mnist", "cnn", 2000, 5000, 60, 64),
    ),
    "cifar10": Task(
        "CIFAR-10, 5,000 images, ResNet-8",
        *("cifar10", "resnet8", 5000, 5000, 50, 64),
        augmentation="flip",
        budget=7,
        # A first search for SGD went from a rate of 0.05 up to this one.
        starts=(("rho", 0.2), ("rate", 0.2)),
    ),
    "cifar10_mixer": Task(
        "CIFAR-10, 5,000 images, MLP-Mixer",
        *("cifar10", "mixer", 5000, 5000, 30, 64),
        augmentation="flip",
        budget=7,
        # One seed does not show that a learning rate is too high for another.
        search_seeds=(100, 101),
        starts=(("rho", 0.2), ("rate", 0.1)),
    ),
    # As many steps as 50 epochs of 5,000 images.
    "cifar10_full": Task(
        "CIFAR-10, 50,000 images, ResNet-8",
        *("cifar10", "resnet8", 50000, 5000, 5, 64),
        augmentation="flip",
        budget=5,
        starts=(("rho", 0.2), ("rate", 0.2)),
    ),
    # For a GPU and ten minutes: nothing is searched, the starts are published values.
    "cifar10_gpu": Task(
        "CIFAR-10, ResNet-18",
        *("cifar10", "resnet18", 50000, 0, 15, 128),
        augmentation="crop+flip",
        budget=0,
        seeds=(0, 1, 2),
        starts=(("rate", 0.1), ("decay", 5e-4)),
        dtype="bfloat16",
    ),
    # The same code on a smaller task, for a CPU and for tests.
    "cifar10_mini": Task(
        "CIFAR-10, tiny ResNet, for trying out",
        *("cifar10", "tiny-resnet", 400, 100, 2, 100),
        augmentation="crop+flip",
        budget=2,
        seeds=(0, 1),
    ),
}


SEARCH = ", search "  # between the name of a task and the number of a further search


def searched(name: str, task: Task, search: int) -> tuple[str, Task]:
    """The name and the task for another search, with seeds that no search had before.

    The tested seeds stay the same, so results differ by what the searches choose. The
    third search begins at a larger weight decay, because many rows chose one.
    """
    if search < 1:  # its seeds would be those of the tests
        raise SystemExit(f"the searches have the numbers 1, 2, 3, ...; got {search}")
    if search == 1:
        return name, task
    seeds = tuple(seed + 100 * (search - 1) for seed in task.search_seeds)
    starts = (*task.starts, *[("decay", 2e-3)] * (search == 3))
    other = dataclasses.replace(task, search_seeds=seeds, starts=starts)
    return f"{name}{SEARCH}{search}", other


def parted(name: str) -> tuple[str, int]:
    """The task and the number of a search, from the name that ``searched`` made."""
    base, _, number = name.partition(SEARCH)
    return base, int(number or 1)


class Split(NamedTuple):
    """The images of a run on the device, uint8, and their labels.

    Attributes:
      x: the images for training.
      y: their labels, some of them redrawn if the task says so.
      judge_x: the images that judge the run: held-out images, or the test set.
      judge_y: their labels.
    """

    x: Any
    y: Any
    judge_x: Any
    judge_y: Any


class Source:
    """The data set of a task, from which each run takes its images.

    Args:
      task: the task.
      path: the file or folder of the data set; digits need none.
    """

    def __init__(self, task: Task, path: Path | None) -> None:
        """Reads the data set, and sets aside the images that judge the search."""
        self.task = task
        self.classes = datasets.CLASSES[task.data]
        self.data = datasets.load(task.data, path)
        order = _balanced(self.data.train_y, np.random.default_rng(0))
        # Whether there are more training images than one run takes. If not, the search
        # trains on the images that it does not hold out.
        self.pooled = task.images + task.held_out <= len(order)
        # Equally many of each class, because the order takes the classes in turns.
        self.held_out = order[: task.held_out] if self.pooled else None
        self.pool = order[task.held_out :] if self.pooled else order
        self.images = min(task.images, len(self.pool))

    def split(self, seed: int, tested: bool) -> Split:
        """The images of one run.

        Args:
          seed: decides the training images, and the labels that are redrawn.
          tested: whether the test set judges, or the held-out images.

        Returns:
          Arrays on the device.
        """
        rng, data, task = np.random.default_rng(seed), self.data, self.task
        pool = self.pool[_balanced(data.train_y[self.pool], rng)]
        rows, held_out = pool[: self.images], self.held_out
        if not self.pooled and not tested:
            rows, held_out = pool[task.held_out :], pool[: task.held_out]
            rows = rows[: self.images]
        labels = data.train_y[rows]
        count = round(task.redrawn * len(rows))
        labels = datasets.replaced(labels, count, rng, self.classes)
        judge = (data.test_x, data.test_y)
        if not tested:
            judge = (data.train_x[held_out], data.train_y[held_out])
        return jax.tree.map(jnp.asarray, Split(data.train_x[rows], labels, *judge))


def _balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order that takes the classes in turns."""
    order = rng.permutation(len(labels))
    turn = np.zeros(len(labels), int)
    for c in np.unique(labels):
        place = order[labels[order] == c]
        turn[place] = np.arange(len(place))
    return order[np.argsort(turn[order], kind="stable")]
