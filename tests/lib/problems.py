"""Tiny training problems, as plain functions.

Each is a :class:`Problem`: a loss, where to start, and a stack of batches. Numbers are
kept as float64 of NumPy, so that they take the precision that JAX has at their use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """``loss_fn(params, batch)``, the first parameters, and batches on axis 0."""

    loss_fn: Callable[[Any, Any], jax.Array]
    start: Any
    stack: Any

    def params(self, dtype=None):
        return jax.tree.map(lambda x: jnp.array(x, dtype), self.start)

    def batch(self, t):
        return jax.tree.map(lambda x: jnp.asarray(x[t % len(x)]), self.stack)

    def batches(self, count):
        """The first ``count`` batches, stacked for a scan."""
        return jax.tree.map(
            lambda x: jnp.asarray(x[np.arange(count) % len(x)]), self.stack
        )


def hessian():
    """A symmetric matrix of five rows with the spectrum 4, 2, 1, 0.5, 0.25."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    return rotation * np.array([4.0, 2.0, 1.0, 0.5, 0.25]) @ rotation.T


def quadratic():
    """``w H w / 2 - w b``, whose Hessian is known, with the minimum 0 at ``b = 0``."""
    rng = np.random.default_rng(1)

    def loss_fn(w, b):
        flat = jnp.concatenate([w["a"], w["b"]])
        return flat @ jnp.asarray(hessian(), flat.dtype) @ flat / 2 - flat @ b

    start = {"a": rng.normal(size=3), "b": rng.normal(size=2)}
    return Problem(loss_fn, start, np.zeros((1, 5)))


def rosenbrock():
    """A curved valley in two scalars, with the minimum 0 at (1, 1)."""

    def loss_fn(w, batch):
        return (1 - w["x"]) ** 2 + 5 * (w["y"] - w["x"] ** 2) ** 2

    return Problem(loss_fn, {"x": np.array(-0.5), "y": np.array(0.8)}, np.zeros((1,)))


def mlp(sizes=(3, 4, 2), batch_size=8, num_batches=4):
    """A tanh network that learns the labels of a random linear map."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(num_batches, batch_size, sizes[0]))
    y = np.argmax(x @ rng.normal(size=(sizes[0], sizes[-1])), axis=-1)

    def loss_fn(w, batch):
        x, y = batch
        for i in range(len(sizes) - 1):
            layer = w[f"layer{i}"]
            x = (jnp.tanh(x) if i else x) @ layer["kernel"] + layer["bias"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=-1)
        return -jnp.mean(picked)

    start = {
        f"layer{i}": {
            "kernel": rng.normal(size=shape) / np.sqrt(shape[0]),
            "bias": 0.1 * rng.normal(size=shape[1]),
        }
        for i, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    return Problem(loss_fn, start, (x, y))
