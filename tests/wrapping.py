"""Methods that wrap an optimizer, beside their transcriptions."""

import jax
import numpy as np
import optax
import recorded
import side_by_side
import trajectories
from reference import base
from trajectories import Batch, assert_is_recorded, hyperparameters, rising

LR, ADAM_LR = rising(0.1), rising(0.02)
DECAY = 0.01


def sgd():
    """SGD to be wrapped, here and there."""
    ours = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LR, momentum=0.9))
    return ours, base.sgd(LR, 0.9, DECAY)


def adamw():
    """AdamW to be wrapped, here and there."""
    ours = optax.adamw(ADAM_LR, weight_decay=DECAY)
    return ours, base.adamw(ADAM_LR, weight_decay=DECAY)


def assert_steps_are_those_of_the_reference(build, transcription, optimizer, compiled):
    """``build(inner)`` beside ``transcription(w, steps, grad, U)``.

    The batch before the first one is the first.
    """
    inner, U = optimizer()
    tx, gradient = build(inner), jax.grad(recorded.mlp)

    def step(w, state, batch, previous):
        grad_fn = lambda p: gradient(p, *batch)
        before = lambda p: gradient(p, *previous)
        extra = {"grad_fn": grad_fn, "previous_grad_fn": before}
        updates, state = tx.update(grad_fn(w), state, w, **extra)
        return optax.apply_updates(w, updates), state

    step = jax.jit(step)
    for seed in range(3 if compiled else 1):
        w, batches = side_by_side.problem(seed, trajectories.STEPS)
        grad = lambda t, p, batches=batches: base.mlp(p, *batches[t])[1]
        expected = transcription(w, len(batches), grad, U)
        state, path = tx.init(w), [w]
        for batch, previous in zip(batches, batches[:1] + batches[:-1], strict=True):
            w, state = step(w, state, batch, previous)
            path.append(w)
        assert all(x.dtype == np.float64 for x in jax.tree.leaves(path))
        side_by_side.assert_equal(path, expected)


def assert_reference_meets_the_recorded_run(name, method, **arguments):
    """Of a method that wraps SGD, with grad(t, w) on the batch of step t."""
    h, steps = hyperparameters(name), recorded.RUNS[name]["steps"]
    losses = []

    def grad(t, w):
        batch = Batch(name, t)
        g = batch.grad(w)
        losses.extend(batch.losses_taken)
        return g

    U = base.sgd(h["lr"], h["momentum"], h["weight_decay"])
    trajectory = method(recorded.initial(name), steps, grad, U, h["rho"], **arguments)
    assert_is_recorded(name, trajectory, np.reshape(losses, (steps, -1)))


# What follows takes gradients of the small network, and the settings of one optimizer.

W, BATCHES = side_by_side.problem(5, 12)
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
U = base.sgd(*SGD.values())


def gradient(t, w):
    return base.mlp(w, *BATCHES[t])[1]


def difference(a, b):
    return base.norm(base.add(a, b, -1.0))


def path(direction, **settings):
    """SGD with direction(t, w, grad)."""
    step = lambda t, w: direction(t, w, lambda p: gradient(t, p))
    return base.descend(W, 12, step, **SGD | settings)


def assert_same_path(a, b, tolerance=1e-13):
    assert len(a) == len(b) == 13
    assert difference(b[0], b[-1]) > 0.1
    assert max(difference(x, y) for x, y in zip(a, b, strict=True)) < tolerance
