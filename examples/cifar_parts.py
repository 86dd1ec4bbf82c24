"""The network of cifar.py, and its data: CIFAR-10, or digits in its shape."""

import functools
import pickle

import flax.linen as nn
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class ResNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(momentum=0.9)(conv(self.width)(x)))
        for stage in range(3):
            width, stride = self.width << stage, 1 + (stage > 0)
            y = nn.relu(norm(momentum=0.9)(conv(width, strides=stride)(x)))
            y = norm(momentum=0.9)(conv(width)(y))
            x = nn.relu(y + nn.Conv(width, (1, 1), strides=stride)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def load(path):
    """Images, (n, 32, 32, 3) from 0 to 255, and labels, for training and testing."""
    if path is None:
        x, y = load_digits(return_X_y=True)
        x = (x * (255 / 16)).reshape(-1, 8, 8, 1).astype(np.float32)
        x = x.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
        x, test_x, y, test_y = train_test_split(x, y, random_state=0)
        return x, y, test_x, test_y
    if path.is_file():
        with np.load(path) as file:
            return [file[name] for name in ("train_x", "train_y", "test_x", "test_y")]

    def read(*names):
        files = [pickle.loads((path / n).read_bytes(), encoding="bytes") for n in names]
        x, y = (np.concatenate([f[k] for f in files]) for k in (b"data", b"labels"))
        return x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), y

    return *read(*(f"data_batch_{i}" for i in range(1, 6))), *read("test_batch")


def normalized(x):
    return (x / 127.5 - 1).astype(np.float32)


def augmented(rng, x, flips):
    """A crop of each image with a margin of 4 pixels; with ``flips``, half mirrored."""
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    crops = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), (1, 2))
    top, left = rng.integers(0, 9, (2, len(x)))
    x = crops[np.arange(len(x)), top, left].transpose(0, 2, 3, 1)
    mirrored = flips & (rng.random(len(x)) < 0.5)
    return np.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
