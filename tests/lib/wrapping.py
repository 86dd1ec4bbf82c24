"""Methods that wrap an optimizer, beside their transcriptions."""

import jax
import numpy as np
import optax
import recorded
import side_by_side
import trajectories as beside
from reference import base

LR, ADAM_LR = beside.rising(0.1), beside.rising(0.02)
DECAY = 0.01


def sgd():
    """SGD to be wrapped, here and there."""
    ours = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LR, momentum=0.9))
    return ours, base.sgd(LR, 0.9, DECAY)


def adamw():
    """AdamW to be wrapped, here and there."""
    ours = optax.adamw(ADAM_LR, weight_decay=DECAY)
    return ours, base.adamw(ADAM_LR, weight_decay=DECAY)


def ten_steps(cases):
    """Two tests, as ``trajectories.ten_steps`` makes them.

    ``cases`` are, by name, ``build(inner)``, ``transcription(w, steps, grad, U)`` and
    the optimizer that is wrapped. The batch before the first one is the first.
    """

    @beside.double
    @beside.each_way(cases)
    def equals(name, compiled):
        build, transcription, optimizer = cases[name]
        inner, U = optimizer()
        tx, gradient = build(inner), jax.grad(recorded.mlp)

        @jax.jit
        def step(w, state, batch, previous):
            grad_fn = lambda p: gradient(p, *batch)
            before = lambda p: gradient(p, *previous)
            extra = {"grad_fn": grad_fn, "previous_grad_fn": before}
            updates, state = tx.update(grad_fn(w), state, w, **extra)
            return optax.apply_updates(w, updates), state

        for seed in range(3 if compiled else 1):
            w, batches = side_by_side.problem(seed, beside.STEPS)
            expected = transcribed(transcription, U, w, batches)
            state, path = tx.init(w), [w]
            before = batches[:1] + batches[:-1]
            for batch, previous in zip(batches, before, strict=True):
                w, state = step(w, state, batch, previous)
                path.append(w)
            assert all(x.dtype == np.float64 for x in jax.tree.leaves(path[1:]))
            side_by_side.assert_equal(path, expected)

    def differ():
        w, batches = side_by_side.problem(0, beside.STEPS)
        beside.assert_apart(
            transcribed(transcription, optimizer()[1], w, batches)[-1]
            for _, transcription, optimizer in cases.values()
        )

    return equals, differ


def transcribed(transcription, U, w, batches):
    grad = lambda t, p: base.mlp(p, *batches[t])[1]
    return transcription(w, len(batches), grad, U)


def assert_reference_meets_the_recorded_run(name, method, **arguments):
    """Of a method that wraps SGD, with grad(t, w) on the batch of step t."""
    h, steps = beside.hyperparameters(name), recorded.RUNS[name]["steps"]
    losses = []

    def grad(t, w):
        batch = beside.Batch(name, t)
        g = batch.grad(w)
        losses.extend(batch.losses_taken)
        return g

    U = base.sgd(h["lr"], h["momentum"], h["weight_decay"])
    trajectory = method(recorded.initial(name), steps, grad, U, h["rho"], **arguments)
    beside.assert_is_recorded(name, trajectory, np.reshape(losses, (steps, -1)))
