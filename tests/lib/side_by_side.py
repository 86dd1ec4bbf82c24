"""The package and the transcriptions in reference/ on the same steps, in float64."""

import functools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import recorded
from reference import base

TOLERANCE = 1e-10
SGD = {"lr": 0.2, "momentum": 0.9}


def generator(key, t):
    """The documented rule: a step's draw is a function of the key and the step."""
    return jax.random.fold_in(jax.random.key(key, impl="threefry2x32"), t)


@functools.cache
def draws(key, steps):
    """The uniforms that a package key stands for, one per step."""
    at = lambda t: jax.random.uniform(generator(key, t))
    return np.asarray(jax.vmap(at)(jnp.arange(steps)))


def problem(seed, steps):
    """Weights of a small network, and a batch for every step."""
    r = np.random.RandomState(seed)
    w = {
        "layer0/kernel": r.randn(6, 5),
        "layer0/bias": 0.3 * r.randn(5),
        "layer1/kernel": r.randn(5, 4),
        "layer1/bias": 0.3 * r.randn(4),
    }
    return w, [(r.randn(8, 6), r.randint(4, size=8)) for _ in range(steps)]


def quadratic(seed, steps):
    """Weights, and for every step the same curvature with a slope of its own."""
    r = np.random.RandomState(seed)
    rotation = np.linalg.qr(r.randn(12, 12))[0]
    A = rotation * np.logspace(-1.5, 0.5, 12) @ rotation.T
    return {"w": 0.25 * r.randn(12)}, [(A, 0.25 * r.randn(12)) for _ in range(steps)]


def optimizer(member):
    return optax.chain(member, optax.sgd(SGD["lr"], momentum=SGD["momentum"]))


def gradient(p, batch):
    return jax.grad(recorded.mlp)(p, *batch)


def losses(p, batch):
    """Of each example."""
    one = lambda x, y: recorded.mlp(p, x[None], y[None])
    return jax.vmap(one)(*batch)


def step_of(tx, gradient, losses):
    """A training step with the gradient of the small network."""

    def step(w, state, batch, extra):
        def per_example_loss_fn(p, indices=None):
            some = [x if indices is None else x[indices] for x in batch]
            return losses(p, some)

        grad_fn = lambda p: gradient(p, batch)
        extra = {"per_example_loss_fn": per_example_loss_fn, **extra}
        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn, **extra)
        return optax.apply_updates(w, updates), state

    return step


def compiled(tx):
    return jax.jit(step_of(tx, gradient, losses))


# Compiled once for all methods, which then are not.
_COMPILED = jax.jit(gradient), jax.jit(losses)


def uncompiled(tx):
    return step_of(tx, *_COMPILED)


def package(step, w, state, batches, extras=None):
    """w_0, ..., w_T, and all states as one whose leaves have an axis of steps.

    ``extras`` are further extra arguments, one dict per step.
    """
    trajectory, states = [jax.tree.map(jnp.asarray, w)], [state]
    for batch, extra in zip(batches, extras or len(batches) * [{}], strict=True):
        w, state = step(trajectory[-1], states[-1], batch, extra)
        trajectory.append(w)
        states.append(state)
    return trajectory, jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def reference(direction, w, batches):
    def step(t, w):
        return direction(t, w, lambda p: base.mlp(p, *batches[t])[1])

    return base.descend(w, len(batches), step, **SGD)


def assert_equal(trajectory, expected):
    for t, (w, w_expected) in enumerate(zip(trajectory, expected, strict=True)):
        assert recorded.deviation(w, w_expected) < TOLERANCE, t
        conformance.hold(conformance.PAPER, w, w_expected, t)


def only(*leaves):
    """The mask of some leaves of the small network."""
    return {leaf: leaf in leaves for leaf in recorded.TENSORS}
