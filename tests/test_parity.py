"""The package against the trajectories recorded from the authors' code, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
from reference import base

import optax_sam

pytestmark = pytest.mark.usefixtures("x64")


def loss_fn(name):
    """The loss of a run, with the L2 term of those that have one."""
    plain = recorded.LOSSES[recorded.RUNS[name]["problem"]]
    l2 = recorded.RUNS[name]["hyperparameters"].get("l2_reg", 0.0)

    def loss(w, batch):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
        return plain(w, *batch) + 0.5 * l2 * squares

    return loss


def optimizer(name, member):
    """The member first, then what the authors' base optimizer does."""
    h = recorded.RUNS[name]["hyperparameters"]
    after = []
    if "clip_global_norm" in h:
        after.append(optax.clip_by_global_norm(h["clip_global_norm"]))
    if h.get("weight_decay"):
        after.append(optax.add_decayed_weights(h["weight_decay"]))
    sgd = optax.sgd(h["lr"], momentum=h["momentum"], nesterov=h.get("nesterov", False))
    return optax.chain(member, *after, sgd)


def descend(name, tx, ascend=None):
    """Yields t, w_t and the state before step t, and once more after the last step."""
    loss = loss_fn(name)

    @functools.partial(jax.jit, static_argnames="ascend")
    def step(w, state, batch, ascend):
        grad_fn = lambda p: jax.grad(loss)(p, batch)
        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn, ascend=ascend)
        return optax.apply_updates(w, updates), state

    w = jax.tree.map(jnp.asarray, recorded.initial(name))
    state = tx.init(w)
    yield 0, w, state
    for t in range(recorded.RUNS[name]["steps"]):
        decision = None if ascend is None else bool(ascend[t])
        w, state = step(w, state, recorded.data(name, t), decision)
        yield t + 1, w, state


def stacked(states):
    """One state whose leaves have a leading axis of steps."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def check(name, steps):
    """Compares every stored step and norm; returns the states before each step."""
    saved, arrays = recorded.saved(name), recorded.arrays(name)
    compared, norms, states = set(), [], []
    for t, w, state in steps:
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(w))
        if t in saved:
            assert recorded.deviation(w, saved[t]) < recorded.atol(name, t), t
            compared.add(t)
        norms.append(float(optax.tree.norm(w)))
        states.append(state)
    assert compared == set(saved)
    if "param_norm" in arrays:
        last = max(saved)
        np.testing.assert_allclose(
            norms[1:], arrays["param_norm"], rtol=0, atol=recorded.atol(name, last)
        )
    return stacked(states)


SAM_RUNS = recorded.runs("sgd", "sam", "asam")
VSAM_RUNS = recorded.runs("vsam")


def member(name):
    h = recorded.RUNS[name]["hyperparameters"]
    if "sgd" in name:
        return optax.identity()
    if "asam_davda54" in name:
        return optax_sam.asam(h["rho"], adapt=True, eta=0.0)
    if "asam_samsung" in name:
        # The one leaf of quad is called "weight" in the authors' code.
        adapt = True if "quad" in name else None
        return optax_sam.asam(h["rho"], eta=h["eta"], adapt=adapt)
    return optax_sam.sam(h["rho"])


@pytest.mark.parametrize("name", SAM_RUNS)
def test_sam_and_asam(name):
    check(name, descend(name, optimizer(name, member(name))))


def vsam_member(name, **changes):
    h = recorded.RUNS[name]["hyperparameters"]
    tail = recorded.TENSORS[-h["last_layer"] :]
    return optax_sam.vsam(
        h["rho"],
        window=h["K"],
        num_slices=h["m"],
        sensitivity=h["a"],
        max_rate=h["max_rate"],
        warmup_steps=h["warmup_steps"],
        reuse_decay=h["beta"],
        norm_mask={leaf: leaf in tail for leaf in recorded.TENSORS},
        **changes,
    )


@pytest.mark.parametrize("name", VSAM_RUNS)
def test_vsam_driven_by_the_recorded_decisions(name):
    run = recorded.arrays(name)
    tx = optimizer(name, vsam_member(name))
    states = check(name, descend(name, tx, run["sampled"]))
    rate = optax.tree.get(states, "rate")[:-1]
    np.testing.assert_allclose(rate, run["s"], rtol=0, atol=1e-10)
    samples = optax_sam.metrics(states)["ascents"][1:]
    np.testing.assert_array_equal(samples, run["n_samples"])
    latest = {"psf_norms": "psf_norm", "ratios": "ratio", "variances": "var"}
    for field, array in latest.items():
        ring = optax.tree.get(states, field)[1:]
        np.testing.assert_allclose(ring[:, -1], run[array], rtol=0, atol=1e-10)
    used = optax.tree.get(states, "used")[:-1]
    warm = recorded.RUNS[name]["hyperparameters"]["warmup_steps"]
    before = run["used_in_window"] - run["sampled"]
    np.testing.assert_array_equal(used[warm:], before[warm:])


def draws(key, steps):
    """The uniforms that a package key stands for, one per step."""
    generator = jax.random.key(key, impl="threefry2x32")
    at = lambda t: jax.random.uniform(jax.random.fold_in(generator, t))
    return np.asarray(jax.vmap(at)(jnp.arange(steps)))


@pytest.mark.parametrize(("key", "name"), list(enumerate(VSAM_RUNS)))
def test_vsam_decides_by_itself_as_the_transcription(key, name):
    h = recorded.RUNS[name]["hyperparameters"]
    tx = optimizer(name, vsam_member(name, key=key))
    steps = list(descend(name, tx))
    states = stacked([state for _, _, state in steps])

    reference = recorded.transcribed_vsam(name)
    control, u = reference.controller, draws(key, h["steps"])
    samples, s = [0], []

    def direction(t, w):
        grad = lambda p: base.mlp(p, *recorded.data(name, t))[1]
        d = reference.direction(w, grad, u[t])
        samples.append(control.samples)
        s.append(control.s)
        return d

    expected = base.descend(
        recorded.initial(name),
        h["steps"],
        direction,
        lr=h["lr"],
        momentum=h["momentum"],
        weight_decay=h["weight_decay"],
    )
    decisions = optax_sam.ascends_next(states)[:-1]
    np.testing.assert_array_equal(decisions, np.diff(samples))
    rate = optax.tree.get(states, "rate")[:-1]
    np.testing.assert_allclose(rate, s, rtol=0, atol=1e-10)
    for (t, w, _), w_expected in zip(steps, expected, strict=True):
        assert recorded.deviation(w, w_expected) < 1e-10, t
