"""A small trained network whose dense Hessian is known: what estimates are held to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import x64
from sklearn.datasets import load_digits

from optax_sam.sharpness import Operator


def digits(dtype):
    """The 1,797 digits of scikit-learn, as pixels in [0, 1] and labels."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(dtype), labels


def loss_fn(params, batch):
    """Cross-entropy of a tanh network with one hidden layer."""
    x, y = batch
    logits = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.cache
def trained(dtype):
    """Its 2,410 parameters after 800 steps of AdamW, the data, the dense Hessian.

    It trains in float64, so that the spectrum in both precisions is the same.
    """
    if dtype != "float64":
        (params, batch, H), cast = trained("float64"), lambda x: x.astype(dtype)
        return jax.tree.map(cast, params), (cast(batch[0]), batch[1]), H
    with x64():
        batch = digits(dtype)
        key1, key2 = jax.random.split(jax.random.key(0))
        params = {
            "w1": jax.random.normal(key1, (64, 32), dtype) / 8,
            "b1": jnp.zeros(32, dtype),
            "w2": jax.random.normal(key2, (32, 10), dtype) / 32**0.5,
            "b2": jnp.zeros(10, dtype),
        }
        tx = optax.adamw(3e-3)

        @jax.jit
        def train(params, batch):
            def step(_, carry):
                params, state = carry
                grads = jax.grad(loss_fn)(params, batch)
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            return jax.lax.fori_loop(0, 800, step, (params, tx.init(params)))[0]

        params = train(params, batch)
        return params, batch, dense_hessian(loss_fn, params, batch)


def dense_hessian(loss_fn, params, batch):
    """The Hessian ``(n, n)`` as NumPy has it, in the order of the raveled leaves."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    gradient = jax.jit(jax.grad(lambda w, batch: loss_fn(unravel(w), batch)))
    row = lambda v, w, batch: jax.jvp(lambda w: gradient(w, batch), (w,), (v,))[1]
    rows = jax.jit(lambda w, b: jax.lax.map(lambda v: row(v, w, b), jnp.eye(len(w))))
    H = np.asarray(rows(flat, batch))
    return (H + H.T) / 2


def matrix(H, dtype=None):
    """A dense matrix as an operator."""
    H = jnp.asarray(H, dtype)
    return Operator(lambda v: H @ v, H[0], len(H), lambda v: v)


def rotated(eigenvalues, dtype, seed=0):
    """A matrix with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return jnp.asarray(Q * eigenvalues @ Q.T, dtype)
