"""Rules and wrappers that tests of whole programs go through."""

import functools

import jax
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import when

PROGRAMS = 2000  # random ones, of `make sweep`
RULES = {
    "every_2": lambda: when.every_k(2),
    "every_3": lambda: when.every_k(3, phase=1),
    "bernoulli": lambda: when.bernoulli(0.4, key=3),
    "bernoulli_scheduled": lambda: when.bernoulli(
        optax.linear_schedule(0.9, 0.1, 20), key=3
    ),
    "variance": lambda: when.variance_controlled(4, 2, sensitivity=0.5, warmup_steps=5),
    "after": lambda: when.after(3, when.every_k(2)),
    "lagged_trend": lambda: when.norm_above_trend(lag=1),
    "trend": lambda: when.norm_above_trend(),
    "always": when.always,
}


def alternating(count):
    return count % 2 == 0


# What holds steps back, repeats them or rolls them back.
WRAPPERS = {
    "alone": lambda tx: tx,
    "multi_steps": lambda tx: optax.MultiSteps(tx, 3),
    "multi_steps_scheduled": lambda tx: optax.MultiSteps(tx, lambda step: 1 + step % 2),
    "skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "skip_large_updates": lambda tx: optax.MultiSteps(
        tx,
        1,
        should_skip_update_fn=functools.partial(
            optax.skip_large_updates, max_squared_norm=9.0
        ),
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 10),
    "conditionally_transform": lambda tx: optax.transforms.conditionally_transform(
        tx, alternating
    ),
    "conditionally_mask": lambda tx: optax.transforms.conditionally_mask(
        tx, alternating
    ),
    "nested": lambda tx: optax.MultiSteps(optax.apply_if_finite(tx, 10), 2),
    "inner_chain": lambda tx: optax.chain(optax.identity(), tx, optax.identity()),
    "named_chain": lambda tx: optax.named_chain(("sam", tx)),
}


def wrap(name, tx):
    """The optimizer in a wrapper, taking extra arguments."""
    tx = WRAPPERS[name](tx)
    return tx if isinstance(tx, optax.MultiSteps) else optax.with_extra_args_support(tx)


def rolled_back(old, new):
    """As Flax's loss scaling does: after weights that are not finite all is kept."""
    finite = [jax.numpy.isfinite(x).all() for x in jax.tree.leaves(new[0])]
    fine = functools.reduce(jax.numpy.logical_and, finite)
    return jax.tree.map(lambda a, b: jax.numpy.where(fine, a, b), new, old)


def ascents(state):
    """How many ascents were taken so far."""
    return np.asarray(optax_sam.metrics(state)["ascents"])


def to_host_and_back(carry):
    """As a checkpoint does."""
    is_key = lambda x: jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
    move = lambda x: x if is_key(x) else jax.numpy.asarray(np.asarray(x))
    return jax.tree.map(move, carry)


def compare(plain, dispatched, carry, xs, restored=(), raising=()):
    """The same decisions and weights on every step; returns the ascents.

    What two programs round differently does not grow: both have the weights of the
    plain one before each step, and each a state of its own. On the ``restored`` steps
    both go on from an older one; on the ``raising`` ones a call fails before.
    """
    a = b = carry
    history = [a]
    for t, x in enumerate(xs):
        if t in restored:
            a = b = to_host_and_back(history[t // 2])
        if t in raising:
            with pytest.raises(TypeError):
                dispatched(*b, "no batch")
        a, b = plain(*a, x), dispatched(*b, x)
        history.append(a)
        np.testing.assert_array_equal(ascents(a[1]), ascents(b[1]), err_msg=str(t))
        eps = lambda x: float(jax.numpy.finfo(x.dtype).eps)
        # XLA may keep more digits of a half-precision leaf in one program than in the
        # other (xla_allow_excess_precision). The perturbation takes that to all leaves,
        # by less than a sixteenth of a rounding here.
        through_others = max(map(eps, jax.tree.leaves(a[0]))) / 16
        for x, y in zip(*map(jax.tree.leaves, (a[0], b[0])), strict=True):
            assert x.dtype == y.dtype
            tolerance = max(40 * eps(x), through_others)
            x, y = np.asarray(x, float), np.asarray(y, float)
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
        b = a[0], b[1]
    return ascents(a[1])
