"""Whole runs with SAF or MESA: digits, shuffled, the last batch incomplete."""

import functools

import flax.serialization
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import recorded
from reference import trajectory

import optax_sam

EPOCHS, EXAMPLES, BATCH = 10, 200, 64
ORDERS = [np.random.default_rng(e).permutation(EXAMPLES) for e in range(EPOCHS)]
SGD = {"lr": 0.5, "momentum": 0.9}


def logits_of(w, x):
    h = jnp.tanh(x @ w["layer0/kernel"] + w["layer0/bias"])
    return h @ w["layer1/kernel"] + w["layer1/bias"]


def cross_entropy(z, y):
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(z, y))


def train(tx, term, orders=ORDERS):
    """``term(logits, x, indices, opt_state, epoch)``; losses, weights and state."""
    X, y = (jnp.asarray(recorded.PROBLEM[name]) for name in "Xy")

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w, state, indices, epoch):
        def loss_fn(w):
            z = logits_of(w, X[indices])
            return cross_entropy(z, y[indices]) + term(
                z, X[indices], indices, state, epoch
            ), z

        (loss, z), grads = jax.value_and_grad(loss_fn, has_aux=True)(w)
        updates, state = tx.update(grads, state, w, logits=z, indices=indices)
        return optax.apply_updates(w, updates), state, loss

    w = jax.tree.map(jnp.asarray, recorded.initial("sgd"))
    state, losses = tx.init(w), []
    for epoch, order in enumerate(orders):
        for first in range(0, len(order), BATCH):
            indices = jnp.asarray(order[first : first + BATCH])
            w, state, loss = step(w, state, indices, epoch)
            losses.append(loss)
    return np.array(losses), w, state


def sgd():
    return optax.sgd(SGD["lr"], SGD["momentum"])


def saf_term(z, x, indices, state, epoch, coefficient=0.3):
    past, known = optax_sam.saf_past_logits(state, indices)
    return optax_sam.trajectory_loss(z, past, coefficient=coefficient, where=known)


def mesa_term(z, x, indices, state, epoch):
    past = logits_of(optax_sam.mesa_params(state), x)
    coefficient = jnp.where(epoch > 2, 0.8, 0.0)
    return optax_sam.trajectory_loss(z, past, coefficient=coefficient)


def transcribed(method):
    X, y = recorded.PROBLEM["X"], recorded.PROBLEM["y"]
    w = recorded.initial("sgd")
    return trajectory.train(method, w, X, y, ORDERS, BATCH, **SGD)


def without_a_term():
    """SAF of the transcription that never starts."""
    return trajectory.SAF(EXAMPLES, 10, 1, EPOCHS, EPOCHS, 0.0, 1.0)


@functools.cache
def plain():
    """The losses of the base optimizer, from the transcription."""
    return transcribed(without_a_term())[0]


def rows(seed, count=2, classes=3):
    return np.random.default_rng(seed).normal(size=(count, classes))


def assert_stands_beside(place, member, base, **extra):
    """Before or after an optimizer it leaves its steps alone, in all forms of a loop.

    One compiled step, donated ones, a scan, and one that goes on from a file.
    """
    base = optax.with_extra_args_support(base)
    tx = optax.chain(*([member, base] if place == "first" else [base, member]))

    def step_of(tx):
        def step(params, state, t):
            g = jax.tree.map(lambda x: jnp.sin(3 * x + t), params)
            indices = jnp.array([0, 3]) + t % 3
            logits = jnp.cos(indices[:, None] + jnp.arange(3) + t)
            rows = {"logits": logits, "indices": indices}
            updates, state = tx.update(g, state, params, unknown=3, **rows, **extra)
            return optax.apply_updates(params, updates), state

        return step

    def run(step, carry, times):
        for t in times:
            carry = step(*carry, t)
        return carry

    start = lambda tx: (harness.tree(), tx.init(harness.tree()))
    donated = jax.jit(step_of(tx), donate_argnums=(0, 1))
    half = run(donated, start(tx), range(4))
    saved, kinds = flax.serialization.to_bytes(half), harness.kinds(half)
    whole = run(donated, half, range(4, 8))
    restored = flax.serialization.from_bytes(start(tx), saved)
    harness.assert_equal(run(jax.jit(step_of(tx)), restored, range(4, 8)), whole)
    body = lambda carry, t: (step_of(tx)(*carry, t), None)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(8)))(start(tx))
    harness.assert_close(scanned, whole, 1e-6)
    for carry in (start(tx), whole, scanned):
        assert harness.kinds(carry) == kinds
    alone, _ = run(jax.jit(step_of(base)), start(base), range(8))
    harness.assert_close(whole[0], alone, 1e-6)


def flops_of_a_step(problem, tx, term):
    """Of a step of an optimizer with ``term(z, x, state, indices)`` in the loss."""
    params = jax.eval_shape(problem.params)
    x, y = jax.eval_shape(lambda: problem.batch(0))
    indices = jax.ShapeDtypeStruct(y.shape, jnp.int32)

    def step(params, state, x, y, indices):
        def loss_fn(w):
            z = forward(w, x)
            return cross_entropy(z, y) + term(z, x, state, indices), z

        (_, z), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, logits=z, indices=indices)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return flops(step, params, state, x, y, indices)


def forward(w, x):
    for i in range(3):
        layer = w[f"layer{i}"]
        x = (jnp.tanh(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
