"""Whole runs with SAF or MESA: digits, shuffled, the last batch incomplete."""

import functools

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


@functools.cache
def plain():
    """The losses of the base optimizer: the transcription without a term."""
    never = trajectory.SAF(EXAMPLES, 10, 1, EPOCHS, EPOCHS, 0.0, 1.0)
    return transcribed(never)[0]


def rows(seed, count=2, classes=3):
    return np.random.default_rng(seed).normal(size=(count, classes))


def assert_stands_beside(place, member, base, **extra):
    """Before or after an optimizer it leaves its steps alone, in a loop and a scan."""
    base = optax.with_extra_args_support(base)
    tx = optax.chain(*([member, base] if place == "first" else [base, member]))

    def step_of(tx):
        def step(carry, t):
            params, state = carry
            g = jax.tree.map(lambda x: jnp.sin(3 * x + t), params)
            indices = jnp.array([0, 3]) + t % 3
            logits = jnp.cos(indices[:, None] + jnp.arange(3) + t)
            rows = {"logits": logits, "indices": indices}
            updates, state = tx.update(g, state, params, unknown=3, **rows, **extra)
            return (optax.apply_updates(params, updates), state), None

        return step

    def scanned(tx):
        start = harness.tree(), tx.init(harness.tree())
        return jax.jit(lambda c: jax.lax.scan(step_of(tx), c, jnp.arange(8))[0])(start)

    carry, step = (harness.tree(), tx.init(harness.tree())), jax.jit(step_of(tx))
    for t in range(8):
        carry, _ = step(carry, t)
    found = scanned(tx)
    harness.assert_close(found, carry, 1e-6)
    assert harness.kinds(found) == harness.kinds(carry)
    harness.assert_close(found[0], scanned(base)[0], 1e-6)


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
