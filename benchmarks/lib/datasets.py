"""Image data sets as uint8 arrays, and their augmentation in a training step.

CIFAR-10 and CIFAR-100 come from the folder of the standard archives (pickles or binary
batches), Fashion-MNIST from the folder of its four files (packed or not), each of them
also from an ``.npz``, and digits from scikit-learn.
An ``.npz`` holds ``train_x``, ``train_y``, ``test_x`` and ``test_y``, uint8. Images
stay uint8 on the device; cropping and flipping happen inside the compiled step, from a
key.
"""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = "digits", "fashion-mnist", "cifar10", "cifar100"
CLASSES = {"digits": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100}
ARCHIVES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
PADDING = 4  # pixels of the crop's border


class Data(NamedTuple):
    """A data set.

    Attributes:
      train_x: (n, height, width, channels) uint8.
      train_y: (n,) int32.
      test_x: (m, height, width, channels) uint8.
      test_y: (m,) int32.
    """

    train_x: Any
    train_y: Any
    test_x: Any
    test_y: Any


def load(name: str, path: Path | None) -> Data:
    """The data set of that name.

    Args:
      name: one of ``NAMES``.
      path: a file or folder; digits need none.

    Returns:
      Arrays in the host's memory.
    """
    if name == "digits":
        arrays = digits()
    elif path is None:
        raise SystemExit(f"{name} needs --data, see benchmarks/README.md")
    elif path.is_dir():
        arrays = _folder(name, path) if name in ARCHIVES else _idx(path)
    else:
        arrays = npz(path)
    train_x, train_y, test_x, test_y = arrays
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if x.dtype != np.uint8 or len(x) != len(y):
            raise SystemExit(f"{path}: expected uint8 images, and a label for each")
        if len(y) and not 0 <= y.min() <= y.max() < CLASSES[name]:
            raise SystemExit(f"{path}: the labels do not belong to {name}")
    return Data(train_x, train_y.astype(np.int32), test_x, test_y.astype(np.int32))


def replaced(
    labels: np.ndarray, count: int, rng: np.random.Generator, classes: int = 10
) -> np.ndarray:
    """The labels, with this share redrawn from all classes."""
    chosen, labels = rng.permutation(len(labels))[:count], labels.copy()
    labels[chosen] = rng.integers(0, classes, len(chosen))
    return labels


def flat(images: np.ndarray, largest: int) -> np.ndarray:
    """(n, features), float32 from 0 to 1."""
    return (images.reshape(len(images), -1) / largest).astype(np.float32)


def digits() -> tuple[np.ndarray, ...]:
    """Images for training, their labels, and both for testing."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)  # 0 to 16
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return train_x, train_y, test_x, test_y


def npz(path: Path) -> tuple[np.ndarray, ...]:
    """Likewise, from a file."""
    with np.load(path) as file:
        missing = {"train_x", "train_y", "test_x", "test_y"} - set(file)
        if missing:
            raise SystemExit(f"{path} lacks {', '.join(sorted(missing))}")
        arrays = [file[key] for key in ("train_x", "train_y", "test_x", "test_y")]
    # Grey images may come without an axis for their only channel.
    return tuple(x[..., None] if x.ndim == 3 else x for x in arrays)


class _Arrays(pickle.Unpickler):
    """An unpickler that makes arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        allowed = {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


def _folder(name: str, path: Path) -> tuple[np.ndarray, ...]:
    """The standard archives, unpacked: pickles or binary batches."""
    for inner in ARCHIVES[name]:
        if (path / inner).is_dir():
            path = path / inner
            break
    train, test = ["train"], "test"
    if name == "cifar10":
        train, test = [f"data_batch_{i}" for i in range(1, 6)], "test_batch"
    binary = (path / f"{test}.bin").is_file()
    if not binary and not (path / test).is_file():
        raise SystemExit(f"{path} holds no batches of {name}")
    # CIFAR-100's binary records start with a coarse label.
    label_bytes = 2 if name == "cifar100" else 1
    read = lambda stem: (
        _binary(path / f"{stem}.bin", label_bytes) if binary else _pickle(path / stem)
    )
    batches = [read(stem) for stem in train]
    images, labels = (np.concatenate(x) for x in zip(*batches, strict=True))
    return images, labels, *read(test)


def _pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        batch = _Arrays(file, encoding="bytes").load()
    labels = batch.get(b"labels", batch.get(b"fine_labels"))
    return _images(batch[b"data"]), np.array(labels)


def _binary(path: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    records = np.fromfile(path, np.uint8).reshape(-1, label_bytes + 3072)
    return _images(records[:, label_bytes:]), records[:, label_bytes - 1]


def _idx(path: Path) -> tuple[np.ndarray, ...]:
    """The four files of Fashion-MNIST, packed with gzip or not."""

    def read(name: str) -> np.ndarray:
        packed, plain = path / f"{name}-ubyte.gz", path / f"{name}-ubyte"
        if not packed.is_file() and not plain.is_file():
            raise SystemExit(f"{path} holds neither {plain.name} nor {packed.name}")
        with gzip.open(packed) if packed.is_file() else plain.open("rb") as file:
            data = np.frombuffer(file.read(), np.uint8)
        # The fourth byte is the number of axes; then come their lengths.
        return data[4 + 4 * int(data[3]) :]

    images = lambda part: read(f"{part}-images-idx3").reshape(-1, 28, 28, 1)
    labels = lambda part: read(f"{part}-labels-idx1")
    return images("train"), labels("train"), images("t10k"), labels("t10k")


def _images(rows: np.ndarray) -> np.ndarray:
    """Images from rows of red, green and blue planes."""
    planes = rows.reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def crop(key: jax.Array, images: jax.Array, padding: int = PADDING) -> jax.Array:
    """A window of the same size somewhere in each image with a black border."""
    count, height, width, _ = images.shape
    border = (padding, padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    corners = jax.random.randint(key, (count, 2), 0, 2 * padding + 1)
    rows = corners[:, :1] + jnp.arange(height)
    columns = corners[:, 1:] + jnp.arange(width)
    which = jnp.arange(count)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]]


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors half of the images."""
    flipped = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def augmented(key: jax.Array, images: jax.Array, augmentation: str) -> jax.Array:
    """The augmented images of a training batch.

    Args:
      key: the key of this step.
      images: (batch, height, width, channels) uint8.
      augmentation: crop, flip, both joined by ``+``, or ``none``.

    Returns:
      uint8 of the same shape.
    """
    wanted = set(augmentation.split("+")) - {"none"}
    if unknown := wanted - {"crop", "flip"}:
        raise ValueError(f"unknown augmentation: {', '.join(sorted(unknown))}")
    keys = jax.random.split(key)
    if "crop" in wanted:
        images = crop(keys[0], images)
    if "flip" in wanted:
        images = flip(keys[1], images)
    return images
