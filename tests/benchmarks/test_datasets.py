"""The data sets that the benchmarks read, and what a training step sees of them."""

from __future__ import annotations

import gzip
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lib import datasets

RNG = np.random.default_rng(0)


def images(count, side=32, channels=3):
    return RNG.integers(0, 256, (count, side, side, channels), np.uint8)


def archive(name, form, path):
    """A standard archive with few images, and its arrays."""
    cifar10 = name == "cifar10"
    stems = [f"data_batch_{i}" for i in range(1, 6)] if cifar10 else ["train"]
    arrays = {}
    for stem in [*stems, "test_batch" if cifar10 else "test"]:
        arrays[stem] = x, y = images(4), RNG.integers(0, 10 if cifar10 else 100, 4)
        rows = x.transpose(0, 3, 1, 2).reshape(4, -1)
        if form == "pickle":
            key = b"labels" if cifar10 else b"fine_labels"
            batch = {b"data": rows, key: y.tolist(), b"batch_label": b"x"}
            (path / stem).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            coarse = [] if cifar10 else [np.zeros((4, 1))]
            record = np.concatenate([*coarse, y[:, None], rows], axis=1)
            (path / f"{stem}.bin").write_bytes(record.astype(np.uint8).tobytes())
    *train, test = arrays.values()
    return *map(np.concatenate, zip(*train, strict=True)), *test


@pytest.mark.parametrize("form", ["pickle", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_archives_are_read(tmp_path, name, form):
    inner = tmp_path / datasets.ARCHIVES[name][form == "binary"]
    inner.mkdir()
    want = archive(name, form, inner)
    for path in (inner, tmp_path):  # the folder, or the one that it lies in
        data = datasets.load(name, path)
        for got, wanted in zip(data[:4], want, strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert data.train_x.dtype == np.uint8


@pytest.mark.parametrize("packed", [True, False])
def test_the_files_of_fashion_mnist_are_read(tmp_path, packed):
    """Big-endian headers of two and four numbers, before the bytes."""
    kept = []
    for part in ("train", "t10k"):
        x, y = images(5, 28, 1), RNG.integers(0, 10, 5).astype(np.uint8)
        files = {"images-idx3": ([2051, 5, 28, 28], x), "labels-idx1": ([2049, 5], y)}
        for name, (header, data) in files.items():
            content = np.array(header, ">i4").tobytes() + data.tobytes()
            path = tmp_path / f"{part}-{name}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
        kept += x, y
    for got, wanted in zip(datasets.load("fashion-mnist", tmp_path), kept, strict=True):
        np.testing.assert_array_equal(got, wanted)
    next(tmp_path.glob("t10k-labels*")).unlink()
    with pytest.raises(SystemExit, match="neither t10k-labels-idx1-ubyte nor"):
        datasets.load("fashion-mnist", tmp_path)


def test_an_npz_is_read_and_grey_images_get_a_channel(tmp_path):
    x, y = images(50, 28, 1), np.arange(50, dtype=np.uint8) % 10
    named = {"train_x": x[..., 0], "train_y": y, "test_x": x[:9, ..., 0]}
    np.savez(tmp_path / "f.npz", **named, test_y=y[:9])
    data = datasets.load("fashion-mnist", tmp_path / "f.npz")
    assert data.train_x.shape == (50, 28, 28, 1)
    np.testing.assert_array_equal(data.test_x, x[:9])
    np.savez(tmp_path / "g.npz", **named)
    with pytest.raises(SystemExit, match="lacks test_y"):
        datasets.load("fashion-mnist", tmp_path / "g.npz")


def test_a_pickle_that_is_no_array_is_refused(tmp_path):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps({b"data": print}))
    (tmp_path / "test_batch").touch()
    with pytest.raises(pickle.UnpicklingError, match="print"):
        datasets.load("cifar10", tmp_path)


def test_digits_are_there_without_a_file():
    data = datasets.load("digits", None)
    assert data.train_x.shape == (1437, 8, 8, 1)
    flat = datasets.flat(data.train_x, 16)
    assert (flat.shape, flat.min(), flat.max()) == ((1437, 64), 0, 1)


def test_labels_are_replaced_as_many_as_asked_for():
    labels = np.full(1000, 3)
    drawn = datasets.replaced(labels, 400, np.random.default_rng(0))
    assert 340 <= np.sum(drawn != 3) <= 380  # one in ten is drawn as it was
    assert set(drawn) == set(range(10))
    assert np.all(labels == 3)


def test_a_crop_is_a_window_of_the_padded_image():
    x = images(30, 6)
    cropped = np.asarray(datasets.crop(jax.random.key(0), jnp.asarray(x), 2))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (6, 6), (1, 2))
    found = (windows.transpose(0, 1, 2, 4, 5, 3) == cropped[:, None, None]).all(
        (3, 4, 5)
    )
    assert found.any((1, 2)).all()
    assert found.any(0).sum() > 10  # corners


def test_about_half_are_flipped():
    x = images(200, 4)
    flipped = np.asarray(datasets.flip(jax.random.key(0), jnp.asarray(x)))
    same = (flipped == x).all((1, 2, 3))
    assert 70 < same.sum() < 130
    np.testing.assert_array_equal(flipped[~same], x[~same][:, :, ::-1])


def test_augmentation_is_that_of_the_key_and_of_its_name():
    x = images(6, 8)

    def seen(seed, name):
        return np.asarray(datasets.augmented(jax.random.key(seed), x, name))

    np.testing.assert_array_equal(seen(0, "crop+flip"), seen(0, "crop+flip"))
    assert np.any(seen(0, "crop+flip") != seen(1, "crop+flip"))
    np.testing.assert_array_equal(seen(0, "none"), x)
    with pytest.raises(ValueError, match="mixup"):
        seen(0, "mixup")
